"""Quantise a weight to 4 bits."""

from __future__ import annotations

import torch

from halfbyte.quant.codebooks import dynamic_map, sorted_codes, thresholds
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor, QuantSpec


def quantize_4bit(weight: torch.Tensor, spec: QuantSpec, *, backend: str = "auto") -> QuantizedTensor:
    """Quantise a weight to 4 bits.

    Args:
        weight: Any shape, fp32, fp16 or bf16.
        spec: How to quantise.
        backend: "auto", "torch" or "triton".
    """
    return quantize_4bit_reference(weight, spec)


def quantize_4bit_reference(weight: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Quantise a weight to 4 bits, in plain torch."""
    flat = weight.detach().reshape(-1).float()
    padding = -flat.numel() % spec.block_size
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, spec.block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    if padding:
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    places = torch.bucketize(scaled, thresholds(spec.codebook).to(flat.device), out_int32=True)
    codes = sorted_codes(spec.codebook).to(flat.device)[places.view(-1)][: flat.numel()]
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=int(sorted_codes(spec.codebook)[7]))
    packed = codes[0::2] << 4 | codes[1::2]
    scale = offset = None
    if spec.double_quant:
        offset = absmax.mean()
        absmax, scale = quantize_absmax_reference(absmax - offset)
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        codebook=spec.codebook,
        block_size=spec.block_size,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def quantize_absmax_reference(centred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise absmax minus its mean to 8 bits in groups of 256; return codes and scale."""
    padding = -centred.numel() % ABSMAX_GROUP
    groups = torch.nn.functional.pad(centred, (0, padding)).view(-1, ABSMAX_GROUP)
    scale = groups.abs().amax(dim=1)
    reciprocal = torch.where(scale > 0, 1.0 / scale, 0.0)
    scaled = (groups * reciprocal[:, None]).clamp(-1, 1)
    index = (((scaled + 1.0) * 0.5).double() * 65535 + 0.5).float().to(torch.int32)
    grid = torch.arange(65536, dtype=torch.float32, device=centred.device) * 2.0 / 65535 - 1.0
    values = dynamic_map(True).to(centred.device)
    table = torch.bucketize(grid, (values[:-1] + values[1:]) * 0.5, out_int32=True).to(torch.uint8)
    codes = table[index.view(-1)].view_as(groups)
    codes = torch.where(scale[:, None] > 0, codes, 0).view(-1)[: centred.numel()]
    return codes.contiguous(), scale
