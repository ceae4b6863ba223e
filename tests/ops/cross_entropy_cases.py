"""Checks of the loss's kernel by itself against fp64, under the interpreter and on a GPU."""

from __future__ import annotations

import dataclasses

import torch

from halfbyte.kernels.cross_entropy import CrossEntropyLaunch, cross_entropy
from halfbyte.ops.cross_entropy import IGNORED_LABEL
from tests.ops.fused_cases import Place, assert_untouched_beside
from tests.oracles import UNIT_ROUNDOFF, assert_close

ONE_WARP = CrossEntropyLaunch(num_warps=1)
# (tokens, words); a program of one warp takes 512 words of 16 bits at a time, 256 of 32.
SHAPES = [(1, 1), (2, 3), (9, 7), (5, 101), (1, 512), (4, 1100)]
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 3.0},
    "softcap and scale": {"softcap": 30.0, "scale": -2.5},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One call of the kernel."""

    shape: tuple[int, int]
    dtype: torch.dtype
    place: Place
    scale: float = 1.0
    softcap: float | None = None
    bias: bool = False
    size: float = 2.0
    """Of the logits' spread before scale; 0 where all are equal."""
    launch: CrossEntropyLaunch = ONE_WARP

    def make(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return product, labels, every fourth -100, and bias, on the CPU."""
        num_tokens, num_words = self.shape
        product = torch.randn(self.shape).mul_(self.size).add_(1.5).to(self.dtype)
        labels = torch.randint(num_words, (num_tokens,))
        labels[3::4] = IGNORED_LABEL
        return product, labels, torch.randn(num_words) if self.bias else None

    def run(
        self, product: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, *, differentiate: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses, and what is then where the product was."""
        product, device = self.place.put(product), self.place.device
        losses = torch.full(labels.shape, torch.nan, device=device)
        cross_entropy(
            product,
            labels.to(device),
            losses,
            bias_V=None if bias is None else bias.to(device),
            scale=self.scale,
            softcap=self.softcap,
            ignored_label=IGNORED_LABEL,
            differentiate=differentiate,
            launch=self.launch,
        )
        assert_untouched_beside(product)
        return losses.cpu(), product


def check_kernel(case: KernelCase) -> None:
    """Check losses and gradient; that without the gradient the product stays; on a GPU, that it is the same again."""
    product, labels, bias = case.make()
    losses, grad = case.run(product, labels, bias, differentiate=True)
    alone, untouched = case.run(product, labels, bias, differentiate=False)
    assert alone.equal(losses)
    assert untouched.cpu().equal(product)
    if grad.is_cuda:
        losses_again, grad_again = case.run(product, labels, bias, differentiate=True)
        assert losses_again.equal(losses)
        assert grad_again.equal(grad)
    ignored = labels == IGNORED_LABEL
    assert (losses[ignored] == 0).all()
    assert (grad.cpu()[ignored] == 0).all()

    leaf = product.double().requires_grad_()
    logits = (leaf if bias is None else leaf + bias.double()) * case.scale
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logits_of_labels = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    sums = torch.logsumexp(logits, dim=1).masked_fill(ignored, 0)
    exact = sums - logits_of_labels.masked_fill(ignored, 0)
    (softmax,) = torch.autograd.grad(sums.sum(), leaf, retain_graph=True)
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
    # In fp32: six roundings of the formula, as in the other kernels, and of each logit a few units of its own size
    # (bias, scale, softcap, difference to the largest), which the exponential makes relative ones. What cancels
    # against the label makes both count for more.
    size = float(logits.detach().abs().max())
    wide_units = 6 + 4 * size
    # A loss errs by units of the logits in it, and by one of the sum of exponentials.
    units = wide_units + wide_units / _rms(exact)
    words = case.shape[1]
    assert_close("losses", exact, losses, dtype=torch.float32, roundings=units, reduction_length=words)
    units = wide_units * max(1.0, _rms(softmax) / _rms(exact_grad))
    if case.dtype != torch.float32:
        units = case.place.roundings + units * UNIT_ROUNDOFF[torch.float32] / UNIT_ROUNDOFF[case.dtype]
    assert_close("gradient", exact_grad, grad, dtype=case.dtype, roundings=units, reduction_length=words)


def check_kernel_far_into_the_softcap(place: Place) -> None:
    """Logits so far out that tanh is 1: a loss as any other, and a gradient that vanishes."""
    product = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [60.0, 1e4, -60.0]])
    case = KernelCase(shape=(3, 3), dtype=torch.float32, place=place, softcap=3.0)
    losses, grad = case.run(product, torch.tensor([1, 2, 0]), None, differentiate=True)
    exact = torch.nn.functional.cross_entropy(
        3 * torch.tanh(product.double() / 3), torch.tensor([1, 2, 0]), reduction="none"
    )
    assert_close("losses", exact, losses, dtype=torch.float32, roundings=6)
    assert grad.abs().max() < 1e-15


def check_kernel_on_bad_rows(place: Place) -> None:
    """A label of -100 hides anything in its row; another one outside the vocabulary makes the loss infinite."""
    product = torch.randn(4, 5)
    product[0] = torch.nan
    case = KernelCase(shape=(4, 5), dtype=torch.float32, place=dataclasses.replace(place, spare=0))
    losses, grad = case.run(product, torch.tensor([IGNORED_LABEL, 5, -1, 4]), None, differentiate=True)
    assert losses[0] == 0
    assert (grad[0] == 0).all()
    assert losses[1:3].isinf().all()
    assert losses[3].isfinite()


def _rms(t: torch.Tensor) -> float:
    return max(float(t.detach().square().mean().sqrt()), 1e-300)
