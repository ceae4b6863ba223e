"""Cross-entropy of a language-model head without ever holding the logits of more than a few tokens.

    z = cap * tanh(logit_scale * (h W' + b) / cap)      loss = sum over trained tokens of (logsumexp(z) - z[label]) / N

Logits are the largest tensor of a training step: 2048 tokens times 49,152 words are 400 MB in fp32, several times
over with log-softmax and gradient. Here the head is applied to a chunk of tokens at a time, in one reused buffer, and
the gradient of the chunk is computed at once, in place of its logits:

    grad_z = softmax(z) - onehot(label)      grad_h = grad_z W      grad_W += grad_z' h      grad_b += sum grad_z

so the forward leaves the loss and the gradient of the hidden states, and the backward only multiplies by
grad_output / N. Not dividing by N earlier is what keeps fp16 gradients out of the subnormal numbers.

Only tokens with a label touch the head. N (`num_items`) is the number of trained tokens of the whole accumulated
batch: with it the sum over micro-batches is the mean over tokens, however unevenly they are spread.

Dtypes: products in the dtype of the hidden states, softmax and loss in fp32, gradients of head weight and bias
accumulated in fp32. A chunk is small enough for its logits to stay near the cache of a CPU, and large enough for the
head's weight, which is read twice a chunk, to be worth its traffic.

Price: a forward under grad computes the gradient even if no backward follows, so evaluate under no_grad. No second
derivative. Counting the trained tokens waits for the device once a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

# T tokens, D model width, V vocabulary, C tokens of a chunk

IGNORED_LABEL = -100
CPU_CHUNK_BYTES = 2**25
GPU_CHUNK_BYTES = 2**28
MIN_CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Logits:
    """How logits follow from hidden states."""

    chunk_tokens: int | Literal["auto"]
    softcap: float | None
    scale: float


def chunked_cross_entropy(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    num_items: float | torch.Tensor | None = None,
    chunk_tokens: int | Literal["auto"] = "auto",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy of the trained tokens over `num_items`, in fp32.

    Args:
        hidden_TD: (tokens, width), what the head is applied to.
        head_weight_VD: (vocabulary, width).
        labels_T: (tokens,) int64, the word that each token should predict (already shifted); -100 where not trained.
        num_items: What the sum is divided by; the number of trained tokens unless given.
        chunk_tokens: Tokens whose logits exist at a time.
        softcap: Logits are squeezed into (-softcap, softcap), as Gemma 2 does.
        logit_scale: Factor of the logits, as Cohere and Granite have it.
        head_bias: (vocabulary,).
    """
    logits = _Logits(chunk_tokens=chunk_tokens, softcap=softcap, scale=logit_scale)
    trained = _trained_tokens(labels_T)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        total = _ChunkedCrossEntropy.apply(hidden_TD, head_weight_VD, head_bias, labels_T[trained], trained, logits)
    if num_items is None:
        num_items = max(trained.numel(), 1)
    return total / num_items


