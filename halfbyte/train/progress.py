"""What goes on before training: a line that changes on a terminal, now and then a line of its own elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from halfbyte.config import DataSection
from halfbyte.data import Example, ExampleSet, PreparedData, Renderer, load_examples, prepare

SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def telling(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Show that something goes on while the `with` block runs.

    Args:
        console: Where to.
        what: Goes on.

    Returns:
        Takes how far it is; where `console` is no terminal, little of it is shown, and nothing of what is soon done.
    """
    if console.is_terminal:
        with console.status(what) as status:
            yield lambda how_far: status.update(f"{what}: {how_far}")
        return
    told = time.monotonic()

    def tell(how_far: str) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            console.print(f"{what}: {how_far}", markup=False, highlight=False, soft_wrap=True)

    yield tell


def read_examples(source: str, options: DataSection, console: Console) -> ExampleSet:
    """Read examples as the options say, showing how many rows there are so far."""
    with telling(console, f"reading {source}") as tell:
        return load_examples(
            source,
            format=options.format,
            columns=options.columns,
            split=options.split,
            on_progress=lambda num_rows: tell(f"{num_rows:,} rows"),
        )


def prepare_examples(
    examples: list[Example], renderer: Renderer, options: DataSection, console: Console
) -> PreparedData:
    """Tokenise examples as the options say, showing how many are done."""
    with telling(console, "tokenising") as tell:
        return prepare(
            examples,
            renderer,
            max_length=options.max_length,
            overlong=options.overlong,
            on_progress=lambda done, total: tell(f"{done:,} of {total:,} examples"),
        )
