"""Examples made ready for training: tokens and masks within the context, and the report of what was lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from halfbyte.data.examples import Dropped, Example, TokenizedExample
from halfbyte.data.render import Renderer
from halfbyte.data.rendering import iter_rendered
from halfbyte.data.report import Cut, DataReport
from halfbyte.errors import DataError

Overlong = Literal["cut", "drop", "error"]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Tokenised examples and the report of how they came about."""

    examples: list[TokenizedExample]
    report: DataReport


def prepare(
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    max_length: int,
    overlong: Overlong = "cut",
    on_progress: Progress | None = None,
) -> PreparedData:
    """Render examples and fit them into the context.

    Args:
        examples: What to render.
        renderer: How to render it.
        max_length: Tokens an example may have.
        overlong: "cut" keeps the first max_length tokens, "drop" leaves the example out, "error" stops. A document (a
            text file) is never cut: it goes on in further examples that share one token, so that each is learned.
        on_progress: Is told how many examples are done, of how many.

    Raises:
        DataError: Nothing is left to learn, an example is too long under "error", or one cannot be rendered.
    """
    if overlong not in ("cut", "drop", "error"):
        raise DataError(f"overlong is {overlong!r}, must be 'cut', 'drop' or 'error'.")
    if max_length < 2:
        raise DataError(f"max_length is {max_length}, must be at least 2: one token to read and one to learn.")
    fitting = _Fitting(max_length, overlong)
    renderer.forget_counts()
    done = 0
    for batch, rendered in iter_rendered(examples, renderer):
        for example, texts in zip(batch, rendered, strict=True):
            for tokenized in texts:
                fitting.add(tokenized, is_document=example.is_document)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(examples))
    report = DataReport(
        lengths=tuple(len(example) for example in fitting.kept),
        num_trained_tokens=sum(example.num_trained_tokens for example in fitting.kept),
        max_length=max_length,
        cut=tuple(fitting.cut),
        dropped=tuple(fitting.dropped),
        num_continued=fitting.num_continued,
        notes=tuple(renderer.notes),
    )
    if not fitting.kept:
        raise DataError(_nothing_left(len(examples), fitting))
    return PreparedData(fitting.kept, report)


class _Fitting:
    """Collects the examples that fit, and keeps account of those that do not."""

    def __init__(self, max_length: int, overlong: Overlong) -> None:
        self.max_length = max_length
        self.overlong = overlong
        self.kept: list[TokenizedExample] = []
        self.cut: list[Cut] = []
        self.dropped: list[Dropped] = []
        self.num_continued = 0

    def add(self, example: TokenizedExample, *, is_document: bool) -> None:
        if example.num_trained_tokens == 0:
            self.dropped.append(Dropped(example.origin, "all of it is prompt, nothing to learn"))
        elif len(example) <= self.max_length:
            self.kept.append(example)
        elif is_document:
            self._continue_document(example)
        elif self.overlong == "error":
            raise DataError(
                f"{example.origin}: {len(example)} tokens, over the {self.max_length} allowed. Raise "
                "--data.max_length, shorten the example, or allow --data.overlong=cut or drop."
            )
        elif self.overlong == "drop":
            self.dropped.append(Dropped(example.origin, f"over {self.max_length} tokens"))
        else:
            self._cut(example)

    def _cut(self, example: TokenizedExample) -> None:
        shorter = example.window(0, self.max_length)
        if shorter.num_trained_tokens == 0:
            reason = f"nothing to learn in its first {self.max_length} tokens"
            self.dropped.append(Dropped(example.origin, reason))
            return
        lost = example.num_trained_tokens - shorter.num_trained_tokens
        self.cut.append(Cut(example.origin, len(example), lost))
        self.kept.append(shorter)

    def _continue_document(self, example: TokenizedExample) -> None:
        starts = range(0, len(example) - 1, self.max_length - 1)
        self.kept += [example.window(start, start + self.max_length) for start in starts]
        self.num_continued += len(starts) - 1


def _nothing_left(num_examples: int, fitting: _Fitting) -> str:
    if not num_examples:
        return "there are no examples to prepare."
    first = fitting.dropped[0]
    return (
        f"nothing is left to learn in {num_examples} examples. The first: {first.origin}: {first.reason}. Check which "
        f"column is the answer (--data.columns), the roles, and --data.max_length={fitting.max_length}."
    )
