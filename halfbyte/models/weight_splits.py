"""Bases that lack what their adapters have begun from (PiSSA, LoftQ of several rounds): made, written and made again.

In training a layer is Q(W - s B_0 A_0) + s B A, see `halfbyte.nn.split`. Written is an ordinary adapter of twice the
rank for the base as everybody has it, as PEFT converts them:

    lora_A = [A; A_0]        lora_B = [B, -B_0]        the same scaling        s (B A - B_0 A_0) in all

It loads everywhere. Onto the original weights in 16 bits it is what was trained but for the quantisation error of the
rest; onto Q(W) it lacks what the rest is quantised better than the whole. Neither is what was trained to the last bit.

The file holds A_0 and B_0, though. So whoever quantises the original weights anyway can take them out again first, and
then has the very base of the training, with the adapter of the plain rank beside it. The file says in its metadata that
its ranks are two halves, and halfbyte's own ways of loading a run do so. Where Q runs on another kind of device than in
training, the products are summed in another order, and a weight in some hundred thousands gets the next code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn

from halfbyte.config.adapter_init import LOFTQ, begins_from_weights
from halfbyte.errors import ConfigError, FormatError
from halfbyte.models.adapter_files import Adapter, find_adapter_weights, open_adapter
from halfbyte.models.adapter_tensors import HALVES, halves
from halfbyte.models.safetensors_file import load_header
from halfbyte.nn import LoraSpec
from halfbyte.nn.attach import seed_of
from halfbyte.nn.lora import scaling_of
from halfbyte.nn.split import Factors, Split, SplitOptions, quantize_rest, split_weight
from halfbyte.nn.targets import Target, find_targets
from halfbyte.quant import QuantizedTensor, QuantSpec


class WeightSplits(Protocol):
    """What a model's weights are split into as they are loaded."""

    splits: dict[str, Split]
    """By the path of the layer, of those that are done."""
    note: str
    """For the report."""

    def prepare(self, model: nn.Module) -> Collection[str]:
        """Return the paths of the layers that are to be split, given the model without weights."""

    def split(self, path: str, weight_FD: torch.Tensor, quant: QuantSpec | None) -> torch.Tensor | QuantizedTensor:
        """Return what the base holds of a weight."""


class NewSplits:
    """Splits of a training that begins."""

    def __init__(self, spec: LoraSpec) -> None:
        self.splits: dict[str, Split] = {}
        self.note = f"adapters begin from the weights: {spec.init}"
        if spec.init == LOFTQ:
            self.note += f", rounds of quantising: {spec.loftq_iterations}"
        self._spec = spec
        self._targets: dict[str, Target] = {}

    def prepare(self, model: nn.Module) -> Collection[str]:
        """Return the paths of the layers that get an adapter; of none where adapters begin from zero."""
        if not begins_from_weights(self._spec.init):
            return ()
        self._targets = {target.path: target for target in find_targets(model, self._spec)}
        return self._targets.keys()

    def split(self, path: str, weight_FD: torch.Tensor, quant: QuantSpec | None) -> torch.Tensor | QuantizedTensor:
        """Return what the base holds of a weight."""
        spec, target = self._spec, self._targets[path]
        options = SplitOptions(
            init=spec.init,
            rank=target.rank,
            scaling=scaling_of(target.alpha, target.rank, rslora=spec.rslora),
            loftq_iterations=spec.loftq_iterations,
            seed=seed_of(spec.seed or 0, path),
        )
        try:
            held, self.splits[path] = split_weight(weight_FD, quant, options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        return held


class StoredSplits:
    """Splits as an adapter's file holds them."""

    def __init__(self, weights_file: Path) -> None:
        self.splits: dict[str, Split] = {}
        self.note = f"taken out of the weights again: what the adapters in {weights_file.parent.name} have begun from"
        self._weights_file = weights_file
        self._adapter: Adapter | None = None
        self._taken: Mapping[str, Factors] = {}

    def prepare(self, model: nn.Module) -> Collection[str]:
        """Read the adapter."""
        self._adapter, self._taken = halve_adapter(open_adapter(model, self._weights_file))
        return self._taken.keys()

    def split(self, path: str, weight_FD: torch.Tensor, quant: QuantSpec | None) -> torch.Tensor | QuantizedTensor:
        """Return what the base holds of a weight."""
        assert self._adapter is not None
        tensors, device = self._adapter.tensors, weight_FD.device
        taken = Factors(A_RD=self._taken[path].A_RD.to(device), B_FR=self._taken[path].B_FR.to(device))
        self.splits[path] = Split(first=Factors(A_RD=tensors.lora_A[path], B_FR=tensors.lora_B[path]), taken=taken)
        return quantize_rest(weight_FD, taken, self._adapter.scaling(path), quant)


def stored_splits(adapter: Path | None, quant: QuantSpec | None) -> StoredSplits | None:
    """Return what an adapter has begun from, where its base is to be made again.

    Args:
        adapter: Its folder or file.
        quant: How the base is quantised. One that is not is the same with all of it on top, but for roundings.
    """
    if adapter is None or quant is None:
        return None
    weights_file = find_adapter_weights(adapter)
    return StoredSplits(weights_file) if has_halves(weights_file) else None


def has_halves(weights_file: Path) -> bool:
    """Say whether the ranks of an adapter's file are what was trained and what it has begun from."""
    if weights_file.suffix != ".safetensors":
        return False
    load_header(weights_file)
    with safe_open(weights_file, "pt") as file:
        return HALVES.items() <= (file.metadata() or {}).items()


def halve_adapter(adapter: Adapter) -> tuple[Adapter, dict[str, Factors]]:
    """Return the adapter as it was trained, and what it has begun from, by the path of its layer.

    Raises:
        FormatError: A rank is odd.
    """
    tensors, taken = adapter.tensors, {}
    lora_A, lora_B = {}, {}
    for path, both_A in tensors.lora_A.items():
        if len(both_A) % 2:
            raise FormatError(
                f"the adapter of {path} has rank {len(both_A)}, and its file says that ranks are two halves"
            )
        (lora_A[path], taken_A), (lora_B[path], taken_B) = halves(both_A, tensors.lora_B[path])
        taken[path] = Factors(A_RD=taken_A.float().contiguous(), B_FR=taken_B.float().contiguous())
    share = adapter.spec.alpha_factor(0.5)
    halved = dataclasses.replace(
        adapter,
        spec=adapter.spec.with_ranks_times(0.5),
        tensors=dataclasses.replace(tensors, lora_A=lora_A, lora_B=lora_B),
        alphas={path: alpha * share for path, alpha in adapter.alphas.items()},
    )
    return halved, taken
