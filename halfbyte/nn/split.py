"""Adapters that begin from their layer's weight, and bases that hold what is left of it: PiSSA and LoftQ.

    W = taken + rest        taken = s B_0 A_0, of the adapter's rank        the base is Q(rest), Q the quantiser

PiSSA takes the largest singular values of W, with their vectors: B_0 = U sqrt(S / s), A_0 = sqrt(S / s) V'. The adapter
begins as what was taken, so it trains the directions in which W is largest, and the rest is smaller than W and is
quantised with less error. pissa_niter_N finds them by N iterations on a random subspace, in a fraction of the time of a
whole decomposition.

LoftQ takes what makes up for the quantiser. It goes round

    base = Q(W - taken)        s B A = the largest singular values of W - base        taken = s B A

and ends with the pair (base, B A) that is nearest to W. In the first round nothing is taken yet: with one round the
base is Q(W), the same as everybody's, and only the adapter's first values differ from LoRA's.

Everything is computed in fp32 from the weight as it is loaded, one layer at a time, and the result is a `Split`: the
adapter's first values, and what was taken out of the base.

Sources: Meng et al., PiSSA, arXiv 2404.02948; Li et al., LoftQ, arXiv 2310.08659. Unlike PEFT's, our LoftQ divides by
the scaling, so that Q + s B A approximates W whatever alpha is.
"""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.config.adapter_init import LOFTQ, PISSA
from halfbyte.errors import ConfigError
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.quant.tensor import QuantizedTensor, QuantSpec

# F out_features, D in_features, R rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """A product of an adapter's form, before its scaling."""

    A_RD: torch.Tensor
    B_FR: torch.Tensor

    def taken_from(self, weight_FD: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return weight - scaling B A in fp32."""
        return torch.addmm(weight_FD.float(), self.B_FR, self.A_RD, alpha=-scaling)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What becomes of one layer."""

    first: Factors
    """The adapter's first values."""
    taken: Factors | None
    """What the base lacks; None where it is the plain one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SplitOptions:
    """How the weight of one layer is split."""

    init: str
    rank: int
    scaling: float
    loftq_iterations: int = 1
    seed: int = 0
    """Of the random subspace of pissa_niter_N."""


@torch.no_grad()
def split_weight(
    weight_FD: torch.Tensor, quant: QuantSpec | None, options: SplitOptions
) -> tuple[torch.Tensor | QuantizedTensor, Split]:
    """Split the weight of a layer.

    Args:
        weight_FD: (out_features, in_features).
        quant: How the base is quantised; None for not at all.
        options: Which split.

    Returns:
        What the base holds, in 4 bits or in fp32, and what the adapter begins with.

    Raises:
        ConfigError: The rank is above what the layer has, or LoftQ is to make up for a quantisation that there is not.
    """
    if options.rank > min(weight_FD.shape):
        raise ConfigError(
            f"lora.rank is {options.rank}, and a weight of {weight_FD.shape[0]} x {weight_FD.shape[1]} has no more "
            f"than {min(weight_FD.shape)} singular values for {options.init} to begin from; set a lower rank"
        )
    if options.init == LOFTQ:
        if quant is None:
            raise ConfigError(
                "lora.init=loftq makes up for quantisation, and this layer is not quantised; leave it out of "
                "lora.targets, or set quant.enabled=true or another lora.init"
            )
        return _split_by_loftq(weight_FD, quant, options)
    match = PISSA.fullmatch(options.init)
    assert match is not None
    iterations = match["iterations"]
    taken = largest_part(weight_FD, options, iterations=None if iterations is None else int(iterations))
    return quantize_rest(weight_FD, taken, options.scaling, quant), Split(first=taken, taken=taken)


def quantize_rest(
    weight_FD: torch.Tensor, taken: Factors, scaling: float, quant: QuantSpec | None
) -> torch.Tensor | QuantizedTensor:
    """Return a weight without what was taken out of it, as the base holds it."""
    rest_FD = taken.taken_from(weight_FD, scaling)
    if quant is None:
        return rest_FD
    # Quantised in fp32, it is still the weight of a layer that is otherwise in the checkpoint's dtype.
    return dataclasses.replace(quantize_4bit(rest_FD, quant), dtype=weight_FD.dtype)


def largest_part(weight_FD: torch.Tensor, options: SplitOptions, *, iterations: int | None = None) -> Factors:
    """Return the largest singular values of a weight with their vectors, as A and B of equal size.

    Args:
        weight_FD: (out_features, in_features).
        options: Rank, scaling and seed.
        iterations: On a random subspace; None for the whole decomposition.
    """
    wide_FD = weight_FD.float()
    if iterations is None:
        U_FK, S_K, Vh_KD = torch.linalg.svd(wide_FD, full_matrices=False)
    else:
        devices = [wide_FD.device] if wide_FD.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(options.seed)
            U_FK, S_K, V_DK = torch.svd_lowrank(wide_FD, options.rank, niter=iterations)
        Vh_KD = V_DK.T
    root_R = (S_K[: options.rank] / options.scaling).sqrt()
    return Factors(
        A_RD=root_R[:, None] * Vh_KD[: options.rank],
        B_FR=U_FK[:, : options.rank] * root_R,
    )


def _split_by_loftq(
    weight_FD: torch.Tensor, quant: QuantSpec, options: SplitOptions
) -> tuple[torch.Tensor | QuantizedTensor, Split]:
    taken: Factors | None = None
    base: torch.Tensor | QuantizedTensor = quantize_4bit(weight_FD, quant)
    for number in range(options.loftq_iterations):
        if taken is not None:
            base = quantize_rest(weight_FD, taken, options.scaling, quant)
        assert isinstance(base, QuantizedTensor)
        first = largest_part(weight_FD.float() - dequantize_4bit(base, dtype=torch.float32), options)
        if number + 1 < options.loftq_iterations:
            taken = first
    return base, Split(first=first, taken=taken)
