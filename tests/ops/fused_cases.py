"""Checks of the fused block's elementwise operations against autograd in fp64, for any backend and device.

The reference in plain torch, the kernels under the interpreter and the kernels on a GPU go through the same ones.
Tensors of a case lie inside wider buffers of NaN, which have to be NaN afterwards.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from halfbyte.kernels.adapter_stack import StackMember
from halfbyte.ops.adapter_inner import adapter_inner
from halfbyte.ops.adapter_stack import stack_adapters
from halfbyte.ops.counter_dropout import CounterDropout
from halfbyte.ops.rms_norm import rms_norm, rms_norm_backward
from halfbyte.ops.rotary import move_heads, rotate, rotate_
from halfbyte.ops.swiglu import swiglu, swiglu_backward_
from tests.oracles import assert_close

DROPOUT = CounterDropout(seed=1234567, probability=0.3)
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case runs."""

    backend: str = "torch"
    device: str = "cpu"
    roundings: int = 1
    """What the rounding of a result counts for: 2 where it is cut off."""
    spare: int = 16
    """Columns beside each row."""

    def put(self, t: torch.Tensor) -> torch.Tensor:
        """Return `t` inside a buffer with wider rows, and one more head."""
        shape = [*t.shape[:1], *(size + 1 for size in t.shape[1:-1]), t.shape[-1] + self.spare]
        buffer = torch.full(shape, torch.nan, dtype=t.dtype, device=self.device)
        view = buffer[:, : t.shape[1], : t.shape[2]] if t.ndim == 3 else buffer[:, : t.shape[1]]
        return view.copy_(t)

    def like(self, t: torch.Tensor) -> torch.Tensor:
        """Return an unwritten one."""
        return self.put(torch.full_like(t, torch.nan))

    def check(self, name: str, exact: torch.Tensor, actual: torch.Tensor, *, reduction_length: int = 1) -> None:
        """Compare, and look whether anything beside it was written."""
        # In fp32 the formula's own few roundings are as large as the last one; a GPU's exp errs by two units.
        roundings = 6 if actual.dtype == torch.float32 else self.roundings
        assert_close(name, exact, actual, dtype=actual.dtype, roundings=roundings, reduction_length=reduction_length)
        assert_untouched_beside(actual)


def assert_untouched_beside(view: torch.Tensor) -> None:
    if view._base is not None:
        assert int(view._base.isnan().sum()) == view._base.numel() - view.numel()


