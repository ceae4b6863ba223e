"""What preparing the examples did to them: counts, lengths, and everything cut or left out, with the reason."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from halfbyte.data.examples import Dropped, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 5
_BAR_CHARACTERS = 30
_NUM_BINS = 10


class Cut(NamedTuple):
    """An example that was longer than the context."""

    origin: str
    num_tokens: int
    num_lost_trained_tokens: int


class LengthBin(NamedTuple):
    """How many examples have first to last tokens, both included."""

    first: int
    last: int
    num_examples: int


class TokenSpan(NamedTuple):
    """A piece of an example's text, and whether the model learns it."""

    text: str
    is_trained: bool


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What the model will see; str() is for people.

    Args:
        lengths: Tokens of each example that is used.
        num_trained_tokens: Tokens that are a target.
        max_length: Tokens an example may have.
        cut: Examples that were cut, with what was lost.
        dropped: Examples that are left out, with the reason.
        num_continued: Further examples made of documents longer than the context.
        notes: What else was decided: template, way of masking, system prompts.
    """

    lengths: tuple[int, ...]
    num_trained_tokens: int
    max_length: int
    cut: tuple[Cut, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    num_continued: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        """Number of examples that are used."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the examples that are used."""
        return sum(self.lengths)

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.num_trained_tokens / max(self.num_tokens, 1)

    @property
    def num_lost_trained_tokens(self) -> int:
        """Trained tokens lost by cutting."""
        return sum(cut.num_lost_trained_tokens for cut in self.cut)

    def histogram(self) -> list[LengthBin]:
        """Return the number of examples by length, in bins of equal and round width."""
        if not self.lengths:
            return []
        width = _round_up(-(-max(self.lengths) // _NUM_BINS))
        counts = Counter((length - 1) // width for length in self.lengths)
        longest = max(self.lengths)
        return [
            LengthBin(n * width + 1, min((n + 1) * width, longest), counts[n])
            for n in range(min(counts), max(counts) + 1)
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.num_examples} examples, {self.num_tokens} tokens, {self.num_trained_tokens} of them learned "
            f"({self.trained_share:.0%})"
        ]
        if self.lengths:
            low, median, high = (int(value) for value in np.percentile(self.lengths, [0, 50, 95]))
            lines.append(f"tokens an example: {low} to {max(self.lengths)}, half up to {median}, 95% up to {high}")
            lines += _draw_histogram(self.histogram())
        if self.num_continued:
            lines.append(f"{self.num_continued} further examples continue documents of over {self.max_length} tokens")
        if self.cut:
            lines.append(
                f"{len(self.cut)} examples have over {self.max_length} tokens and were cut; "
                f"{self.num_lost_trained_tokens} tokens to learn were lost (raise --data.max_length to keep them):"
            )
            lines += [
                f"  {cut.origin}: {cut.num_tokens} tokens, lost {cut.num_lost_trained_tokens} to learn"
                for cut in self.cut[:_SHOWN]
            ]
            lines += _more(len(self.cut))
        for reason, count in Counter(dropped.reason for dropped in self.dropped).most_common():
            lines.append(f"{count} examples left out: {reason}")
            origins = [dropped.origin for dropped in self.dropped if dropped.reason == reason]
            lines += [f"  {origin}" for origin in origins[:_SHOWN]]
            lines += _more(count)
        lines += self.notes
        return "\n".join(lines)


def token_spans(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample) -> list[TokenSpan]:
    """Return an example's text in pieces, each learned or only read; together they are the whole text.

    Args:
        tokenizer: The tokenizer that made the tokens.
        example: The example.
    """
    edges = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example)]
    spans: list[TokenSpan] = []
    shown = ""
    for start, stop in itertools.pairwise(edges):
        # Decoded from the first token on: a piece alone would lose the space at its start.
        text = str(tokenizer.decode(example.input_ids[:stop].tolist(), clean_up_tokenization_spaces=False))
        spans.append(TokenSpan(text[len(shown) :], bool(example.loss_mask[start])))
        shown = text
    return spans


def _round_up(number: int) -> int:
    """Return the next number with one significant digit."""
    magnitude = 10 ** (len(str(number)) - 1)
    return -(-number // magnitude) * magnitude


def _draw_histogram(bins: list[LengthBin]) -> list[str]:
    most = max(item.num_examples for item in bins)
    width = len(str(bins[-1].last))
    return [
        f"  {item.first:>{width}} to {item.last:>{width}}  "
        f"{'#' * -(-item.num_examples * _BAR_CHARACTERS // most):<{_BAR_CHARACTERS}} {item.num_examples}"
        for item in bins
    ]


def _more(count: int) -> list[str]:
    return [f"  ... and {count - _SHOWN} more"] if count > _SHOWN else []
