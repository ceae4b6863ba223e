"""The gated product of an MLP, forward and backward as two calls.

    p = silu(g) u        silu(g) = g sigmoid(g)

    grad_g = grad_p u (sigmoid(g) + silu(g) (1 - sigmoid(g)))        grad_u = grad_p silu(g)

g and u lie side by side in one matrix, as one product wrote them. p is never kept: the backward computes it again on
the way, for the adapter's gradients, and writes grad_g and grad_u over g and u. The arithmetic is fp32 with one
rounding each. p may go to a buffer with wider rows.

On a CPU a matrix passes through in chunks of rows that stay in the cores' caches.

Source: Shazeer, GLU variants, arXiv 2002.05202.
"""

from __future__ import annotations

import torch

from halfbyte.kernels import swiglu as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.ops.counter_dropout import CounterDropout, assert_kernel_takes, keep_mask_reference
from halfbyte.ops.row_chunks import is_chunked_on_cpu, row_chunks

# T tokens, F feed-forward width, G = 2 F: gate, then up


def swiglu(gate_up_TG: torch.Tensor, *, out_TF: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Write the gated product to `out_TF`, and return it.

    Args:
        gate_up_TG: (tokens, 2 x width), fp32, fp16 or bf16, contiguous.
        out_TF: (tokens, width), rows of any stride.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("swiglu", backend, gate_up_TG.device) == "torch":
        return (
            _swiglu_cpu(gate_up_TG, out_TF) if is_chunked_on_cpu(gate_up_TG) else swiglu_reference(gate_up_TG, out_TF)
        )
    assert_kernel_takes(gate_up_TG.chunk(2, dim=1)[0], out_TF)
    assert gate_up_TG.is_contiguous()
    kernels.swiglu(gate_up_TG, out_TF)
    return out_TF


def swiglu_backward_(
    gate_up_TG: torch.Tensor,
    grad_p_TF: torch.Tensor,
    *,
    product_TF: torch.Tensor | None = None,
    grad_adapter_TF: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Overwrite gate and up with their gradients, and return them.

    Args:
        gate_up_TG: (tokens, 2 x width), contiguous; read, then overwritten.
        grad_p_TF: (tokens, width), rows of any stride.
        product_TF: If given, written: the product again, with the elements of `dropout` (if any) set to zero, which
            is the adapter's input. Rows of any stride. May be `grad_adapter_TF`, which is read first.
        grad_adapter_TF: Added to grad_p, with the elements of `dropout`, if any, set to zero.
        dropout: Of the adapter's input.
        backend: "auto" (by device), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown or cannot run on the device.
    """
    if resolve_backend("swiglu_backward_", backend, gate_up_TG.device) == "torch":
        if is_chunked_on_cpu(gate_up_TG) and grad_adapter_TF is None and dropout is None:
            return _swiglu_backward_cpu_(gate_up_TG, grad_p_TF, product_TF)
        return swiglu_backward_reference_(
            gate_up_TG, grad_p_TF, product_TF=product_TF, grad_adapter_TF=grad_adapter_TF, dropout=dropout
        )
    assert_kernel_takes(gate_up_TG.chunk(2, dim=1)[0], grad_p_TF, product_TF, grad_adapter_TF)
    assert gate_up_TG.is_contiguous()
    kernels.swiglu_backward(gate_up_TG, grad_p_TF, product_TF, grad_adapter_TF, dropout)
    return gate_up_TG


def swiglu_reference(gate_up_TG: torch.Tensor, out_TF: torch.Tensor) -> torch.Tensor:
    """Write the gated product to `out_TF`: the definition, in plain torch on any device."""
    gate, up = _widen(gate_up_TG).chunk(2, dim=1)
    return out_TF.copy_(torch.nn.functional.silu(gate) * up)


def swiglu_backward_reference_(
    gate_up_TG: torch.Tensor,
    grad_p_TF: torch.Tensor,
    *,
    product_TF: torch.Tensor | None = None,
    grad_adapter_TF: torch.Tensor | None = None,
    dropout: CounterDropout | None = None,
) -> torch.Tensor:
    """Overwrite gate and up with their gradients: the definition, in plain torch on any device."""
    gate, up = _widen(gate_up_TG).chunk(2, dim=1)
    grad = _widen(grad_p_TF)
    keep = None if dropout is None else keep_mask_reference(grad.shape, dropout, device=grad.device)
    if grad_adapter_TF is not None:
        grad = grad + (grad_adapter_TF if keep is None else grad_adapter_TF * keep)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    if product_TF is not None:
        product_TF.copy_(silu * up)
        if keep is not None:
            product_TF.mul_(keep)
    return gate_up_TG.copy_(torch.cat([grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu], dim=1))


def _widen(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _swiglu_cpu(gate_up_TG: torch.Tensor, out_TF: torch.Tensor) -> torch.Tensor:
    for gate_up, out in row_chunks(gate_up_TG, out_TF):
        gate, up = gate_up.chunk(2, dim=1)
        # Widened first: arithmetic on two dtypes takes twice as long.
        out.copy_(torch.nn.functional.silu(gate.float()).mul_(up.float()))
    return out_TF


def _swiglu_backward_cpu_(
    gate_up_TG: torch.Tensor, grad_p_TF: torch.Tensor, product_TF: torch.Tensor | None
) -> torch.Tensor:
    others = (grad_p_TF,) if product_TF is None else (grad_p_TF, product_TF)
    for gate_up, grad_p, *product in row_chunks(gate_up_TG, *others):
        gate, up = gate_up.chunk(2, dim=1)
        wide_gate, wide_up, grad = gate.float(), up.float(), grad_p.float()
        # One exponential serves both, where silu and its own backward take one each.
        sigmoid = torch.sigmoid(wide_gate)
        silu = wide_gate * sigmoid
        slope = (sigmoid + silu).sub_(sigmoid.mul_(silu))
        for target in product:
            target.copy_(silu * wide_up)
        gate.copy_(slope.mul_(wide_up).mul_(grad))
        up.copy_(silu.mul_(grad))
    return gate_up_TG
