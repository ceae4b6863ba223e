"""What a 4-bit weight is."""

from halfbyte.quant.tensor import QuantizedTensor, QuantSpec

__all__ = ["QuantSpec", "QuantizedTensor"]
