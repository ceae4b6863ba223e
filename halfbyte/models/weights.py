"""The tensors of a model source, by name, read one at a time and not before they are asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from halfbyte.errors import FormatError
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_names import iter_gguf_weights
from halfbyte.models.pickle_file import load_pickle
from halfbyte.models.safetensors_file import MappedFiles, load_header
from halfbyte.models.source import ModelSource


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LazyTensor:
    """A tensor of a checkpoint that has not been read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of what `read` gives."""
    read: Callable[[], torch.Tensor]
    """Reads it. The result may be a view of a mapped file: never write to it, copy what is kept."""
    path: Path
    storage_dtype: torch.dtype
    """The narrowest dtype that holds it to the precision of the file."""
    offset: int | None = None
    """Where its bytes begin in the file; None where they are not the tensor as it is."""

    @property
    def num_bytes(self) -> int:
        """Bytes of what `read` gives."""
        return math.prod(self.shape) * self.dtype.itemsize


def iter_weights(source: ModelSource) -> Iterator[tuple[str, LazyTensor]]:
    """Yield every tensor of a source with its name, in the order in which it lies in the files.

    Raises:
        FormatError: A file is damaged, holds a name twice, or lacks a tensor that the index promises.
    """
    seen: dict[str, Path] = {}
    for tensor in _iter_files(source):
        if tensor.name in seen:
            raise FormatError(f"{tensor.name} is in {seen[tensor.name]} and again in {tensor.path}")
        seen[tensor.name] = tensor.path
        yield tensor.name, tensor


def _iter_files(source: ModelSource) -> Iterator[LazyTensor]:
    files = MappedFiles()
    for path in source.weight_files:
        if source.kind == "gguf":
            for weight in iter_gguf_weights(GgufFile(path)):
                yield LazyTensor(
                    name=weight.name,
                    shape=weight.shape,
                    dtype=weight.dtype,
                    read=weight.read,
                    path=path,
                    storage_dtype=weight.storage_dtype,
                )
        elif source.kind == "pickle":
            for name, tensor in load_pickle(path).items():
                yield LazyTensor(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    read=functools.partial(torch.Tensor.detach, tensor),
                    path=path,
                    storage_dtype=tensor.dtype,
                )
        else:
            yield from _iter_safetensors(path, files)


def _iter_safetensors(path: Path, files: MappedFiles) -> Iterator[LazyTensor]:
    header = load_header(path)
    for entry in header.entries:
        yield LazyTensor(
            name=entry.name,
            shape=entry.shape,
            dtype=entry.dtype,
            read=functools.partial(files.read, path, entry),
            path=path,
            storage_dtype=entry.dtype,
            offset=entry.offset,
        )
