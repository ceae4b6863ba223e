"""Numbers of 8 bits on a GPU: the parts that kernels which write them share.

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: multiples of 2^-9 up to 2^-6, then 4 significant bits up to 448.
A row of them has a scale, the smallest power of two that brings its largest magnitude to 448 or less. Powers of two
cost no precision, because e4m3 is floating, and change no bit of what they multiply: only the rounding to e4m3 rounds.

Under the interpreter, which cuts off instead of rounding, codes are made by integer arithmetic and stored as bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def as_stored(codes: torch.Tensor) -> torch.Tensor:
    """Return a tensor of e4m3 as kernels take it."""
    return codes if codes.is_cuda else codes.view(torch.uint8)


@functools.cache
def scale_function() -> Any:
    """Return the scale of a largest magnitude, for kernels, which take it as an argument."""
    # Called from a kernel of another file, the interpreter looks for the language among this file's globals.
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def _scale(largest):
        """Return s, a power of two, with largest / s <= 448."""
        # A carry into the exponent wherever the mantissa is above 1.75.
        exponent = ((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        # So that 1 / s stays inside fp32.
        exponent = tl.maximum(exponent, 27)
        return (exponent << 23).to(tl.float32, bitcast=True)

    return _scale


@functools.cache
def inverse_function() -> Any:
    """Return 1 / s of a power of two, for kernels."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def _inverse(scale):
        return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    return _inverse


@functools.cache
def round_function() -> Any:
    """Return the e4m3 nearest to an fp32 of magnitude up to 448, as fp32, for kernels."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def _round(x):
        magnitude = tl.abs(x)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        # Adding 2^23 leaves whole numbers.
        tiny = ((magnitude * 512.0 + 8388608.0) - 8388608.0) * 0.001953125
        rounded = tl.where(magnitude < 0.015625, tiny, normal)
        return tl.where(x < 0, -rounded, rounded)

    return _round


@functools.cache
def encode_function() -> Any:
    """Return the conversion from fp32, of magnitude up to 448, to what is stored, for kernels."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def _encode(x, NATIVE):
        if NATIVE:
            code = x.to(tl.float8e4nv)
        else:
            sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
            magnitude = tl.abs(x)
            bits = magnitude.to(tl.int32, bitcast=True)
            normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
            tiny = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
            code = tl.minimum(tl.where(magnitude < 0.015625, tiny, normal), 126)
            code = (tl.where(magnitude == magnitude, code, 127) | sign).to(tl.uint8)
        return code

    return _encode
