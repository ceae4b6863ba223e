"""Write safetensors files one tensor, or one part of a tensor, at a time.

The format puts the header first, and the header lists what follows. We leave room for it, stream the data behind, and
write it when the shard ends, padded with the spaces that the format allows. So nothing is held in memory but small
tensors: those wait for the end of their shard, sorted by the size of their elements, because readers need each tensor
at a multiple of that size and the format knows no gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from halfbyte.models.safetensors_file import DTYPE_NAMES, LENGTH_BYTES

MAX_SHARD_BYTES = 5_000_000_000
SMALL_BYTES = 1 << 16
HEADER_ALIGNMENT = 8
# What a tensor takes in the header beside its name: dtype, shape, two offsets, punctuation.
ENTRY_BYTES = 160
METADATA = {"format": "pt"}


class TensorWriter(Protocol):
    """What takes the weights of a model, tensor by tensor."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""

    def add_parts(
        self, name: str, parts: Iterable[torch.Tensor], *, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Write a tensor that comes in parts, one after the other in memory order."""


class ShardWriter:
    """The weights of one model, being written to a folder."""

    def __init__(self, folder: Path, names: Iterable[str], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Prepare to write.

        Args:
            folder: Exists; nothing else writes weights there.
            names: All tensors that may come, so that headers get room enough.
            max_shard_bytes: A shard ends before the tensor that would take it beyond.
        """
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        room = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) + len(json.dumps(METADATA)) + ENTRY_BYTES
        self._header_bytes = -(-room // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._position = 0
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        self.add_parts(name, [tensor], dtype=tensor.dtype, shape=tuple(tensor.shape))

    def add_parts(
        self, name: str, parts: Iterable[torch.Tensor], *, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        """Write a tensor that comes in parts, one after the other in memory order."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if self._file is not None and self._is_full(num_bytes, dtype):
            self._end_shard()
        if self._file is None:
            self._begin_shard()
        self.total_bytes += num_bytes
        if num_bytes <= SMALL_BYTES:
            whole = torch.cat([part.reshape(-1) for part in parts]).view(shape)
            self._waiting.append((name, whole.cpu()))
            return
        self._write(name, parts, dtype=dtype, shape=shape)

    def close(self) -> list[Path]:
        """End the last shard, give the files their names, write the index where there is more than one."""
        if self._file is not None:
            self._end_shard()
        num_shards = len(self._shards)
        paths, weight_map = [], {}
        for number, header in enumerate(self._shards, start=1):
            name = "model.safetensors" if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"
            os.replace(self._shard_path(number - 1), self._folder / name)
            paths.append(self._folder / name)
            weight_map.update(dict.fromkeys(header.keys() - {"__metadata__"}, name))
        if num_shards > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return paths

    def abandon(self) -> None:
        """Close what is open, after an error."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_full(self, num_bytes: int, dtype: torch.dtype) -> bool:
        waiting_bytes = sum(tensor.nbytes for _, tensor in self._waiting)
        if self._position + waiting_bytes + num_bytes > self._max_shard_bytes:
            return True
        return num_bytes > SMALL_BYTES and self._position % dtype.itemsize != 0

    def _shard_path(self, index: int) -> Path:
        return self._folder / f"shard-{index}.part"

    def _begin_shard(self) -> None:
        self._shards.append({"__metadata__": METADATA})
        self._file = open(self._shard_path(len(self._shards) - 1), "wb")  # noqa: SIM115 - open across calls
        self._file.seek(LENGTH_BYTES + self._header_bytes)
        self._position = 0

    def _write(self, name: str, parts: Iterable[torch.Tensor], *, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        begin = self._position
        for part in parts:
            assert part.dtype == dtype, f"{name}: {part.dtype} among {dtype}"
            raw = part.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            self._file.write(raw.numpy().data)
            self._position += raw.numel()
        assert self._position - begin == torch.Size(shape).numel() * dtype.itemsize, f"{name}: parts do not add up"
        self._shards[-1][name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, self._position],
        }

    def _end_shard(self) -> None:
        waiting = sorted(self._waiting, key=lambda entry: (-entry[1].dtype.itemsize, entry[0]))
        self._waiting = []
        if waiting and self._position % waiting[0][1].dtype.itemsize:
            # The last large tensor has an odd number of bytes: the small ones need a shard of their own.
            self._finish_file()
            self._begin_shard()
        for name, tensor in waiting:
            self._write(name, [tensor], dtype=tensor.dtype, shape=tuple(tensor.shape))
        self._finish_file()

    def _finish_file(self) -> None:
        header = json.dumps(self._shards[-1], separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes, "a tensor was written that was not announced"
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(LENGTH_BYTES, "little") + header.ljust(self._header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
