"""Quantise a weight to 4 bits in the same format, with regard to what it multiplies.

Where the inputs of a layer are known, rounding one column can be made up for by those that come after it: GPTQ, on this
format's grid and with its scales.

    H = X' X + damping        e_j = (w_j - v_j) / U_jj        w_k -= e_j U_jk for k > j        U' U = inverse(H)

v is the value of the nearest code, for scales as they are restored: double quantisation has rounded them. What is
written reads like any other tensor of the format. Plain torch on any device.

Source: Frantar et al., GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import torch

from halfbyte.ops.quantize_4bit import SEARCH_SCALE, SMALLEST_ABSMAX, quantize_absmax_reference
from halfbyte.quant.codebooks import codebook_values, dynamic_map, search_table, sorted_codes
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor, QuantSpec

# B blocks, E elements of a block, O out_features, D in_features, C columns at once

# Of the mean of the diagonal of H.
DAMPING = 0.01
# Columns whose errors are handed on together to all that come after them.
COLUMNS_AT_ONCE = 64


def quantize_4bit_compensated(
    weight_OD: torch.Tensor, hessian_DD: torch.Tensor, spec: QuantSpec, *, scale_share: float = 1.0
) -> QuantizedTensor:
    """Quantise a weight so that its products with the inputs it was calibrated on err least.

    Args:
        weight_OD: fp32, fp16 or bf16; not changed.
        hessian_DD: X' X of the inputs, fp32, on the weight's device.
        spec: Codebook, block size, double quantisation.
        scale_share: Scales of blocks, as shares of absmax.
    """
    num_rows, width = weight_OD.shape
    work_OD = weight_OD.detach().float().clone()
    factor_DD = _inverse_factor(hessian_DD)
    padding = -work_OD.numel() % spec.block_size
    blocks_BE = torch.nn.functional.pad(work_OD.view(-1), (0, padding)).view(-1, spec.block_size)
    scales = _Scales(blocks_BE.abs().amax(dim=1) * scale_share, spec)
    values = codebook_values(spec.codebook, weight_OD.device)
    codes_OD = torch.empty(num_rows, width, dtype=torch.uint8, device=weight_OD.device)
    # Blocks run over the flattened weight: a row may begin within one.
    first_O = torch.arange(num_rows, device=weight_OD.device) * width
    for columns in range(0, width, COLUMNS_AT_ONCE):
        end = min(columns + COLUMNS_AT_ONCE, width)
        errors_OC = torch.empty(num_rows, end - columns, device=weight_OD.device)
        for column in range(columns, end):
            divisor_O = scales.divisor_B[(first_O + column) // spec.block_size]
            w_O = work_OD[:, column]
            codes_O = nearest_codes(w_O / divisor_O, spec.codebook)
            codes_OD[:, column] = codes_O
            error_O = (w_O - values[codes_O.int()] * divisor_O) / factor_DD[column, column]
            errors_OC[:, column - columns] = error_O
            # Within these columns one by one, beyond them all at once.
            work_OD[:, column + 1 : end] -= error_O[:, None] * factor_DD[column, column + 1 : end]
        work_OD[:, end:] -= errors_OC @ factor_DD[columns:end, end:]
    codes = codes_OD.view(-1)
    return scales.record(torch.nn.functional.pad(codes, (0, codes.numel() % 2)), weight_OD, spec)


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


def _inverse_factor(hessian_DD: torch.Tensor) -> torch.Tensor:
    """Return U, upper triangular, with U' U the inverse of H."""
    hessian_DD = hessian_DD.float().clone()
    diagonal_D = hessian_DD.diagonal()
    # What no input has reached is rounded by itself.
    diagonal_D[diagonal_D == 0] = 1
    diagonal_D += DAMPING * diagonal_D.mean()
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(hessian_DD))
    return torch.linalg.cholesky(inverse_DD, upper=True)