def chunked_token_losses(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    chunk_tokens: int | Literal["auto"] = "auto",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of each token, (tokens,) fp32 and 0 where not trained, for evaluation: no gradient.

    The arguments are those of `chunked_cross_entropy`.
    """
    logits = _Logits(chunk_tokens=chunk_tokens, softcap=softcap, scale=logit_scale)
    trained = _trained_tokens(labels_T)
    losses_T = torch.zeros(labels_T.shape, dtype=torch.float32, device=labels_T.device)
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        head = _Head(head_weight_VD, head_bias, hidden_TD.dtype, logits)
        for tokens in head.chunks(trained):
            losses_T[tokens] = head.losses(hidden_TD[tokens], labels_T[tokens])
    return losses_T


def cross_entropy_reference(
    hidden_TD: torch.Tensor,
    head_weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    num_items: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    head_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed cross-entropy of the trained tokens over `num_items`, in plain torch with whole logits."""
    logits_TV = torch.nn.functional.linear(hidden_TD, head_weight_VD, head_bias) * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    num_trained = int((labels_T != IGNORED_LABEL).sum())
    total = torch.nn.functional.cross_entropy(logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (max(num_trained, 1) if num_items is None else num_items)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_weight_VD: torch.Tensor,
        head_bias: torch.Tensor | None,
        labels: torch.Tensor,
        trained: torch.Tensor,
        logits: _Logits,
    ) -> torch.Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        head = _Head(head_weight_VD, head_bias, hidden_TD.dtype, logits)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        hidden = hidden_TD if trained.numel() == hidden_TD.shape[0] else hidden_TD[trained]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        head.want_gradients(weight=need_weight, bias=need_bias)
        start = 0
        for tokens in head.chunks(trained):
            rows = slice(start, start + tokens.numel())
            start = rows.stop
            total += head.losses(hidden[rows], labels[rows]).sum()
            if need_hidden or need_weight or need_bias:
                head.differentiate(hidden[rows], labels[rows], None if grad_hidden is None else grad_hidden[rows])
        ctx.save_for_backward(trained, grad_hidden, head.grad_weight, head.grad_bias)
        ctx.hidden_shape = hidden_TD.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[Any, ...]:
        trained, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total
            if trained.numel() != ctx.hidden_shape[0]:
                grad_hidden = grad_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, trained, grad_hidden)
        grad_weight = None if grad_weight is None else grad_weight * grad_total
        grad_bias = None if grad_bias is None else grad_bias * grad_total
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _Head:
    """The head of one call: its weight in the compute dtype, and buffers for one chunk of logits."""

    def __init__(self, weight_VD: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, logits: _Logits) -> None:
        self.weight_VD = weight_VD.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().float()
        self.logits = logits
        self.num_words = weight_VD.shape[0]
        self.chunk_tokens = self._choose_chunk_tokens()
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def chunks(self, trained: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the trained tokens in chunks of nearly equal size."""
        num_chunks = -(-trained.numel() // self.chunk_tokens)
        return trained.tensor_split(num_chunks) if num_chunks else ()

    def want_gradients(self, *, weight: bool, bias: bool) -> None:
        """Prepare the fp32 sums of the gradients of weight and bias."""
        if weight:
            self.grad_weight = torch.zeros_like(self.weight_VD, dtype=torch.float32)
        if bias and self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias)

    def losses(self, hidden_CD: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
        """Return the losses of a chunk; leave softmax's numerators in the buffer of logits."""
        num_tokens = hidden_CD.shape[0]
        product_CV = self._take("product", num_tokens, self.weight_VD.dtype)
        torch.mm(hidden_CD, self.weight_VD.T, out=product_CV)
        z_CV = self._take("logits", num_tokens, torch.float32) if product_CV.dtype != torch.float32 else product_CV
        if z_CV is not product_CV:
            z_CV.copy_(product_CV)
        if self.bias is not None:
            z_CV.add_(self.bias)
        if self.logits.softcap is not None:
            z_CV.mul_(self.logits.scale / self.logits.softcap).tanh_()
            torch.mul(z_CV, z_CV, out=self._take("slope", num_tokens, torch.float32)).neg_().add_(1)
            z_CV.mul_(self.logits.softcap)
        elif self.logits.scale != 1:
            z_CV.mul_(self.logits.scale)
        largest_C1 = z_CV.amax(dim=1, keepdim=True)
        label_C1 = z_CV.gather(1, labels_C[:, None])
        self._sum_C1 = z_CV.sub_(largest_C1).exp_().sum(dim=1, keepdim=True)
        return (self._sum_C1.log() + (largest_C1 - label_C1)).squeeze(1)

    def differentiate(self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, grad_hidden: torch.Tensor | None) -> None:
        """Turn the numerators that `losses` left into gradients; write that of hidden, add those of weight and bias."""
        num_tokens = hidden_CD.shape[0]
        product_CV = self._take("product", num_tokens, self.weight_VD.dtype)
        z_CV = product_CV if product_CV.dtype == torch.float32 else self._take("logits", num_tokens, torch.float32)
        z_CV.div_(self._sum_C1)
        z_CV.scatter_add_(1, labels_C[:, None], torch.full_like(self._sum_C1, -1.0))
        if self.logits.softcap is not None:
            z_CV.mul_(self._take("slope", num_tokens, torch.float32))
        if self.logits.scale != 1:
            z_CV.mul_(self.logits.scale)
        if self.grad_bias is not None:
            self.grad_bias += z_CV.sum(dim=0)
        if z_CV is not product_CV:
            product_CV.copy_(z_CV)
        if grad_hidden is not None:
            torch.mm(product_CV, self.weight_VD, out=grad_hidden)
        if self.grad_weight is not None:
            self.grad_weight += product_CV.T @ hidden_CD

    def _take(self, key: str, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < num_tokens:
            buffer = torch.empty(num_tokens, self.num_words, dtype=dtype, device=self.weight_VD.device)
            self._buffers[key] = buffer
        return buffer[:num_tokens]

    def _choose_chunk_tokens(self) -> int:
        if self.logits.chunk_tokens != "auto":
            return self.logits.chunk_tokens
        budget_bytes = CPU_CHUNK_BYTES if self.weight_VD.device.type == "cpu" else GPU_CHUNK_BYTES
        return max(MIN_CHUNK_TOKENS, budget_bytes // (4 * self.num_words))


def _trained_tokens(labels_T: torch.Tensor) -> torch.Tensor:
    return (labels_T != IGNORED_LABEL).nonzero().squeeze(1)
