"""From a name to examples: find the source, recognise the format, convert every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.data.examples import Dropped, Example, Row
from halfbyte.data.formats import Format, TextFormat
from halfbyte.data.recognise import Recogniser
from halfbyte.data.sources import Source, find_source
from halfbyte.errors import DataError

_SHOWN = 5
_ROWS_BETWEEN_PROGRESS = 10_000


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What was read and how it was understood; str() is for people.

    Args:
        source: The name that was given.
        format: The format recognised.
        num_rows: Rows read.
        files: Files read; empty for a data set on the hub.
        left_out: Files of the folder that were not read, with the reason.
        unused_columns: Columns that play no part.
        dropped: Rows left out, with the reason.
    """

    source: str
    format: str
    num_rows: int
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    unused_columns: tuple[str, ...] = ()
    dropped: tuple[Dropped, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.num_rows} rows, read as {self.format}"]
        if len(self.files) > 1:
            lines.append(f"files read: {_shortened(self.files)}")
        if self.left_out:
            lines.append(f"files left out: {_shortened(self.left_out)}")
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.dropped:
            lines.append(f"rows left out: {len(self.dropped)}")
            lines += [f"  {dropped.origin}: {dropped.reason}" for dropped in self.dropped[:_SHOWN]]
            if len(self.dropped) > _SHOWN:
                lines.append(f"  ... and {len(self.dropped) - _SHOWN} more")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Examples with the name of their format and the report of how they were read."""

    examples: list[Example]
    format: str
    report: LoadReport

    def __len__(self) -> int:
        return len(self.examples)


def load_examples(
    source: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    on_progress: Callable[[int], None] | None = None,
) -> ExampleSet:
    """Read examples from a file, a folder or the hub.

    Args:
        source: Path of a file or folder, or the name of a data set on the hub.
        format: A format's name (see `formats`); None recognises it by the columns.
        columns: What the format's columns, turn keys and speakers are called in this data.
        split: Which split of a folder, a JSON document with several lists, or a data set.
        on_progress: Is told how many rows are read, every ten thousand.

    Raises:
        DataError: Nothing there, nothing in it, or something in it that cannot be understood; with file and line.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tickets.jsonl"
        >>> _ = path.write_text(json.dumps({"question": "Where is my order?", "answer": "On its way."}))
        >>> loaded = load_examples(path)
        >>> loaded.format
        'question_answer'
        >>> loaded.examples[0].messages[1]
        {'role': 'assistant', 'content': 'On its way.'}
    """
    found = find_source(source, split=split)
    recogniser = Recogniser(format, columns or {})
    rows = found.iter_rows() if on_progress is None else _telling(found.iter_rows(), on_progress)
    return _convert(rows, recogniser, found)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ExampleSet:
    """Make examples of rows in memory: a list of dictionaries, or a data set of the datasets package.

    Args:
        rows: The rows.
        name: What to call them in messages.
        format: As in `load_examples`.
        columns: As in `load_examples`.

    Raises:
        DataError: As in `load_examples`, with the number of the row.
    """
    numbered = (Row(f"{name}:{number}", dict(fields)) for number, fields in enumerate(rows, start=1))
    return _convert(numbered, Recogniser(format, columns or {}), Source(name, split=""))


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _telling(rows: Iterable[Row], on_progress: Callable[[int], None]) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield row
        if number % _ROWS_BETWEEN_PROGRESS == 0:
            on_progress(number)


def _convert(rows: Iterable[Row], recogniser: Recogniser, source: Source) -> ExampleSet:
    examples: list[Example] = []
    dropped: list[Dropped] = []
    layout: Format | None = None
    num_rows, unused = 0, []
    for row in rows:
        num_rows += 1
        if layout is None:
            layout = recogniser.recognise(row)
            unused = recogniser.unused_columns(row, layout)
        fields = recogniser.rename(row)
        recogniser.check(row, fields, layout)
        for made in layout.convert(fields, origin=row.origin):
            if isinstance(made, Dropped):
                dropped.append(made)
            else:
                examples.append(made)
    if layout is None:
        raise DataError(f"{source.name}: holds no rows.")
    if source.is_text and isinstance(layout, TextFormat):
        examples = [dataclasses.replace(example, is_document=True) for example in examples]
    if not examples:
        raise DataError(
            f"{source.name}: none of its {num_rows} rows can be used. The first: {dropped[0].origin}: "
            f"{dropped[0].reason}"
        )
    report = LoadReport(
        source=source.name,
        format=layout.name,
        num_rows=num_rows,
        files=tuple(map(str, source.files)),
        left_out=source.left_out,
        unused_columns=tuple(unused),
        dropped=tuple(dropped),
    )
    return ExampleSet(examples=examples, format=layout.name, report=report)
