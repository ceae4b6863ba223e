"""Multiply two fp8 matrices whose rows have scales.

    y = (a b') * scale_a * scale_b        summed in fp32, rounded once

On a GPU this is the vendor's product, at one and a half times the speed of that of 16 bits on an H100. Elsewhere it is
the same numbers multiplied in fp32, which is for tests.
"""

from __future__ import annotations

import torch

from halfbyte.ops.e4m3 import FP8

# T tokens, K what is summed over, N columns of the result

# Products and row lengths that tensor cores take.
SIZE_MULTIPLE = 16
# Whether sums stay in the tensor cores, whose registers keep some 14 bits, all along K, or only a short way. That is
# little beside the 4 bits of the factors: losses of a real model show no difference (docs/log.md).
FAST_ACCUMULATION = True


def product_fp8(
    a_TK: torch.Tensor,
    b_NK: torch.Tensor,
    *,
    scale_a_T: torch.Tensor,
    scale_b_N: torch.Tensor,
    out: torch.Tensor,
    fast_accumulation: bool = FAST_ACCUMULATION,
) -> torch.Tensor:
    """Multiply.

    Args:
        a_TK: e4m3, contiguous.
        b_NK: e4m3, contiguous.
        scale_a_T: fp32.
        scale_b_N: fp32.
        out: (T, N), contiguous, overwritten; bf16 on a GPU, of any floating dtype elsewhere.
        fast_accumulation: See FAST_ACCUMULATION; nothing elsewhere.

    Returns:
        `out`.
    """
    assert a_TK.dtype == b_NK.dtype == FP8
    if a_TK.device.type != "cuda":
        product_TN = a_TK.float() @ b_NK.float().T
        return out.copy_(product_TN.mul_(scale_a_T[:, None]).mul_(scale_b_N))
    torch._scaled_mm(
        a_TK,
        b_NK.T,
        scale_a_T.view(-1, 1),
        scale_b_N.view(1, -1),
        out_dtype=out.dtype,
        use_fast_accum=fast_accumulation,
        out=out,
    )
    return out
