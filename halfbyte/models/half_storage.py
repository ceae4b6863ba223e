"""Embedding and output head in 16 bits under a model that computes in 32.

On a CPU without 16-bit instructions products run in fp32, but the two largest matrices that stay unquantised need not
double in size for that: looking up rows and then widening them is exact and free, and the head's product

    y_TV = x_TD W_VD'

goes through a few rows of W at a time, widened into a scratch block that fits the cache, so that reading W from memory
costs half. Widening is exact: results equal those of an fp32 copy.

Shapes: T tokens, D width, V vocabulary, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from halfbyte.ops.workspace import Workspace

# 4 MB in fp32.
BLOCK_ELEMENTS = 1 << 20


class HalfEmbedding(nn.Embedding):
    """An embedding whose rows are widened after they are looked up."""

    compute_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, compute_dtype: torch.dtype) -> HalfEmbedding:
        """Make one that shares the weight of `embedding`."""
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        made.weight = embedding.weight
        made.compute_dtype = compute_dtype
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of `input` (token ids, any shape) in the compute dtype."""
        return super().forward(input).to(self.compute_dtype)


class HalfHead(nn.Linear):
    """An output head that multiplies in the dtype of its input."""

    workspace: Workspace

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, workspace: Workspace) -> HalfHead:
        """Make one that shares weight and bias of `linear`, its scratch block taken from `workspace`."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight = linear.weight
        made.bias = linear.bias
        made.workspace = workspace
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits of `input` (tokens, width) in its dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.weight.dtype == input.dtype:
            return nn.functional.linear(input, self.weight, bias)
        if self.weight.requires_grad:
            return nn.functional.linear(input, self.weight.to(input.dtype), bias)
        logits = _BlockedProduct.apply(input, self.weight, self.workspace)
        return logits if bias is None else logits + bias


class _BlockedProduct(torch.autograd.Function):
    """x W' for a frozen W in a narrower dtype than x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_VD: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        ctx.save_for_backward(weight_VD)
        ctx.workspace = workspace
        x_TD = x.reshape(-1, x.shape[-1])
        y_TV = x.new_empty(x_TD.shape[0], weight_VD.shape[0])
        for start, wide_BD in _widened(weight_VD, x.dtype, workspace):
            torch.mm(x_TD, wide_BD.t(), out=y_TV[:, start : start + wide_BD.shape[0]])
        return y_TV.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_y,) = grad_outputs
        (weight_VD,) = ctx.saved_tensors
        grad_y_TV = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x_TD = grad_y.new_zeros(grad_y_TV.shape[0], weight_VD.shape[1])
        for start, wide_BD in _widened(weight_VD, grad_y.dtype, ctx.workspace):
            grad_x_TD.addmm_(grad_y_TV[:, start : start + wide_BD.shape[0]], wide_BD)
        return grad_x_TD.view(*grad_y.shape[:-1], -1), None, None


def _widened(weight_VD: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the weight a block of rows at a time in a wider dtype, with the number of the block's first row."""
    num_rows, width = weight_VD.shape
    block_rows = min(num_rows, max(1, BLOCK_ELEMENTS // width))
    scratch_BD = workspace.take("widened_head", (block_rows, width), dtype=dtype, device=weight_VD.device)
    for start in range(0, num_rows, block_rows):
        rows_BD = weight_VD[start : start + block_rows]
        yield start, scratch_BD[: rows_BD.shape[0]].copy_(rows_BD)
