"""Write a GGUF file: the header at once, then tensors in any order, each in parts.

A header names every tensor with its type and its place. Both follow from shapes, so the header is written before any
weight is read, and a tensor goes to its place when it comes, a few rows at a time. The gguf package writes the header
and quantises rows; a row is a whole number of blocks, so that rows are independent of each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from halfbyte.errors import ConfigError

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
ALIGNMENT = 32
# Elements turned into their type at once, so that temporaries stay in the cache.
CHUNK_ELEMENTS = 1 << 18

FieldValue = bool | int | float | str | list[int] | list[float] | list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """What a tensor of the file will be."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch counts."""
    type_name: str
    """One of PLAIN_TYPES or QUANTIZED_TYPES."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a vector's rows are its elements."""
        width = self.shape[-1] if len(self.shape) > 1 else 1
        block_elements, block_bytes = block_sizes(self.type_name)
        return width // block_elements * block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.row_bytes * math.prod(self.shape[:-1] or self.shape)


class GgufWriter:
    """A GGUF file being written."""

    def __init__(
        self, path: Path, architecture: str, fields: Mapping[str, FieldValue], tensors: Sequence[TensorPlan]
    ) -> None:
        """Write the header.

        Args:
            path: The file to make.
            architecture: The gguf package's name for it.
            fields: Key and value; whole numbers become uint32, others float32, elements of lists int32 and float32.
            tensors: All that will be written, in the order in which they shall lie in the file.
        """
        write_header(path, architecture, fields, tensors)
        self._plans = {plan.name: plan for plan in tensors}
        position = _padded(path.stat().st_size)
        self._offsets = {}
        for plan in tensors:
            self._offsets[plan.name] = position
            position += _padded(plan.num_bytes)
        self.total_bytes = position
        self._missing = set(self._plans)
        self._file = open(path, "r+b")  # noqa: SIM115 - open across calls
        self._file.truncate(position)

    def write(self, name: str, parts: Iterable[torch.Tensor], *, row_order: torch.Tensor | None = None) -> None:
        """Write one tensor.

        Args:
            name: One of those announced.
            parts: Its rows in order, in any floating dtype.
            row_order: For each row of the file, which of the rows given it is; None for the order given.
        """
        plan = self._plans[name]
        encoded: Iterable[numpy.ndarray] = (rows for part in parts for rows in _encoded(part, plan))
        if row_order is not None:
            # A whole tensor is held, but in the type of the file.
            encoded = [numpy.concatenate(list(encoded))[row_order.numpy()]]
        self._file.seek(self._offsets[name])
        written = sum(self._file.write(numpy.ascontiguousarray(rows).data) for rows in encoded)
        assert written == plan.num_bytes, f"{name}: parts do not add up"
        self._missing.remove(name)

    def close(self) -> None:
        """End the file, in which every announced tensor is."""
        assert not self._missing, f"announced and not written: {sorted(self._missing)[:3]}"
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


def write_header(
    path: Path, architecture: str, fields: Mapping[str, FieldValue], tensors: Sequence[TensorPlan]
) -> None:
    """Write fields and the list of tensors; see `GgufWriter`."""
    gguf = gguf_package()
    header = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        header.add_key_value(key, value, _value_type(value))
    for plan in tensors:
        header.add_tensor_info(
            plan.name,
            plan.shape,
            numpy.dtype(numpy.float32),
            plan.num_bytes,
            raw_dtype=gguf.GGMLQuantizationType[plan.type_name],
        )
    try:
        header.write_header_to_file()
        header.write_kv_data_to_file()
        header.write_ti_data_to_file()
    finally:
        header.close()


def block_sizes(type_name: str) -> tuple[int, int]:
    """Return elements and bytes of a block of one type."""
    gguf = gguf_package()
    elements, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(elements), int(num_bytes)


def gguf_package() -> Any:
    """Return the gguf package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError("writing a GGUF file needs the gguf package: pip install 'halfbyte[gguf]'") from error
    return gguf


def _encoded(part: torch.Tensor, plan: TensorPlan) -> Iterator[numpy.ndarray]:
    """Yield rows of a part as bytes, (rows, row_bytes)."""
    rows_at_once = max(1, CHUNK_ELEMENTS // math.prod(part.shape[1:]))
    for rows in part.detach().cpu().split(rows_at_once):
        if plan.type_name in PLAIN_TYPES:
            plain = rows.to(PLAIN_TYPES[plan.type_name]).contiguous()
            yield plain.view(torch.uint8).numpy().reshape(len(rows), plan.row_bytes)
        else:
            gguf = gguf_package()
            yield gguf.quants.quantize(rows.float().contiguous().numpy(), gguf.GGMLQuantizationType[plan.type_name])


def _value_type(value: FieldValue) -> Any:
    types = gguf_package().GGUFValueType
    for python_type, name in ((bool, "BOOL"), (int, "UINT32"), (float, "FLOAT32"), (str, "STRING")):
        if isinstance(value, python_type):
            return types[name]
    return types.ARRAY


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
