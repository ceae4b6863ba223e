"""An embedding that lives in host memory, of which a GPU reads the rows it needs.

It saves the embedding's bytes on the device: 250 MiB for Llama-7B, 1 GiB for vocabularies of 128,000 words and 4096
numbers. A model whose head is the embedding has no use for it, since the head is read whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.memory.host_memory import allocate_pinned
from halfbyte.models.half_storage import HalfEmbedding
from halfbyte.ops.gather_rows import gather_rows


class HostEmbedding(nn.Embedding):
    """A frozen embedding in host memory whose rows are looked up from a device."""

    compute_device: torch.device
    compute_dtype: torch.dtype

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, dtype: torch.dtype, device: torch.device) -> HostEmbedding:
        """Copy an embedding into host memory.

        Args:
            embedding: The embedding, on any device.
            dtype: What its rows are given in.
            device: Where they are looked up.
        """
        made = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        weight_VD = embedding.weight.detach()
        if device.type == "cuda":
            home_VD = allocate_pinned(weight_VD.nbytes).view(weight_VD.dtype).view(weight_VD.shape)
        else:
            home_VD = torch.empty_like(weight_VD, device="cpu")
        made.weight = nn.Parameter(home_VD.copy_(weight_VD), requires_grad=False)
        made.compute_dtype, made.compute_device = dtype, device
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows of `input` (token ids, any shape) in the compute dtype."""
        return gather_rows(input, self.weight.detach(), dtype=self.compute_dtype)

    def to_compute_device(self) -> nn.Embedding:
        """Return a plain embedding on the device, in fp32: what can be trained."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = nn.Parameter(self.weight.detach().to(self.compute_device, torch.float32, copy=True))
        return plain

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HostEmbedding:
        """Stay where it lives, and as it is."""
        return self


def host_embedding_(model: PreTrainedModel, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Move the embedding of a model to host memory, and say whether that was possible.

    It is not if the embedding is also the head, or does more than to look up.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Others do more than look up, such as scaling.
    if type(embedding) not in (nn.Embedding, HalfEmbedding) or (head is not None and head.weight is embedding.weight):
        return False
    assert isinstance(embedding, nn.Embedding)
    model.set_input_embeddings(HostEmbedding.from_embedding(embedding, dtype=dtype, device=device))
    return True


def compute_device_of(model: nn.Module) -> torch.device:
    """Return where a model computes, which need not be where its embedding lives."""
    find = getattr(model, "get_input_embeddings", None)
    device = getattr(find() if find is not None else None, "compute_device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device
