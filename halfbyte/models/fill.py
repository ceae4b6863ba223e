"""Put checkpoint tensors into a model that was built without weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.models.build import kept_in_fp32
from halfbyte.models.card_split import CardSplit
from halfbyte.models.placement import Placement
from halfbyte.models.staging import iter_on_device
from halfbyte.models.streaming import SlabFiller
from halfbyte.models.weight_splits import WeightSplits
from halfbyte.models.weights import LazyTensor
from halfbyte.nn import Linear4bit
from halfbyte.nn.convert import replace_module, workspace_of
from halfbyte.ops import quantize_4bit
from halfbyte.quant import QuantizedTensor, QuantSpec
from halfbyte.quant.bnb_format import load_quantized

# Parts of bitsandbytes' layout that only the host looks at.
_HOST_PARTS = (".quant_map", ".nested_quant_map")
_HOST_MARK = ".quant_state."


class ModelFiller:
    """A model being filled: what goes where, and in which form."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        spec: QuantSpec | None,
        targets: set[str],
        device: torch.device,
        dtype: torch.dtype,
        split: CardSplit | None = None,
        slabs: SlabFiller | None = None,
        keeps_views: bool = False,
        splits: WeightSplits | None = None,
    ) -> None:
        """Prepare to fill a model.

        Args:
            model: On the meta device.
            spec: How to quantise.
            targets: Paths of the linear layers that are to be in 4 bits, quantised here or by the checkpoint.
            device: Where to put everything, and where to quantise it.
            dtype: What products run in, and what unquantised weights are held in; embedding and head of a model in 4
                bits stay in 16 bits also where products run in fp32.
            split: Which blocks go on to another card from there.
            slabs: Takes the 4-bit weights of blocks that are to live in host memory.
            keeps_views: Whether tensors that are there in the form that is wanted stay views of the mapped files.
            splits: Takes out of weights what adapters begin from.
        """
        self.model = model
        self.device = device
        self.compute_dtype = dtype
        self._spec = spec
        self._targets = targets
        self.split = split
        self._slabs = slabs
        self._splits = splits
        self._split_paths = splits.prepare(model) if splits is not None else ()
        self.keeps_views = keeps_views
        self._quantized: dict[str, QuantizedTensor] = {}
        self._missing = set(model.state_dict())
        self._half_modules = _half_modules(model) if targets else set()
        fp32_names = kept_in_fp32(model, dtype)
        self._fp32 = re.compile(rf"(^|\.)({'|'.join(map(re.escape, fp32_names))})(\.|$)") if fp32_names else None

    def put(self, name: str, tensor: torch.Tensor, *, storage_dtype: torch.dtype) -> None:
        """Quantise or keep one parameter, which may be a view of a mapped file."""
        path, _, leaf = name.rpartition(".")
        self._missing.discard(name)
        if leaf == "weight":
            held = self._held(path, tensor)
            if isinstance(held, QuantizedTensor):
                self._keep_quantized(path, held)
                return
            tensor = held
        module = self.model.get_submodule(path)
        kept = self._kept(name, path, module, tensor, storage_dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = kept
        else:
            module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)

    def put_quantized(self, name: str, q: QuantizedTensor) -> None:
        """Take a weight that the checkpoint holds in 4 bits."""
        self._missing.discard(name)
        self._keep_quantized(name.removesuffix(".weight"), q)

    def missing(self) -> set[str]:
        """Return the parameters that nothing has filled, by name."""
        return set(self._missing)

    def finish_(self) -> None:
        """Replace each linear layer whose weight is in 4 bits."""
        for path, q in self._quantized.items():
            linear = cast(nn.Linear, self.model.get_submodule(path))
            replace_module(self.model, path, Linear4bit.from_quantized(q, linear.bias, workspace_of(self.model)))
        if self._slabs is not None:
            self._slabs.finish_(self.model)

    def _held(self, path: str, weight: torch.Tensor) -> torch.Tensor | QuantizedTensor:
        """Return what the model holds of a weight: in 4 bits if that is meant, without what an adapter begins from."""
        spec = self._spec if path in self._targets else None
        if self._splits is not None and path in self._split_paths:
            return self._splits.split(path, weight, spec)
        return weight if spec is None else quantize_4bit(weight, spec)

    def _card_of(self, path: str) -> torch.device:
        return self.device if self.split is None else self.split.card_of(path)

    def _keep_quantized(self, path: str, q: QuantizedTensor) -> None:
        self._quantized[path] = q = q.to(self._card_of(path))
        if self._slabs is not None:
            self._quantized |= self._slabs.take(path, q, siblings=self._count_targets)

    def _count_targets(self, block: str) -> int:
        return sum(target.startswith(f"{block}.") for target in self._targets)

    def _kept(
        self, name: str, path: str, module: nn.Module, tensor: torch.Tensor, storage_dtype: torch.dtype
    ) -> torch.Tensor:
        dtype = self.compute_dtype
        buffer = module._buffers.get(name.rpartition(".")[2])
        if buffer is not None:
            dtype = buffer.dtype
        elif not tensor.dtype.is_floating_point:
            dtype = tensor.dtype
        elif self._fp32 is not None and self._fp32.search(name):
            dtype = torch.float32
        elif path in self._half_modules and dtype == torch.float32 and storage_dtype.itemsize == 2:
            dtype = storage_dtype
        # Off the CPU the tensor is already a copy of its own.
        return tensor.to(self._card_of(name), dtype, copy=tensor.device.type == "cpu" and not self.keeps_views)


