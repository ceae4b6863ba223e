"""Safetensors files: the header, checked, and the data, mapped one tensor at a time.

    8 bytes      length of the header, little endian
    header       JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}, space-padded
    data         the tensors' bytes, without gaps; offsets count from here

We read the header ourselves, because the offsets are what fast loading needs: readers copy byte ranges of the file into
pinned memory without a tensor in between. Nothing in the file is trusted: a header that is no JSON, offsets that
overlap, leave gaps or run past the end (a truncated download) are a FormatError that names the file.

On the CPU a tensor is a view of a private memory map: its bytes are page cache, not memory of the process, until
something is computed from them. Handing out the next tensor drops the pages of the one before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import FormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
MAX_OPEN_FILES = 16
# Torch counts elements in 64 bits; an empty tensor's other dimensions are counted too.
MAX_ELEMENTS = 2**48


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a file says that it holds."""

    entries: tuple[TensorEntry, ...]
    """In the order of their bytes."""
    metadata: dict[str, str]


def load_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: The file is missing, truncated or no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if file_bytes < LENGTH_BYTES or length > MAX_HEADER_BYTES:
                raise FormatError(f"{path} is not a safetensors file: it does not begin with a header's length")
            if LENGTH_BYTES + length > file_bytes:
                raise FormatError(f"{path} is truncated: {file_bytes} bytes, its header alone needs {length}")
            raw = file.read(length)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something else than text")
        data_start = LENGTH_BYTES + length
        entries = [_entry(name, fields, data_start) for name, fields in table.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its safetensors header cannot be understood ({error})") from error
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_layout(path, entries, data_start, file_bytes)
    return Header(entries=tuple(entries), metadata=metadata)


class MappedFiles:
    """Files of one model, mapped when a tensor of theirs is read, a few at a time.

    A mapping keeps its file open, and a process may have some hundreds or a thousand open: fewer than a large model in
    small shards has files. What is read stays good when its file makes room for another, which comes at no cost since
    tensors are read in the order in which they lie.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, MappedFile] = OrderedDict()

    def read(self, path: Path, entry: TensorEntry) -> torch.Tensor:
        """Return a view of one tensor's bytes; see `MappedFile.read`.

        Raises:
            FormatError: The file cannot be read any more.
        """
        mapped = self._open.pop(path, None) or MappedFile(path)
        self._open[path] = mapped
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return mapped.read(entry)


class MappedFile:
    """A file mapped into memory, read one tensor at a time."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                # A private mapping is writable as far as torch can see, and costs nothing while nobody writes.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
        self._last: tuple[int, int] | None = None

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return a view of one tensor's bytes; only to be read. Once the next is asked for, its pages are cold."""
        self._advise("MADV_DONTNEED", self._last)
        self._last = (entry.offset, entry.num_bytes)
        self._advise("MADV_WILLNEED", self._last)
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.offset % entry.dtype.itemsize:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.num_bytes, offset=entry.offset)
            return raw.clone().view(entry.dtype).view(entry.shape)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)

    def _advise(self, name: str, byte_range: tuple[int, int] | None) -> None:
        advice = getattr(mmap, name, None)
        if advice is None or byte_range is None:
            return
        offset, num_bytes = byte_range
        page_start = offset - offset % mmap.PAGESIZE
        if num_bytes:
            self._map.madvise(advice, page_start, offset + num_bytes - page_start)


def _entry(name: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    if fields["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {fields['dtype']}")
    dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    if not all(type(number) is int for number in (*shape, begin, end)):
        raise ValueError(f"{name}: shape and data_offsets must be whole numbers")
    if math.prod(max(dim, 1) for dim in shape) > MAX_ELEMENTS:
        raise ValueError(f"{name} has the impossible shape {list(shape)}")
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - begin} bytes cannot hold {fields['dtype']} {list(shape)}")
    return TensorEntry(name=name, dtype=dtype, shape=shape, offset=data_start + begin, num_bytes=end - begin)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise FormatError(f"{path} is damaged: {entry.name} does not begin where the tensor before it ends")
        position += entry.num_bytes
    if position > file_bytes:
        raise FormatError(f"{path} is truncated: its header promises {position} bytes, the file has {file_bytes}")
    if position < file_bytes:
        raise FormatError(f"{path} is damaged: {file_bytes - position} bytes follow the last tensor")
