"""Quantise a weight to 4 bits in the same format, but with less error than by the largest value of each block.

Scales by squared error. `quantize_4bit` takes each block's largest magnitude for its scale, so that nothing is cut off.
A smaller scale cuts off a few numbers and brings all others closer to their codes. Here the scale of a block is the
best of a few shares of absmax and then, codes being chosen, the one that least squares gives:

    s = argmin sum_i (w_i - s v(w_i / s))^2        then twice        s = <w, v> / <v, v>

v(x) is the value of the code nearest to x. Codes are chosen at last for the scales as they are restored: double
quantisation has rounded them, and what is nearest has changed.

Errors compensated. Where it is known what a layer multiplies, rounding one column can be made up for by those that
come after it (GPTQ, on this format's grid and with its scales):

    H = X' X + damping        e_j = (w_j - v_j) / U_jj        w_k -= e_j U_jk for k > j        U' U = inverse(H)

Less error in a weight is not less error in a model: on SmolLM2-135M fitted scales, which cut off the largest weights,
end at a higher loss than absmax does, and compensated ones at a much lower one (docs/log.md).

Both give tensors that read like any others of the format. Plain torch on any device.

Sources: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import math

import torch

from halfbyte.errors import ConfigError
from halfbyte.ops.quantize_4bit import SEARCH_SCALE, SMALLEST_ABSMAX, quantize_absmax_reference
from halfbyte.quant.codebooks import codebook_values, dynamic_map, search_table, sorted_codes
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor, QuantSpec

# B blocks, E elements of a block, O out_features, D in_features

# Shares of absmax that are tried, and how often least squares follows.
SHARES = tuple(1.0 - 0.04 * step for step in range(8))
REFINEMENTS = 2
# Elements worked on at once.
CHUNK_ELEMENTS = 1 << 16
# Of the mean of the diagonal of H.
DAMPING = 0.01


def quantize_4bit_fitted(weight: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Quantise a weight with scales of least squared error.

    Args:
        weight: Any shape, fp32, fp16 or bf16; not changed.
        spec: Codebook, block size, double quantisation.

    Returns:
        The weight in 4 bits, on the weight's device.

    Raises:
        ConfigError: The weight is empty.
    """
    if weight.numel() == 0:
        raise ConfigError(f"cannot quantise an empty weight (shape {tuple(weight.shape)})")
    blocks_BE = _blocks(weight, spec)
    step = max(1, CHUNK_ELEMENTS // spec.block_size)
    chunks = blocks_BE.split(step)
    scale_B = torch.cat([fit_scales(chunk, spec.codebook) for chunk in chunks])
    scales = _Scales(scale_B, spec)
    codes = [
        nearest_codes(chunk / part[:, None], spec.codebook)
        for chunk, part in zip(chunks, scales.divisor_B.split(step), strict=True)
    ]
    return scales.record(torch.cat(codes).view(-1), weight, spec)


def quantize_4bit_compensated(
    weight_OD: torch.Tensor, hessian_DD: torch.Tensor, spec: QuantSpec, *, scale_share: float = 1.0
) -> QuantizedTensor:
    """Quantise a weight so that its products with the inputs it was calibrated on err least.

    Args:
        weight_OD: fp32, fp16 or bf16; not changed. Rows are whole blocks.
        hessian_DD: X' X of the inputs, fp32, on the weight's device.
        spec: Codebook, block size, double quantisation.
        scale_share: Scales of blocks, as shares of absmax.

    Raises:
        ConfigError: A row is not made of whole blocks.
    """
    num_rows, width = weight_OD.shape
    if width % spec.block_size:
        raise ConfigError(f"a row of {width} is not made of whole blocks of {spec.block_size}")
    work_OD = weight_OD.detach().float().clone()
    factor_DD = _inverse_factor(hessian_DD)
    scales = _Scales(_blocks(weight_OD, spec).abs().amax(dim=1) * scale_share, spec)
    divisor_OG = scales.divisor_B.view(num_rows, -1)
    values = codebook_values(spec.codebook, weight_OD.device)
    codes_OD = torch.empty(num_rows, width, dtype=torch.uint8, device=weight_OD.device)
    for first in range(0, width, spec.block_size):
        columns = slice(first, first + spec.block_size)
        errors_OE = torch.empty(num_rows, spec.block_size, device=weight_OD.device)
        divisor_O = divisor_OG[:, first // spec.block_size]
        for column in range(spec.block_size):
            place = first + column
            w_O = work_OD[:, place]
            codes_O = nearest_codes(w_O / divisor_O, spec.codebook)
            codes_OD[:, place] = codes_O
            error_O = (w_O - values[codes_O.int()] * divisor_O) / factor_DD[place, place]
            errors_OE[:, column] = error_O
            # Within the block column by column, beyond it all at once.
            rest = slice(place + 1, columns.stop)
            work_OD[:, rest] -= error_O[:, None] * factor_DD[place, rest]
        work_OD[:, columns.stop :] -= errors_OE @ factor_DD[columns, columns.stop :]
    return scales.record(codes_OD.view(-1), weight_OD, spec)


def fit_scales(blocks_BE: torch.Tensor, codebook: str) -> torch.Tensor:
    """Return the scale of each block that loses least, fp32 [B]; that of a block of zeros is 0."""
    absmax_B = blocks_BE.abs().amax(dim=1)
    best_B, least_B = absmax_B.clone(), torch.full_like(absmax_B, math.inf)
    for share in SHARES:
        scale_B = absmax_B * share
        _, error_B = _restore(blocks_BE, scale_B, codebook)
        better_B = error_B < least_B
        best_B, least_B = torch.where(better_B, scale_B, best_B), torch.where(better_B, error_B, least_B)
    for _ in range(REFINEMENTS):
        values_BE, _ = _restore(blocks_BE, best_B, codebook)
        power_B = values_BE.square().sum(1)
        scale_B = torch.where(power_B > 0, (blocks_BE * values_BE).sum(1) / power_B, best_B)
        _, error_B = _restore(blocks_BE, scale_B, codebook)
        better_B = error_B < least_B
        best_B, least_B = torch.where(better_B, scale_B, best_B), torch.where(better_B, error_B, least_B)
    return best_B


def nearest_codes(x: torch.Tensor, codebook: str) -> torch.Tensor:
    """Return the code of each number, uint8."""
    table = search_table(codebook, SEARCH_SCALE, x.device)
    x = x.nan_to_num(nan=0.0).clamp(-1, 1)
    bins = torch.add(x * table.scale, table.scale + 0.5).int()
    places = table.base[bins].int() + (x > table.threshold[bins])
    if codebook == "nf4":
        return places.to(torch.uint8)
    return sorted_codes(codebook, x.device)[places].to(torch.uint8)


class _Scales:
    """Scales of blocks as they are stored and as they are restored."""

    def __init__(self, scale_B: torch.Tensor, spec: QuantSpec) -> None:
        self.stored, self.group_scale, self.offset = scale_B, None, None
        restored_B = scale_B
        if spec.double_quant:
            self.offset = scale_B.mean()
            self.stored, self.group_scale = quantize_absmax_reference(scale_B, self.offset)
            groups = self.group_scale.repeat_interleave(ABSMAX_GROUP)[: scale_B.numel()]
            restored_B = dynamic_map(True, scale_B.device)[self.stored.int()] * groups + self.offset
        # Rounding may send the scale of a block of next to nothing to zero or below.
        self.divisor_B = torch.where(restored_B.abs() < SMALLEST_ABSMAX, SMALLEST_ABSMAX, restored_B)

    def record(self, codes: torch.Tensor, weight: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
        codes = codes[: weight.numel() + weight.numel() % 2]
        return QuantizedTensor(
            packed=codes[0::2] << 4 | codes[1::2],
            absmax=self.stored,
            absmax_scale=self.group_scale,
            absmax_offset=self.offset,
            codebook=spec.codebook,
            block_size=spec.block_size,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )


def _blocks(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    flat = weight.detach().reshape(-1).float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % spec.block_size)).view(-1, spec.block_size)


def _restore(blocks_BE: torch.Tensor, scale_B: torch.Tensor, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the codes that blocks get under some scales, and the squared error of each block."""
    codes_BE = nearest_codes(blocks_BE / scale_B.clamp(min=SMALLEST_ABSMAX)[:, None], codebook)
    values_BE = codebook_values(codebook, blocks_BE.device)[codes_BE.int()]
    return values_BE, torch.addcmul(blocks_BE, values_BE, scale_B[:, None], value=-1).square().sum(1)


def _inverse_factor(hessian_DD: torch.Tensor) -> torch.Tensor:
    """Return U, upper triangular, with U' U the inverse of H."""
    hessian_DD = hessian_DD.float().clone()
    diagonal_D = hessian_DD.diagonal()
    # What no input has reached is rounded by itself.
    diagonal_D[diagonal_D == 0] = 1
    diagonal_D += DAMPING * diagonal_D.mean()
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(hessian_DD))
    return torch.linalg.cholesky(inverse_DD, upper=True)
