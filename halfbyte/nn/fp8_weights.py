"""The frozen weights of a group of projections in products of fp8.

    y = [u, x] [B, W]'        grad_x = (grad_y s) (W / s)        s the scales of W's rows

All factors are e4m3, rounded just before they are multiplied: x and grad_y with a scale for each token, W with one for
each row. In the backward the sum is over W's rows, so their scales go into grad_y first. u and B take part with 8 bits
(see `quantize_rows_fp8`), so that an adapter's part is summed before anything is rounded to 16 bits.

W / s is expanded from 4 bits for every product, once in its own order and once transposed, into one buffer that all
groups share; it takes half the bytes of the 16-bit one.

Price: e4m3 keeps 4 significant bits, so a product errs by some 4% of its root mean square, as if of noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.ops.adapter_columns_fp8 import adapter_columns_fp8
from halfbyte.ops.dequantize_fp8 import dequantize_fp8, quantize_weight_fp8, row_scales
from halfbyte.ops.e4m3 import FP8, scale_of
from halfbyte.ops.product_fp8 import SIZE_MULTIPLE, product_fp8
from halfbyte.ops.quantize_rows_fp8 import quantize_rows_fp8
from halfbyte.ops.workspace import Workspace

# T tokens, D in_features, F out_features of the group, R ranks of the group, C = 3 R columns of adapters, K summed over

WEIGHT_BUFFER = "weight_fp8"


@dataclasses.dataclass(frozen=True, slots=True)
class _Scales:
    """Of the rows of frozen weights, which never change."""

    scale_F: torch.Tensor
    factor_F: torch.Tensor
    """The same in bf16, where powers of two are exact."""
    ones_D: torch.Tensor
    """Of the rows of the transposed weights."""


class Fp8Weights:
    """Products of activations and gradients with frozen weights that are stacked.

    Args:
        layers: The frozen layers, with the same in_features.
        workspace: Scratch buffers of the model.
    """

    def __init__(self, layers: Sequence[Linear4bit | nn.Linear], workspace: Workspace) -> None:
        self.layers, self.workspace = tuple(layers), workspace
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        sizes = {layer.out_features for layer in layers} | {self.in_features}
        assert all(size % SIZE_MULTIPLE == 0 for size in sizes), f"{sizes} are no multiples of {SIZE_MULTIPLE}"
        self._scales: _Scales | None = None

    def forward(self, x_TD: torch.Tensor, u_TR: torch.Tensor | None, B_FR: torch.Tensor | None) -> torch.Tensor:
        """Return y (T, F), a new tensor of the dtype of x; u and B are contiguous, None without adapters."""
        scale_F = self._find_scales(x_TD.device).scale_F
        columns = 0 if B_FR is None else 3 * B_FR.shape[1]
        codes_FK = self._take(WEIGHT_BUFFER, (self.out_features, columns + self.in_features), x_TD.device)
        if B_FR is not None:
            weight_scale_F, scale_F = scale_F, torch.empty_like(scale_F)
            adapter_columns_fp8(B_FR, weight_scale_F, codes_FC=codes_FK[:, :columns], scale_F=scale_F)
        row = 0
        for layer in self.layers:
            rows = slice(row, row + layer.out_features)
            _expand(layer, scale_F[rows], codes_FK[rows, columns:], is_transposed=False)
            row += layer.out_features
        y_TF = x_TD.new_empty(x_TD.shape[0], self.out_features)
        return self._multiply(x_TD, codes_FK, scale_F, y_TF, u_TR=u_TR)

    def backward(self, grad_y_TF: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """Write the gradient of x through the frozen weights to `out`, (T, D), and return it."""
        scales = self._find_scales(grad_y_TF.device)
        codes_DF = self._take(WEIGHT_BUFFER, (self.in_features, self.out_features), grad_y_TF.device)
        row = 0
        for layer in self.layers:
            rows = slice(row, row + layer.out_features)
            _expand(layer, scales.scale_F[rows], codes_DF[:, rows], is_transposed=True)
            row += layer.out_features
        return self._multiply(grad_y_TF, codes_DF, scales.ones_D, out, factor=scales.factor_F)

    def _find_scales(self, device: torch.device) -> _Scales:
        if self._scales is None or self._scales.scale_F.device != device:
            scale_F = torch.cat([_row_scales(layer) for layer in self.layers]).to(device)
            self._scales = _Scales(scale_F, scale_F.bfloat16(), torch.ones(self.in_features, device=device))
        return self._scales

    def _multiply(
        self,
        x_TK: torch.Tensor,
        codes_NE: torch.Tensor,
        scale_N: torch.Tensor,
        out: torch.Tensor,
        *,
        u_TR: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        num_tokens = x_TK.shape[0]
        codes_TE = self._take("input_fp8", (num_tokens, codes_NE.shape[1]), out.device)
        scale_T = self.workspace.take("input_fp8_scales", (num_tokens,), dtype=torch.float32, device=out.device)
        quantize_rows_fp8(x_TK, codes_TE=codes_TE, scale_T=scale_T, u_TR=u_TR, factor_D=factor)
        return product_fp8(codes_TE, codes_NE, scale_a_T=scale_T, scale_b_N=scale_N, out=out)

    def _take(self, key: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
        return self.workspace.take(key, shape, dtype=FP8, device=device)


def _row_scales(layer: Linear4bit | nn.Linear) -> torch.Tensor:
    if isinstance(layer, Linear4bit):
        return row_scales(layer.quantized)
    return scale_of(layer.weight.detach().float().abs().amax(1))


def _expand(layer: Linear4bit | nn.Linear, scale_F: torch.Tensor, codes: torch.Tensor, *, is_transposed: bool) -> None:
    if isinstance(layer, Linear4bit):
        dequantize_fp8(layer.quantized, scale_F, out=codes, is_transposed=is_transposed)
    else:
        quantize_weight_fp8(layer.weight.detach(), scale_F, out=codes, is_transposed=is_transposed)