def expected_keep(shape: tuple[int, ...] | torch.Size, dropout: CounterDropout | None) -> torch.Tensor:
    """Return the mask in fp64, of numpy's own 32-bit arithmetic; all ones without dropout."""
    if dropout is None:
        return torch.ones(shape, dtype=torch.float64)
    h = np.arange(torch.Size(shape).numel(), dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(dropout.seed)
    h = (h ^ h >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    h = (h ^ h >> np.uint32(15)) * np.uint32(0x735A2D97)
    kept = (h ^ h >> np.uint32(15)) >= np.uint32(round(dropout.probability * 2**32))
    return torch.from_numpy(kept).view(shape).double()


def check_rms_norm(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    place: Place,
    *,
    dropout: CounterDropout | None = None,
    residual: bool = False,
    adapter: bool = False,
    addend: bool = False,
    out: str = "new",
) -> None:
    """Check both directions.

    Args:
        shape: Of x.
        dtype: Of x.
        place: Where.
        dropout: Of the result, and of the adapter's gradient.
        residual: Whether a gradient goes past the norm.
        adapter: Whether an adapter's gradient is apart.
        addend: Whether x is one of two terms.
        out: What the results overwrite: "new", "x" (forward), "grad_y" or "residual" (backward).
    """
    x = torch.randn(shape).mul_(torch.rand(*shape[:-1], 1) + 0.5).to(dtype)
    weight = torch.rand(shape[-1]).add_(0.5).to(dtype)
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]
    keep = expected_keep(shape, dropout)
    weight_there = weight.to(place.device)
    x_buffer, other = place.put(x), place.put(grads[0])
    y = x_buffer if out == "x" else place.like(x)
    terms = {"addend_": other if addend else None, "dropout": dropout}
    r = rms_norm(x_buffer, weight_there, eps=EPS, out=y, backend=place.backend, **terms)
    if addend:
        place.check("sum", x.double() + grads[0].double(), other)
        x = other.cpu().clone()
    width = shape[-1]
    x64 = x.clone().double().requires_grad_()
    y64 = torch.nn.functional.rms_norm(x64, shape[-1:], weight.double(), EPS)
    grad64 = grads[0].double() + (grads[1].double() * keep if adapter else 0)
    (exact,) = torch.autograd.grad(y64, x64, grad64)
    exact = exact + grads[2].double() if residual else exact
    r64 = torch.rsqrt(x64.detach().square().mean(-1) + EPS)
    assert_close("r", r64, r, dtype=torch.float32, roundings=4, reduction_length=width)
    place.check("y", y64.detach() * keep, y, reduction_length=width)
    assert not y.cpu()[keep == 0].any()

    grad_y, grad_adapter, past = (place.put(grad) for grad in grads)
    target = {"grad_y": grad_y, "residual": past}.get(out)
    grad_x = rms_norm_backward(
        grad_y,
        place.put(x),
        weight_there,
        r,
        out=place.like(x) if target is None else target,
        residual=past if residual else None,
        grad_adapter=grad_adapter if adapter else None,
        dropout=dropout,
        backend=place.backend,
    )
    assert target is None or grad_x is target
    place.check("grad_x", exact, grad_x, reduction_length=width)


def check_swiglu(
    shape: tuple[int, int],
    dtype: torch.dtype,
    place: Place,
    *,
    dropout: CounterDropout | None = None,
    adapter: bool = False,
    product: str = "new",
) -> None:
    """Check both directions; `product` is "none", "new" or "adapter", which it then overwrites."""
    gate_up = torch.randn(shape[0], 2 * shape[1]).mul_(2).to(dtype)
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    keep = expected_keep(shape, dropout)
    wide = gate_up.clone().double().requires_grad_()
    gate, up = wide.chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    (exact_grad,) = torch.autograd.grad(exact, wide, grads[0].double() + (grads[1].double() * keep if adapter else 0))

    gate_up = gate_up.to(place.device)
    out = place.like(grads[0])
    assert swiglu(gate_up, out_TF=out, backend=place.backend) is out
    place.check("product", exact.detach(), out)

    grad_p, grad_adapter = (place.put(grad) for grad in grads)
    again = {"none": None, "new": place.like(grads[0]), "adapter": grad_adapter}[product]
    grad = swiglu_backward_(
        gate_up,
        grad_p,
        product_TF=again,
        grad_adapter_TF=grad_adapter if adapter else None,
        dropout=dropout,
        backend=place.backend,
    )
    assert grad is gate_up
    for name, exact_half, half in zip(("gate", "up"), exact_grad.chunk(2, 1), grad.clone().chunk(2, 1), strict=True):
        place.check(f"grad of {name}", exact_half, half.clone())
    if again is not None:
        place.check("product again", exact.detach() * keep, again)


def check_rotate(
    shape: tuple[int, int, int], dtype: torch.dtype, place: Place, *, angle_dtype: torch.dtype | None = None
) -> None:
    """Check both directions; the formula is that of transformers."""
    x = torch.randn(shape).to(dtype)
    grad = torch.randn(shape).to(dtype)
    angles = torch.rand(shape[0], shape[2] // 2).mul_(6).repeat(1, 2)
    cos, sin = (t.to(angle_dtype or dtype) for t in (angles.cos(), angles.sin()))
    x64 = x.clone().double().requires_grad_()
    low, high = x64.chunk(2, dim=-1)
    exact = x64 * cos.double()[:, None] + torch.cat([-high, low], dim=-1) * sin.double()[:, None]
    (exact_grad,) = torch.autograd.grad(exact, x64, grad.double())

    cos, sin = cos.to(place.device), sin.to(place.device)
    turned = place.put(x)
    assert rotate_(turned, cos, sin, backend=place.backend) is turned
    place.check("turned", exact.detach(), turned)
    place.check("turned back", exact_grad, rotate_(place.put(grad), cos, sin, backward=True, backend=place.backend))
    # Rows of tokens, heads before tokens, as a kernel of attention leaves its gradients.
    rows = 1 if shape[0] % 2 else 2
    heads_first = grad.unflatten(0, (rows, -1)).transpose(1, 2).contiguous().to(place.device).transpose(1, 2)
    moved = place.like(grad)
    rotate(heads_first, cos, sin, out_TNH=moved, backward=True, backend=place.backend)
    place.check("turned back elsewhere", exact_grad, moved)
    move_heads(heads_first, out_TNH=moved, backend=place.backend)
    assert moved.cpu().equal(grad)
    assert_untouched_beside(moved)


def check_adapter_inner(
    shape: tuple[int, int], ranks: int, dtype: torch.dtype, place: Place, *, dropout: CounterDropout | None = None
) -> None:
    """Check the product, written twice."""
    x, A = torch.randn(shape).to(dtype), torch.randn(ranks, shape[1]).to(dtype)
    exact = 1.7 * (x.double() * expected_keep(shape, dropout)) @ A.double().T
    also = place.like(torch.zeros(shape[0], ranks, dtype=dtype))
    u = adapter_inner(place.put(x), A.to(place.device), scale=1.7, also_TR=also, dropout=dropout, backend=place.backend)
    # The reference in plain torch rounds the product before it is scaled.
    roundings = 6 if dtype == torch.float32 else place.roundings + (place.backend == "torch")
    assert_close("u", exact, u, dtype=dtype, roundings=roundings, reduction_length=shape[1])
    assert also.equal(u)
    assert_untouched_beside(also)


def check_stack_adapters(
    width: int, rows: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, place: Place
) -> None:
    """Check places and zeros; a projection of rank 0 has no adapter."""
    members, expected, first_row, first_rank = [], torch.zeros(sum(rows), sum(ranks) + 3, dtype=dtype), 0, 0
    for num_rows, rank in zip(rows, ranks, strict=True):
        A, B = torch.randn(rank, width), torch.randn(num_rows, rank)
        if rank:
            places = {"first_row": first_row, "first_rank": first_rank, "scaling": 0.5 + rank}
            members.append(StackMember(A.to(place.device), B.to(place.device), **places))
        expected[first_row : first_row + num_rows, first_rank : first_rank + rank] = (B * (0.5 + rank)).to(dtype)
        first_row, first_rank = first_row + num_rows, first_rank + rank
    stack, columns = torch.full((first_rank + 2, width), 7.0, dtype=dtype).to(place.device), place.like(expected)
    stack_adapters(members, A_RD=stack, columns_FR=columns, backend=place.backend)
    place.check("columns", expected.double(), columns)
    assert columns.cpu().ne(0).equal(expected.ne(0))
    place.check("stack", torch.cat([m.A_rD.double().cpu() for m in members]), stack[:first_rank].clone())
    assert (stack[first_rank:] == 7).all()
    stack_adapters(members, A_RD=None, columns_FR=columns, backend=place.backend)
    place.check("columns again", expected.double(), columns)
