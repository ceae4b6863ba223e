"""Cross-entropy of a language-model head without ever holding the logits of more than a few tokens.

    z = cap * tanh(logit_scale * (h W' + b) / cap)      loss = sum over trained tokens of (logsumexp(z) - z[label]) / N

Logits are the largest tensor of a training step: 2048 tokens times 49,152 words are 400 MB in fp32, several times
over with log-softmax and gradient. Here the head is applied to a chunk of tokens at a time, in one reused buffer, and
the gradient of the chunk is computed at once, in place of its logits:

    grad_z = softmax(z) - onehot(label)      grad_h = grad_z W      grad_W += grad_z' h      grad_b += sum grad_z

so the forward leaves the loss and the gradient of the hidden states, and the backward only multiplies by
grad_output / N. Not dividing by N earlier is what keeps fp16 gradients out of the subnormal numbers.

What lies between a chunk's two products is one kernel on a GPU (`halfbyte.kernels.cross_entropy`). In torch it is a
dozen elementwise passes in fp32, and there are two sizes, because products want many tokens and caches few: the passes
go over the chunk in blocks of a few tokens that stay in a CPU's own caches. On a GPU a block is the whole chunk.

Only tokens with a label touch the head. N (`num_items`) is the number of trained tokens of the whole accumulated
batch: with it the sum over micro-batches is the mean over tokens, however unevenly they are spread.

Dtypes: products in the dtype of the hidden states, softmax and loss in fp32, gradients of head weight and bias
accumulated in fp32. fp64 is taken by torch alone, and is fp64 throughout.

Price: a forward under grad computes the gradient even if no backward follows, so evaluate under no_grad. No second
derivative. Unless the caller says where the trained tokens are, finding them waits for the device once a call. Told
where they are, nothing waits, and a CUDA graph can capture the call and its backward.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from halfbyte.errors import BackendError
from halfbyte.kernels import cross_entropy as kernels
from halfbyte.ops.backend import resolve_backend

# T tokens, D model width, V vocabulary, C tokens of a chunk, B tokens of a block

IGNORED_LABEL = -100
# The logits of a chunk, in the compute dtype. With 49,152 words in bf16, 341 tokens: a product over 256 tokens takes
# 10% less time a token than one over 128, and 30% less than one over 32.
CPU_CHUNK_BYTES = 2**25
GPU_CHUNK_BYTES = 2**27
MIN_CHUNK_TOKENS = 128
# The logits of a block, in fp32.
BLOCK_BYTES_PER_THREAD = 2**20
# Rows of logits begin at multiples of so many elements, whatever the number of words.
ROW_MULTIPLE = 64
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OwnRows:
    """Rows of the head that are trained alone: they stand in place of its own, or behind them.

    z[:, ids] = h rows'      grad_h += grad_z[:, ids] rows      grad_rows = grad_z[:, ids]' h

    and what the product with the frozen rows of the same words would be counts nowhere.
    """

    ids_N: torch.Tensor
    """Words, int64, each once; those behind the head's own are all of them."""
    rows_ND: torch.Tensor
    """fp32, or the dtype of the head."""
    vocabulary: int
    """Words with those of `ids_N`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Logits:
    """How logits follow from hidden states, and what computes them."""

    chunk_tokens: int | Literal["auto"]
    softcap: float | None
    scale: float
    backend: str
    """As resolved."""


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
    own_rows: OwnRows | None = None,
    trained: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the summed cross-entropy of the trained tokens over `num_items`, in fp32.

    Args:
        hidden_TD: (tokens, width), what the head is applied to.
        head_weight_VD: (vocabulary, width).
        labels_T: (tokens,) int64, the word that each token should predict (already shifted); -100 where not trained.
        num_items: What the sum is divided by; the number of trained tokens unless given. A tensor is not waited for.
        chunk_tokens: Tokens whose logits exist at a time.
        softcap: Logits are squeezed into (-softcap, softcap), as Gemma 2 does.
        logit_scale: Factor of the logits, as Cohere and Granite have it.
        head_bias: (vocabulary,).
        own_rows: Rows that are trained while the head is frozen; not together with a bias.
        trained: Indices of the tokens whose label is not -100, int64 on the same device, each once, for callers that
            know them without asking the device. A captured graph wants as many at each replay: indices of tokens
            whose label is -100 may stand among them, any number of times, and change neither loss nor gradients, but
            cost as much as trained ones.
        backend: "auto" (by device and dtype), "torch" or "triton".

    Raises:
        BackendError: The backend is unknown, or cannot run on the device or with the dtype.
    """
    backend = _resolve_backend("chunked_cross_entropy", backend, hidden_TD)
    logits = _Logits(chunk_tokens=chunk_tokens, softcap=softcap, scale=logit_scale, backend=backend)
    if num_items is None and trained is not None:
        num_items = (labels_T[trained] != IGNORED_LABEL).sum().clamp(min=1)
    if trained is None:
        trained = find_trained_tokens(labels_T)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        rows_ND = None if own_rows is None else own_rows.rows_ND
        total = _ChunkedCrossEntropy.apply(
            hidden_TD, head_weight_VD, head_bias, rows_ND, own_rows, labels_T, trained, logits, torch.is_grad_enabled()
        )
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
    own_rows: OwnRows | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the cross-entropy of each token, (tokens,) fp32 and 0 where not trained, for evaluation: no gradient.

    The arguments are those of `chunked_cross_entropy`.
    """
    backend = _resolve_backend("chunked_token_losses", backend, hidden_TD)
    logits = _Logits(chunk_tokens=chunk_tokens, softcap=softcap, scale=logit_scale, backend=backend)
    trained = find_trained_tokens(labels_T)
    losses_T = torch.zeros(labels_T.shape, dtype=torch.float32, device=labels_T.device)
    with torch.no_grad(), torch.autocast(hidden_TD.device.type, enabled=False):
        head = _Head(head_weight_VD, head_bias, hidden_TD.dtype, logits, own_rows)
        for tokens in head.split(trained):
            losses_T[tokens] = head.losses(hidden_TD[tokens], labels_T[tokens]).float()
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


def _resolve_backend(op: str, backend: str, hidden_TD: torch.Tensor) -> str:
    if hidden_TD.dtype not in KERNEL_DTYPES:
        if backend == "triton":
            raise BackendError(f"{op} takes no {hidden_TD.dtype} with backend 'triton'; pass backend='torch'")
        if backend == "auto":
            backend = "torch"
    return resolve_backend(op, backend, hidden_TD.device)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_weight_VD: torch.Tensor,
        head_bias: torch.Tensor | None,
        rows_ND: torch.Tensor | None,
        own_rows: OwnRows | None,
        labels_T: torch.Tensor,
        trained: torch.Tensor,
        logits: _Logits,
        is_grad_enabled: bool,
    ) -> torch.Tensor:
        # needs_input_grad tells what the inputs want, under no_grad too.
        needs = [need and is_grad_enabled for need in ctx.needs_input_grad[:4]]
        need_hidden, need_weight, need_bias, need_rows = needs
        head = _Head(head_weight_VD, head_bias, hidden_TD.dtype, logits, own_rows)
        if need_rows and rows_ND is not None:
            head.grad_rows = torch.zeros_like(rows_ND, dtype=head.sum_dtype)
        if need_weight:
            head.grad_weight = torch.zeros_like(head.weight_VD, dtype=head.sum_dtype)
        if need_bias and head.bias is not None:
            head.grad_bias = torch.zeros_like(head.bias)
        all_trained = trained.numel() == labels_T.numel()
        hidden, labels = (t if all_trained else t[trained] for t in (hidden_TD, labels_T))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        total = torch.zeros((), dtype=head.sum_dtype, device=hidden.device)
        start = 0
        for tokens in head.split(trained):
            rows = slice(start, start + tokens.numel())
            start = rows.stop
            total += head.losses(hidden[rows], labels[rows], differentiate=any(needs)).sum()
            if need_hidden or need_weight or need_rows:
                head.multiply_back(hidden[rows], out=None if grad_hidden is None else grad_hidden[rows])
        ctx.save_for_backward(trained, grad_hidden, head.grad_weight, head.grad_bias, head.grad_rows)
        ctx.hidden_shape = hidden_TD.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[Any, ...]:
        trained, grad_hidden, *grads = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total
            if trained.numel() != ctx.hidden_shape[0]:
                grad_hidden = grad_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, trained, grad_hidden)
        return grad_hidden, *(None if g is None else g * grad_total for g in grads), None, None, None, None, None


class _Head:
    """The head of one call: its weight in the compute dtype, buffers for one chunk, and sums of its gradients."""

    def __init__(
        self,
        weight_VD: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        logits: _Logits,
        own_rows: OwnRows | None,
    ) -> None:
        if own_rows is not None and bias is not None:
            raise ValueError("own rows of a head with a bias are not provided for")
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.weight_VD = weight_VD.detach().to(dtype)
        self.own_rows = own_rows
        self.rows_ND = None if own_rows is None else own_rows.rows_ND.detach().to(dtype)
        self.vocabulary = weight_VD.shape[0] if own_rows is None else own_rows.vocabulary
        self.bias = None if bias is None else bias.detach().to(self.sum_dtype)
        self.logits = logits
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None
        self.grad_rows: torch.Tensor | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def split(self, trained: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the trained tokens in chunks of nearly equal size."""
        num_chunks = -(-trained.numel() // self._choose_chunk_tokens())
        return trained.tensor_split(num_chunks) if num_chunks else ()

    def losses(self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, *, differentiate: bool = False) -> torch.Tensor:
        """Return the losses of a chunk and, to differentiate, leave the gradient of its product in the buffer.

        Args:
            hidden_CD: Hidden states of the chunk.
            labels_C: Its labels. Where -100, loss and gradient are 0.
            differentiate: Also add to the gradient of the bias, where that is wanted.
        """
        product_CV = self._take("product", hidden_CD.shape[0], self.weight_VD.dtype)
        torch.mm(hidden_CD, self.weight_VD.T, out=product_CV[:, : self.weight_VD.shape[0]])
        if self.own_rows is not None and self.rows_ND is not None:
            product_CV.index_copy_(1, self.own_rows.ids_N, hidden_CD @ self.rows_ND.T)
        if self.logits.backend == "triton":
            return self._soften_fused(product_CV, labels_C, differentiate)
        block_tokens = self._choose_block_tokens()
        blocks = zip(product_CV.split(block_tokens), labels_C.split(block_tokens), strict=True)
        return torch.cat([self._soften(product_BV, labels_B, differentiate) for product_BV, labels_B in blocks])

    def multiply_back(self, hidden_CD: torch.Tensor, *, out: torch.Tensor | None) -> None:
        """Write the gradient of the hidden states of the chunk to `out`, and add to those of weight and rows."""
        grad_CV = self._take("product", hidden_CD.shape[0], self.weight_VD.dtype)
        own_CN = None
        if self.own_rows is not None:
            own_CN = grad_CV.index_select(1, self.own_rows.ids_N)
            grad_CV = grad_CV.index_fill_(1, self.own_rows.ids_N, 0)[:, : self.weight_VD.shape[0]]
        if out is not None:
            torch.mm(grad_CV, self.weight_VD, out=out)
            if own_CN is not None and self.rows_ND is not None:
                out.addmm_(own_CN, self.rows_ND)
        if self.grad_weight is not None:
            self.grad_weight += grad_CV.T @ hidden_CD
        if self.grad_rows is not None and own_CN is not None:
            self.grad_rows += own_CN.T @ hidden_CD

    def _soften_fused(self, product_CV: torch.Tensor, labels_C: torch.Tensor, differentiate: bool) -> torch.Tensor:
        """Do what `_soften` does in one launch; the gradient of the bias is the sum of what was stored."""
        losses_C = torch.empty(labels_C.shape, dtype=torch.float32, device=labels_C.device)
        kernels.cross_entropy(
            product_CV,
            labels_C.contiguous(),
            losses_C,
            bias_V=self.bias,
            scale=self.logits.scale,
            softcap=self.logits.softcap,
            ignored_label=IGNORED_LABEL,
            differentiate=differentiate,
        )
        if differentiate and self.grad_bias is not None:
            self.grad_bias += product_CV.sum(dim=0, dtype=self.sum_dtype)
        return losses_C

    def _soften(self, product_BV: torch.Tensor, labels_B: torch.Tensor, differentiate: bool) -> torch.Tensor:
        """Return the losses of a block and, to differentiate, turn its product into the gradient of it."""
        num_tokens, softcap, scale = product_BV.shape[0], self.logits.softcap, self.logits.scale
        z_BV, ignored_B1 = product_BV, labels_B[:, None] == IGNORED_LABEL
        labels_B1 = labels_B[:, None].masked_fill(ignored_B1, 0)
        if z_BV.dtype != self.sum_dtype:
            z_BV = self._take("logits", num_tokens, self.sum_dtype).copy_(product_BV)
        if self.bias is not None:
            z_BV.add_(self.bias)
        if softcap is not None:
            z_BV.mul_(scale / softcap).tanh_()
            slope_BV = torch.mul(z_BV, z_BV, out=self._take("slope", num_tokens, self.sum_dtype)).neg_().add_(1)
            z_BV.mul_(softcap)
        elif scale != 1:
            z_BV.mul_(scale)
        largest_B1 = z_BV.amax(dim=1, keepdim=True)
        label_B1 = z_BV.gather(1, labels_B1)
        sum_B1 = z_BV.sub_(largest_B1).exp_().sum(dim=1, keepdim=True)
        losses_B1 = (sum_B1.log() + (largest_B1 - label_B1)).masked_fill_(ignored_B1, 0)
        if differentiate:
            scale_B1 = torch.full_like(sum_B1, scale).masked_fill_(ignored_B1, 0)
            z_BV.mul_(scale_B1 / sum_B1).scatter_add_(1, labels_B1, -scale_B1)
            if softcap is not None:
                z_BV.mul_(slope_BV)
            if self.grad_bias is not None:
                self.grad_bias += z_BV.sum(dim=0)
            if z_BV is not product_BV:
                product_BV.copy_(z_BV)
        return losses_B1.squeeze(1)

    def _take(self, key: str, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape[0] < num_tokens:
            stride = self.vocabulary
            if self.own_rows is not None:
                stride = -(-stride // ROW_MULTIPLE) * ROW_MULTIPLE
            buffer = torch.empty(num_tokens, stride, dtype=dtype, device=self.weight_VD.device)
            self._buffers[key] = buffer
        return buffer[:num_tokens, : self.vocabulary]

    def _choose_chunk_tokens(self) -> int:
        if self.logits.chunk_tokens != "auto":
            return self.logits.chunk_tokens
        budget_bytes = CPU_CHUNK_BYTES if self.weight_VD.device.type == "cpu" else GPU_CHUNK_BYTES
        return max(MIN_CHUNK_TOKENS, budget_bytes // (self.weight_VD.itemsize * self.weight_VD.shape[0]))

    def _choose_block_tokens(self) -> int:
        if self.weight_VD.device.type != "cpu":
            return self._choose_chunk_tokens()
        token_bytes = self.sum_dtype.itemsize * self.weight_VD.shape[0]
        return max(1, BLOCK_BYTES_PER_THREAD * torch.get_num_threads() // token_bytes)


def find_trained_tokens(labels_T: torch.Tensor) -> torch.Tensor:
    """Return the indices of the labels that are not -100."""
    return (labels_T != IGNORED_LABEL).nonzero().squeeze(1)
