"""GGUF files: the header, and tensors dequantised one at a time.

    magic "GGUF", version, number of tensors, number of fields
    fields      key, type, value: scalars, strings, arrays (the vocabulary is some of them)
    tensors     name, dimensions (fastest first), quantisation type, offset
    data        aligned; offsets count from here

We walk the header ourselves and keep what a model needs to know, skipping the vocabulary: the gguf package makes an
object of each of its words, which takes longer than loading a small model. That package dequantises the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy
import torch

from halfbyte.errors import ConfigError, FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Longer arrays are vocabulary; the longest that describes a model has one entry a layer.
MAX_KEPT_ARRAY = 1024
# Small enough for the cache: the package makes several passes.
CHUNK_ELEMENTS = 1 << 16
# struct formats by value type; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where one tensor lies, and in which quantisation."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as torch counts."""
    type_name: str
    """The gguf package's name of its quantisation: F32, Q4_1, Q8_0, ..."""
    offset: int
    num_bytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        fields: Scalars, strings and short arrays of the header by key.
        tensors: By name, in the order of the header.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and walk its header.

        Raises:
            FormatError: The file is damaged, truncated or no GGUF file.
            ConfigError: The gguf package is not installed.
        """
        self.path = path
        self._quantization = _gguf_package()
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be read: {error}") from error
        self._position = 0
        try:
            self._walk_header()
        except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
            raise FormatError(f"{path} is truncated or damaged: its GGUF header cannot be understood") from error

    def read(self, tensor: GgufTensor) -> torch.Tensor:
        """Return one tensor: as it is stored where that is a plain dtype, else dequantised to fp32."""
        count = math.prod(tensor.shape)
        if tensor.type_name in _PLAIN_DTYPES:
            dtype = _PLAIN_DTYPES[tensor.type_name]
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=tensor.offset).view(tensor.shape)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=tensor.num_bytes, offset=tensor.offset)
        weight = torch.empty(tensor.shape)
        quantization_type = self._quantization.GGMLQuantizationType[tensor.type_name]
        block_elements, block_bytes = self._quantization.GGML_QUANT_SIZES[quantization_type]
        # The package holds several copies of what it dequantises, and takes rows in small groups: one long row is best.
        num_blocks = CHUNK_ELEMENTS // block_elements
        for out, chunk in zip(
            weight.view(-1).split(num_blocks * block_elements), raw.split(num_blocks * block_bytes), strict=True
        ):
            # Scales that are not finite give values that are not; a warning beside them says no more.
            with numpy.errstate(all="ignore"):
                values = self._quantization.quants.dequantize(chunk.view(1, -1).numpy(), quantization_type)
            out.copy_(torch.from_numpy(values).view(-1))
        return weight

    def _walk_header(self) -> None:
        if self._map[: len(MAGIC)] != MAGIC:
            raise FormatError(f"{self.path} is not a GGUF file")
        self._position = len(MAGIC)
        version = self._scalar("I")
        if version not in VERSIONS:
            raise FormatError(f"{self.path} is GGUF version {version}; known: {', '.join(map(str, VERSIONS))}")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        tensors = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise FormatError(f"{self.path} is damaged: general.alignment is {alignment!r}")
        data_start = -(-self._position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for tensor in tensors:
            placed = dataclasses.replace(tensor, offset=data_start + tensor.offset)
            if placed.offset + placed.num_bytes > len(self._map):
                raise FormatError(f"{self.path} is truncated: {placed.name} lies behind its end")
            self.tensors[placed.name] = placed

    def _tensor_info(self) -> GgufTensor:
        name = self._string()
        dims = [self._scalar("Q") for _ in range(self._scalar("I"))]
        type_number, offset = self._scalar("I"), self._scalar("Q")
        quantization_type = self._quantization.GGMLQuantizationType(type_number)
        block_elements, block_bytes = self._quantization.GGML_QUANT_SIZES[quantization_type]
        if not dims or 0 in dims:
            raise FormatError(f"{self.path} is damaged: {name} has the dimensions {dims}")
        if dims[0] % block_elements:
            raise FormatError(f"{self.path} is damaged: rows of {name} are no whole number of blocks")
        return GgufTensor(
            name=name,
            shape=tuple(reversed(dims)),
            type_name=quantization_type.name,
            offset=offset,
            num_bytes=math.prod(dims) // block_elements * block_bytes,
        )

    def _value(self, value_type: int) -> Any:
        if value_type == _STRING:
            return self._string()
        if value_type != _ARRAY:
            return self._scalar(_SCALARS[value_type])
        element_type, length = self._scalar("I"), self._scalar("Q")
        if length <= MAX_KEPT_ARRAY:
            return [self._value(element_type) for _ in range(length)]
        if element_type == _STRING:
            for _ in range(length):
                skipped_bytes = self._scalar("Q")
                self._position += skipped_bytes
        else:
            self._position += length * struct.calcsize("<" + _SCALARS[element_type])
        return None

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._map, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._map[self._position : self._position + length]
        if len(raw) != length:
            raise ValueError("a string runs past the end")
        self._position += length
        return raw.decode("utf-8")


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading a GGUF file needs the gguf package: pip install 'halfbyte[gguf]'") from error
    return gguf
