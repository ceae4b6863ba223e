"""Numbers of 8 bits in plain torch: what the kernels of `halfbyte.kernels.e4m3` do, and which cards multiply them."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# Ada; its and later tensor cores multiply e4m3.
MIN_CAPABILITY = (8, 9)


def why_no_fp8(device: torch.device) -> str | None:
    """Return why a device multiplies no e4m3, or None."""
    if device.type != "cuda":
        return f"{device.type.upper()}s multiply no fp8"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} multiplies no fp8: it has compute capability {capability[0]}.{capability[1]}, fp8 came with 8.9"


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two s with `largest` / s <= 448 of each element, fp32, at least 2^-100."""
    exponent = ((largest.contiguous().view(torch.int32) + 0x1FFFFF) >> 23).sub_(8).clamp_(min=27)
    return (exponent << 23).view(torch.float32)


def encode(x: torch.Tensor) -> torch.Tensor:
    """Return the e4m3 nearest to each fp32 number; beyond 448 that is 448."""
    return x.clamp(-LARGEST, LARGEST).to(FP8)