def fill_(
    filler: ModelFiller, placements: list[Placement], *, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Read every tensor and put it in place."""
    total_bytes = sum(tensor.num_bytes for placement in placements for tensor in placement.tensors)
    done_bytes = 0
    arriving = iter_on_device(_staged(placements), filler.device)
    for placement in placements:
        if placement.rule is not None:
            for name, tensor in placement.convert(filler.model).items():
                filler.put(name, tensor.to(filler.device), storage_dtype=tensor.dtype)
        elif placement.is_quantized:
            filler.put_quantized(placement.target, _take_quantized(placement, arriving, keeps_views=filler.keeps_views))
        else:
            filler.put(placement.target, next(arriving), storage_dtype=placement.tensors[0].storage_dtype)
        if on_progress is not None:
            done_bytes += sum(tensor.num_bytes for tensor in placement.tensors)
            on_progress(done_bytes, total_bytes)


def _staged(placements: list[Placement]) -> Iterator[LazyTensor]:
    """Yield what goes through the staging ring, in the order in which `fill_` takes it."""
    for placement in placements:
        if placement.rule is None:
            yield from (tensor for tensor in placement.tensors if not _is_host_part(placement, tensor))


def _take_quantized(placement: Placement, arriving: Iterator[torch.Tensor], *, keeps_views: bool) -> QuantizedTensor:
    parts = {}
    for tensor in placement.tensors:
        value = tensor.read() if _is_host_part(placement, tensor) else next(arriving)
        parts[tensor.name] = value.clone() if value.device.type == "cpu" and not keeps_views else value
    weight = next(tensor.name for tensor in placement.tensors if tensor.name.endswith("weight"))
    q = load_quantized(weight.removesuffix("weight"), parts)
    # Views of what was staged would keep the checkpoint's rounded-up copies alive.
    return dataclasses.replace(q, packed=q.packed.contiguous())


def _is_host_part(placement: Placement, tensor: LazyTensor) -> bool:
    return placement.is_quantized and (tensor.name.endswith(_HOST_PARTS) or _HOST_MARK in tensor.name)


def _half_modules(model: PreTrainedModel) -> set[str]:
    """Return the paths of embedding and head, if they are plain modules, whose weights may be narrower than fp32."""
    candidates = (model.get_input_embeddings(), model.get_output_embeddings())
    plain = {id(module) for module in candidates if type(module) in (nn.Embedding, nn.Linear)}
    if any(module is not None and id(module) not in plain for module in candidates):
        return set()
    return {path for path, module in model.named_modules() if id(module) in plain}
