from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import FormatError
from halfbyte.models.safetensors_file import DTYPES, MAX_OPEN_FILES, MappedFile, MappedFiles, load_header

TENSORS = {
    "plain": torch.randn(5, 7),
    "half": torch.randn(3, 4, 5).to(torch.bfloat16),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_mapped_file_reads_what_safetensors_wrote(path: Path) -> None:
    header, mapped = load_header(path), MappedFile(path)
    assert header.metadata == {"format": "pt"}
    assert {entry.name for entry in header.entries} == TENSORS.keys()
    for entry in header.entries:
        value = mapped.read(entry)
        assert value.dtype == TENSORS[entry.name].dtype
        assert torch.equal(value, TENSORS[entry.name])


def test_mapped_file_keeps_values_after_the_next_is_read(path: Path) -> None:
    header, mapped = load_header(path), MappedFile(path)
    values = {entry.name: mapped.read(entry) for entry in header.entries}
    assert all(torch.equal(values[name], TENSORS[name]) for name in TENSORS)


def test_mapped_file_reads_tensors_off_their_alignment(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write_file(tmp_path, header, b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    entries, mapped = load_header(path).entries, MappedFile(path)
    assert mapped.read(entries[1]).tolist() == [1.5, -2.0]


def test_load_header_knows_every_dtype_that_models_use(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(2, dtype=dtype) for dtype in DTYPES.values()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert {str(entry.dtype) for entry in load_header(tmp_path / "x.safetensors").entries} == tensors.keys()


@pytest.mark.parametrize("kept_bytes", [4, 60, -1])
def test_load_header_refuses_a_truncated_file(path: Path, kept_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(FormatError, match=r"x\.safetensors.*(truncated|not a safetensors)"):
        load_header(path)


def test_load_header_refuses_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "page.safetensors").write_bytes(b"<html><body>Not found</body></html>" * 9)
    with pytest.raises(FormatError, match=r"page\.safetensors is not a safetensors file"):
        load_header(tmp_path / "page.safetensors")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"1234"),
        ({"a": [1, 2]}, b"1234"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"1234"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"1234"),
    ],
    ids=["size", "dtype", "no offsets", "no object", "gap", "rest"],
)
def test_load_header_refuses_a_header_that_contradicts_itself(tmp_path: Path, header: object, data: bytes) -> None:
    with pytest.raises(FormatError, match=r"x\.safetensors is damaged"):
        load_header(write_file(tmp_path, header, data))


def test_load_header_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_header(tmp_path / "none.safetensors")


def write_file(folder: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def test_mapped_files_keep_few_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(2 * MAX_OPEN_FILES)]
    for number, path in enumerate(paths):
        save_file({"x": torch.full((3,), float(number))}, path)
    entries = [load_header(path).entries[0] for path in paths]
    files, open_before = MappedFiles(), len(os.listdir("/proc/self/fd"))
    # Twice, so that files which had to make room are mapped again; what was read before stays good.
    for _ in range(2):
        values = [files.read(path, entry) for path, entry in zip(paths, entries, strict=True)]
        assert [value[0].item() for value in values] == list(range(len(paths)))
        del values
        assert len(os.listdir("/proc/self/fd")) - open_before <= MAX_OPEN_FILES


def test_mapped_files_name_one_that_has_gone(path: Path) -> None:
    entry = load_header(path).entries[0]
    path.unlink()
    with pytest.raises(FormatError, match=r"x\.safetensors cannot be read"):
        MappedFiles().read(path, entry)
