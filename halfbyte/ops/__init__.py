"""What is computed: formula, plain-torch reference, autograd and choice of backend, one file an op."""

from halfbyte.ops.dequantize_4bit import dequantize_4bit, dequantize_4bit_reference
from halfbyte.ops.quantize_4bit import quantize_4bit, quantize_4bit_reference
from halfbyte.ops.workspace import Workspace

__all__ = [
    "Workspace",
    "dequantize_4bit",
    "dequantize_4bit_reference",
    "quantize_4bit",
    "quantize_4bit_reference",
]
