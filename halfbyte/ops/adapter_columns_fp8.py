"""Bring the B of adapters to fp8, in columns beside the weights they share rows, and scales, with.

    columns = [hi, lo, hi]        hi = e4m3(B c / s)        lo = e4m3(B c / s - hi)
    s = the scale of the row's weights, or more where B asks for more

The counterpart of the columns that `quantize_rows_fp8` writes for u; see there.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import adapter_columns_fp8 as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.e4m3 import FP8, scale_of
from halfbyte.ops.quantize_rows_fp8 import SHARE_OF_B, split

# F out_features, R ranks, C = 3 R columns


def adapter_columns_fp8(
    B_FR: torch.Tensor,
    weight_scale_F: torch.Tensor,
    *,
    codes_FC: torch.Tensor,
    scale_F: torch.Tensor,
    backend: str = "auto",
) -> None:
    """Write codes and scales.

    Args:
        B_FR: (out_features, ranks), any floating dtype, contiguous.
        weight_scale_F: Scales with which the rows of the weights fit, powers of two, fp32.
        codes_FC: e4m3, rows of any stride, written.
        scale_F: fp32, contiguous, written.
        backend: "auto", "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    assert codes_FC.dtype == FP8
    assert codes_FC.shape == (B_FR.shape[0], 3 * B_FR.shape[1])
    if resolve_backend("adapter_columns_fp8", backend, B_FR.device) == "torch":
        adapter_columns_fp8_reference(B_FR, weight_scale_F, codes_FC=codes_FC, scale_F=scale_F)
        return
    assert B_FR.is_contiguous()
    kernels.adapter_columns_fp8(B_FR, weight_scale_F, codes_FC, scale_F, B_factor=SHARE_OF_B)


def adapter_columns_fp8_reference(
    B_FR: torch.Tensor, weight_scale_F: torch.Tensor, *, codes_FC: torch.Tensor, scale_F: torch.Tensor
) -> None:
    """Do the same: the definition, in plain torch on any device."""
    B_FR = B_FR.float() * SHARE_OF_B
    scale_F.copy_(torch.maximum(scale_of(B_FR.abs().amax(1)), weight_scale_F))
    high, low = split(B_FR / scale_F[:, None])
    codes_FC.view(torch.uint8).copy_(torch.cat([part.view(torch.uint8) for part in (high, low, high)], dim=1))
