"""Multiply a few tokens by a 4-bit weight, or by a few of one input.

    y_p[t] = round(W_p x[t] + bias_p + B_p u[t, ranks of p] + add[t])        W = codebook[code] * absmax[block]

in fp32, rounded once. On a GPU the expanded weight is never written: decoding one token reads the packed bytes and the
scales and nothing else, a quarter of what a 16-bit weight costs to read, and a ninth of expanding it before. That pays
for up to MAX_TOKENS tokens; more are better served by expanding, see `expand_weight`.

`add` is what else belongs to y, such as a residual, kept apart until the one rounding. There is no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from halfbyte.errors import BackendError
from halfbyte.kernels import matvec_4bit as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.quant.codebooks import codebook_values, dynamic_map
from halfbyte.quant.tensor import QuantizedTensor

# T tokens, D in_features, F out_features (of all weights of a group), R ranks of a group, M the most of one weight

MAX_TOKENS = 8
MAX_MEMBERS = kernels.MAX_MEMBERS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MANY_ROWS = 8192
"""From which on programs of one warp and eight rows are enough to keep a large GPU busy."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OuterAdapters:
    """What a group's adapters are on their output side."""

    B_FM: torch.Tensor
    """The B of one weight below the other's, with zeros beside those of fewer ranks and where there is none."""
    first_ranks: tuple[int, ...]
    """Where in u each weight's ranks start."""

    @classmethod
    def stack(
        cls, Bs: Sequence[torch.Tensor | None], widths: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> OuterAdapters:
        """Stack the B of each weight, (width, ranks); None where it has no adapter."""
        most = max((B.shape[1] for B in Bs if B is not None), default=0)
        B_FM = torch.zeros(sum(widths), most, dtype=dtype, device=device)
        first_ranks, row, rank = [], 0, 0
        for B, width in zip(Bs, widths, strict=True):
            first_ranks.append(rank if B is not None else 0)
            if B is not None:
                B_FM[row : row + width, : B.shape[1]] = B
                rank += B.shape[1]
            row += width
        return cls(B_FM=B_FM, first_ranks=tuple(first_ranks))

    def part(self, first: int, last: int, widths: Sequence[int]) -> OuterAdapters:
        """Return those of some weights that follow each other."""
        start = sum(widths[:first])
        B_FM = self.B_FM[start : start + sum(widths[first:last])]
        return OuterAdapters(B_FM=B_FM, first_ranks=self.first_ranks[first:last])

    def multiply(self, u_TR: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
        """Return B u of each weight, fp32: the definition, in plain torch on any device."""
        parts = []
        for B_FM, first_rank in zip(self.B_FM.float().split(list(widths)), self.first_ranks, strict=True):
            u_TM = u_TR[:, first_rank : first_rank + B_FM.shape[1]]
            parts.append(u_TM @ B_FM[:, : u_TM.shape[1]].T)
        return parts


def matvec_4bit(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight.

    Args:
        x: (T, in_features), fp32, fp16 or bf16.
        q: (out_features, in_features); with the Triton kernel as `fits` says.
        bias: (out_features,).
        add: (T, out_features), added before the result is rounded.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (T, out_features) in the dtype of x, without a gradient.

    Raises:
        BackendError: The backend is unknown, cannot run on the weight's device, or does not fit.
    """
    if resolve_backend("matvec_4bit", backend, q.device) == "torch":
        return matvec_4bit_reference(x, q, bias, add=add)
    return matvec_4bit_triton(x, q, bias, add=add, launch=default_launch(x.shape[0], q.shape[0], x.dtype))


def matvec_4bit_reference(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, add: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight: the definition, in plain torch on any device."""
    y_TF = x.detach().float() @ dequantize_4bit_reference(q, dtype=torch.float32).T
    for term in (bias, add):
        if term is not None:
            y_TF += term.detach().float()
    return y_TF.to(x.dtype)


def fits(x: torch.Tensor, q: QuantizedTensor) -> bool:
    """Say whether the kernel takes them: few tokens, whole blocks in each row, packed bytes that start aligned."""
    return (
        x.ndim == 2
        and 0 < x.shape[0] <= MAX_TOKENS
        and x.dtype in DTYPES
        and x.device == q.device
        and len(q.shape) == 2
        and x.shape[1] == q.shape[1]
        and q.shape[1] % q.block_size == 0
        and q.packed.data_ptr() % 16 == 0
    )


def share_launch(weights: Sequence[QuantizedTensor]) -> bool:
    """Say whether weights of one input can be multiplied in one launch."""
    forms = {(w.codebook, w.block_size, w.absmax_scale is None, w.absmax.dtype, w.shape[1]) for w in weights}
    return len(weights) <= MAX_MEMBERS and len(forms) == 1


def matvec_4bit_group(
    x: torch.Tensor,
    weights: Sequence[QuantizedTensor],
    bias_F: torch.Tensor | None = None,
    *,
    adapters: OuterAdapters | None = None,
    u_TR: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """Multiply a few tokens by a few 4-bit weights, in one launch.

    Args:
        x: As `matvec_4bit`.
        weights: As `fits` and `share_launch` say.
        bias_F: Of all weights, one below the other.
        adapters: Of all weights.
        u_TR: (tokens, ranks), fp32, contiguous; their inner product, scaled.
        add: (tokens, out_features), for one weight.
        overlap: Whether the kernel may start while those before it still run, if they let it. Weights, bias and
            adapters must not have been written since the last launch that does not overlap.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        (tokens, out_features) of each, in the dtype of x, contiguous, without a gradient.

    Raises:
        BackendError: As `matvec_4bit`.
    """
    assert adapters is None or u_TR is not None
    assert add is None or len(weights) == 1
    if resolve_backend("matvec_4bit", backend, x.device) == "torch":
        return _group_reference(x, weights, bias_F, adapters, u_TR, add)
    launch = default_launch(x.shape[0], sum(w.shape[0] for w in weights), x.dtype)
    launch = dataclasses.replace(launch, overlap=overlap)
    return matvec_4bit_group_triton(x, weights, bias_F, adapters=adapters, u_TR=u_TR, add=add, launch=launch)


def _group_reference(
    x: torch.Tensor,
    weights: Sequence[QuantizedTensor],
    bias_F: torch.Tensor | None,
    adapters: OuterAdapters | None,
    u_TR: torch.Tensor | None,
    add: torch.Tensor | None,
) -> list[torch.Tensor]:
    widths = [w.shape[0] for w in weights]
    adds: Sequence[torch.Tensor | None] = [add] * len(weights)
    if adapters is not None and u_TR is not None:
        adds = [part if add is None else part + add.float() for part in adapters.multiply(u_TR, widths)]
    biases = [None] * len(weights) if bias_F is None else bias_F.split(widths)
    terms = zip(weights, biases, adds, strict=True)
    return [matvec_4bit_reference(x, w, bias, add=more) for w, bias, more in terms]


def default_launch(num_tokens: int, num_rows: int, dtype: torch.dtype) -> kernels.MatvecLaunch:
    """Return how the kernel is launched: measured on an H100, see docs/log.md.

    One token goes by shuffles, more by tensor cores, which take 16 bits. With many rows a program takes more of them;
    with few, more programs and warps share them, and load ahead.
    """
    many = num_rows >= MANY_ROWS
    if num_tokens == 1:
        rows, num_warps = (8, 1) if many else (4, 2)
        return kernels.MatvecLaunch(rows_per_program=rows, num_warps=num_warps, prefetch=not many)
    if dtype == torch.float32:
        return kernels.MatvecLaunch(rows_per_program=4, num_warps=4)
    ahead = not many or num_tokens <= 4
    return kernels.MatvecLaunch(lookup="tensor", rows_per_program=32 if many else 16, num_warps=4, prefetch=ahead)


@torch.no_grad()
def matvec_4bit_triton(
    x: torch.Tensor,
    q: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    launch: kernels.MatvecLaunch,
) -> torch.Tensor:
    """Multiply a few tokens by a 4-bit weight with the Triton kernel, launched as told."""
    return matvec_4bit_group_triton(x, [q], bias, add=add, launch=launch)[0]


@torch.no_grad()
def matvec_4bit_group_triton(
    x: torch.Tensor,
    weights: Sequence[QuantizedTensor],
    bias_F: torch.Tensor | None = None,
    *,
    adapters: OuterAdapters | None = None,
    u_TR: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    launch: kernels.MatvecLaunch,
) -> list[torch.Tensor]:
    """Multiply a few tokens by a few 4-bit weights with the Triton kernel, launched as told."""
    for q in weights:
        _require_fit(x, q)
    assert share_launch(weights)
    widths, num_tokens, device = [q.shape[0] for q in weights], x.shape[0], x.device
    assert bias_F is None or bias_F.shape == (sum(widths),), f"bias has shape {tuple(bias_F.shape)}, weights {widths}"
    assert add is None or (len(weights) == 1 and add.shape == (num_tokens, *widths)), f"add has shape {add.shape}"
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    first_ranks = (0,) * len(weights)
    B_FM = None
    if adapters is not None and adapters.B_FM.shape[1]:
        assert u_TR is not None
        assert u_TR.is_contiguous()
        B_FM, first_ranks = adapters.B_FM, adapters.first_ranks
    q = weights[0]
    out = torch.empty(num_tokens * sum(widths), dtype=x.dtype, device=device)
    kernels.matvec_4bit(
        x,
        [
            kernels.MatvecWeight(w.packed, w.absmax, w.absmax_scale, w.absmax_offset, w.shape[0], first_rank)
            for w, first_rank in zip(weights, first_ranks, strict=True)
        ],
        kernels.MatvecFormat(dynamic_map(True, device), codebook_values(q.codebook, device), q.block_size),
        out,
        terms=kernels.MatvecTerms(
            bias_F=None if bias_F is None else bias_F.contiguous(),
            B_FM=B_FM,
            u_TR=None if B_FM is None else u_TR,
            add_TF=None if add is None else add.contiguous(),
        ),
        launch=launch,
    )
    parts = out.split([num_tokens * width for width in widths])
    return [part.view(num_tokens, width) for part, width in zip(parts, widths, strict=True)]


def _require_fit(x: torch.Tensor, q: QuantizedTensor) -> None:
    if not fits(x, q):
        raise BackendError(
            f"matvec_4bit has no kernel for x {tuple(x.shape)} in {x.dtype} on {x.device} and a weight {q.shape} in "
            f"blocks of {q.block_size} on {q.device}: it takes 1 to {MAX_TOKENS} tokens in a dtype of at most 32 bits "
            "on the weight's device, whole blocks in a row, and packed bytes aligned to 16; use linear_4bit, or pass "
            "backend='torch'"
        )
