"""Restore a weight from 4 bits as fp8, over scales of its rows.

    codes = e4m3(w / s)        or transposed, for the gradient of the input

w is what `dequantize_4bit` restores in fp32, rounded to e4m3 alone. A frozen weight's scales never change: codes have
no magnitude above 1, so absmax, the scale of a block, bounds its row. Products of e4m3 want both factors with the
dimension that is summed over innermost, so a gradient needs the weight transposed.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import dequantize_fp8 as kernels
from halfbyte.kernels.dequantize_4bit import Scales
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference, restore_absmax_reference
from halfbyte.ops.e4m3 import FP8, encode, scale_of
from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import QuantizedTensor

# F out_features, D in_features

# Rows of the weight that the transposing kernel puts into one word.
ROW_MULTIPLE = 4


def row_scales(q: QuantizedTensor) -> torch.Tensor:
    """Return scales with which each row of a weight fits e4m3, powers of two, fp32."""
    num_rows, width = q.shape
    if width % q.block_size == 0:
        return scale_of(restore_absmax_reference(q).abs().view(num_rows, -1).amax(1))
    return scale_of(dequantize_4bit_reference(q, dtype=torch.float32).abs().amax(1))


def dequantize_fp8(
    q: QuantizedTensor,
    row_scale_F: torch.Tensor,
    *,
    out: torch.Tensor,
    is_transposed: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Restore a weight as e4m3.

    Args:
        q: A matrix in 4 bits, (out_features, in_features), of an even width.
        row_scale_F: Powers of two with which its rows fit, fp32.
        out: e4m3 of that shape, or of the transposed one; rows of any stride. Transposed, on a GPU, their number, its
            columns' number and its address are multiples of 4.
        is_transposed: Which.
        backend: "auto", "torch" or "triton".

    Returns:
        `out`.

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    assert out.dtype == FP8
    assert tuple(out.shape) == (tuple(reversed(q.shape)) if is_transposed else tuple(q.shape))
    if resolve_backend("dequantize_fp8", backend, q.device) == "torch":
        return dequantize_fp8_reference(q, row_scale_F, out=out, is_transposed=is_transposed)
    assert q.shape[1] % 2 == 0
    assert not is_transposed or (q.shape[0] % ROW_MULTIPLE == 0 and out.stride(0) % ROW_MULTIPLE == 0)
    scales = Scales(q.absmax, q.absmax_scale, q.absmax_offset, dynamic_map(True, q.device))
    run = kernels.dequantize_fp8_transposed if is_transposed else kernels.dequantize_fp8
    run(q.packed, scales, codebook_values(q.codebook, q.device), row_scale_F, out, block_size=q.block_size)
    return out


def dequantize_fp8_reference(
    q: QuantizedTensor, row_scale_F: torch.Tensor, *, out: torch.Tensor, is_transposed: bool = False
) -> torch.Tensor:
    """Do the same: the definition, in plain torch on any device."""
    return quantize_weight_fp8(
        dequantize_4bit_reference(q, dtype=torch.float32), row_scale_F, out=out, is_transposed=is_transposed
    )


def quantize_weight_fp8(
    weight_FD: torch.Tensor, row_scale_F: torch.Tensor, *, out: torch.Tensor, is_transposed: bool = False
) -> torch.Tensor:
    """Do the same with a weight that is not in 4 bits."""
    codes_FD = encode(weight_FD.float() / row_scale_F[:, None]).view(torch.uint8)
    out.view(torch.uint8).copy_(codes_FD.T if is_transposed else codes_FD)
    return out
