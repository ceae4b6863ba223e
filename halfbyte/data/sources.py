"""Where examples come from: a file, a folder of files, or a data set by its name on the hub.

A folder is read as people lay folders out. Files that hold rows are taken, readme and licence texts are not; plain text
is taken only where there is nothing else. Where file names say which split they belong to (train.jsonl, test.jsonl),
only those of the wanted split are taken: training on the test file is a mistake that nothing later would show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from halfbyte.data.examples import Row
from halfbyte.data.readers import READERS, TEXT_SUFFIXES, file_kind, iter_rows
from halfbyte.errors import DataError

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_NOT_DATA = ("readme", "license", "licence", "changelog", "notice", "contributing", "dataset_info", "state")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a name stands for.

    Args:
        name: The name as it was given.
        split: The split that is wanted.
        files: The files to read, in order; empty for a data set on the hub.
        left_out: Files of the folder that are not read, with the reason.
        saved_folder: A folder written by the datasets package's save_to_disk, or None.
    """

    name: str
    split: str
    files: tuple[Path, ...] = ()
    left_out: tuple[str, ...] = ()
    saved_folder: Path | None = None

    @property
    def is_text(self) -> bool:
        """Whether the files are plain text, each a document."""
        return bool(self.files) and all(file_kind(path) in TEXT_SUFFIXES for path in self.files)

    def iter_rows(self) -> Iterator[Row]:
        """Stream the rows of all files.

        Raises:
            DataError: A file that cannot be read, or one without rows.
        """
        if not self.files:
            yield from _iter_data_set(self)
            return
        for path in self.files:
            num_rows = 0
            for row in iter_rows(path, split=self.split):
                num_rows += 1
                yield row
            if num_rows == 0:
                raise DataError(f"{path}: the file holds no rows. Fill it or leave it out.")


def find_source(source: str | Path, *, split: str = "train") -> Source:
    """Find out what a name stands for.

    Args:
        source: Path of a file or folder, or the name of a data set on the hub ("owner/name", with a configuration
            "owner/name:config").
        split: Which split of a folder or data set.

    Raises:
        DataError: Nothing is there by that name.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return Source(str(source), split, files=(path,))
    if path.is_dir():
        return _find_in_folder(path, split)
    name = str(source)
    if file_kind(path) in READERS or not _HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: no such file or folder.{_similar_file(path)}")
    return Source(name, split)


def _find_in_folder(folder: Path, split: str) -> Source:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Source(str(folder), split, saved_folder=folder)
    relative = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    paths = [folder / path for path in relative if not any(part.startswith(".") for part in path.parts)]
    left_out = [f"{path} (not data)" for path in paths if not _is_data(path)]
    paths = [path for path in paths if _is_data(path)]
    tables = [path for path in paths if file_kind(path) not in TEXT_SUFFIXES]
    if tables:
        left_out += [f"{path} (text beside tables)" for path in paths if path not in tables]
        paths = tables
    splits = {path: _split_of(path.relative_to(folder)) for path in paths}
    named = {found for found in splits.values() if found is not None}
    if named:
        wanted = next((name for name, words in _SPLIT_WORDS.items() if split.lower() in words), split)
        # A file that names no split is training data beside test.jsonl, never the other way round.
        taken = {wanted, None} if wanted == "train" else {wanted}
        if not taken & set(splits.values()):
            raise DataError(
                f"{folder}: no file of the split {split!r}; its files belong to: {', '.join(sorted(named))}. Name one "
                f"with --data.split={sorted(named)[0]}, or name the file itself."
            )
        left_out += [f"{path} (split {found or 'train'})" for path, found in splits.items() if found not in taken]
        paths = [path for path, found in splits.items() if found in taken]
    if not paths:
        raise DataError(f"{folder}: no file of examples in this folder. Known kinds: {', '.join(READERS)}")
    return Source(str(folder), split, files=tuple(paths), left_out=tuple(left_out))


def _is_data(path: Path) -> bool:
    return file_kind(path) in READERS and path.name.lower().split(".")[0] not in _NOT_DATA


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name or folder speaks of."""
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    return next((split for split, names in _SPLIT_WORDS.items() if words & set(names)), None)


def _similar_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" The folder {folder} does not exist either."
    close = get_close_matches(path.name, [other.name for other in folder.iterdir()], n=1)
    return f" Did you mean {folder / close[0]}?" if close else f" Looked in {folder.resolve()}."


def _iter_data_set(source: Source) -> Iterator[Row]:
    data_set = _load_data_set(source)
    for number, fields in enumerate(data_set, start=1):
        yield Row(f"{source.name}[{source.split}]:{number}", dict(fields))


def _load_data_set(source: Source) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"{source.name}: no such file or folder, and reading it from the hub needs the datasets package: "
            "pip install 'halfbyte[hub]'"
        ) from error
    try:
        if source.saved_folder is not None:
            return _pick_split(datasets.load_from_disk(source.saved_folder), source)
        name, _, config = source.name.partition(":")
        return datasets.load_dataset(name, config or None, split=source.split)
    # What load_dataset raises for a name, configuration or split that does not exist, and without a connection.
    except (OSError, ValueError, RuntimeError) as error:
        offline = " HF_HUB_OFFLINE is set." if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"{source.name}: no such file or folder, and the hub gave no data set of that name (split "
            f"{source.split!r}): {error}.{offline}"
        ) from error


def _pick_split(data_set: Any, source: Source) -> Any:
    if not isinstance(data_set, dict):
        return data_set
    if source.split not in data_set:
        raise DataError(
            f"{source.name}: has no split {source.split!r}, only: {', '.join(data_set)}. Name one with --data.split."
        )
    return data_set[source.split]
