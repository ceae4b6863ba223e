"""What loading did: how much of a model is in 4 bits, how much is not, and why."""

from __future__ import annotations

import collections
import dataclasses

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.nn import Linear4bit

_REASONS = {
    "embedding": "looked up, not multiplied",
    "output head": "quantising it costs accuracy where it counts most",
    "embedding, also output head": "looked up; quantising the head costs accuracy where it counts most",
    "norms": "few, and sensitive",
    "biases": "few",
    "experts": "stacked tensors, no linear layers",
    "other linear layers": "left out by name",
    "other": "no linear layers",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Parameters of one kind that are not in 4 bits."""

    num_parameters: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What loading did; str() tells it in a few lines."""

    seconds: float
    device: torch.device
    compute_dtype: torch.dtype
    num_layers_4bit: int
    parameters_4bit: int
    bytes_4bit: int
    kept: dict[str, Kept]
    """What is not in 4 bits, by kind, largest first."""
    notes: tuple[str, ...] = ()

    @property
    def parameters_16bit(self) -> int:
        """Parameters that are not in 4 bits."""
        return sum(kind.num_parameters for kind in self.kept.values())

    @property
    def bytes_16bit(self) -> int:
        """Bytes of the parameters that are not in 4 bits."""
        return sum(kind.num_bytes for kind in self.kept.values())

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return self.parameters_4bit + self.parameters_16bit

    @property
    def share_16bit(self) -> float:
        """Share of the parameters that is not in 4 bits."""
        return self.parameters_16bit / max(1, self.num_parameters)

    def __str__(self) -> str:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        count = _count(self.num_parameters)
        head = f"loaded {count} parameters in {self.seconds:.1f} s on {self.device}, {dtype} products"
        if not self.parameters_4bit:
            return "\n".join((f"{head}; nothing in 4 bits ({_bytes(self.bytes_16bit)})", *self.notes))
        lines = [
            head,
            f"  in 4 bits: {_count(self.parameters_4bit)} in {self.num_layers_4bit} linear layers, "
            f"{_bytes(self.bytes_4bit)}",
            f"  left in 16 bits: {_count(self.parameters_16bit)} ({self.share_16bit:.1%}), {_bytes(self.bytes_16bit)}",
        ]
        for name, kind in self.kept.items():
            lines.append(f"    {name}: {_count(kind.num_parameters)}, {_bytes(kind.num_bytes)} ({_REASONS[name]})")
        return "\n".join((*lines, *(f"  {note}" for note in self.notes)))


def make_load_report(
    model: PreTrainedModel,
    *,
    seconds: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    notes: tuple[str, ...] = (),
) -> LoadReport:
    """Count what a loaded model holds."""
    quantized = [module.quantized for module in model.modules() if isinstance(module, Linear4bit)]
    kept: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                kept[_kind(model, module, path, name)].append(parameter)
    kinds = {
        name: Kept(num_parameters=sum(t.numel() for t in tensors), num_bytes=sum(t.nbytes for t in tensors))
        for name, tensors in kept.items()
    }
    return LoadReport(
        seconds=seconds,
        device=device,
        compute_dtype=compute_dtype,
        num_layers_4bit=len(quantized),
        parameters_4bit=sum(q.numel for q in quantized),
        bytes_4bit=sum(q.nbytes for q in quantized),
        kept=dict(sorted(kinds.items(), key=lambda item: -item[1].num_bytes)),
        notes=notes,
    )


def _kind(model: PreTrainedModel, module: nn.Module, path: str, name: str) -> str:
    parameter: torch.Tensor = getattr(module, name)
    head = model.get_output_embeddings()
    if isinstance(module, nn.Embedding):
        return "embedding, also output head" if head is not None and head.weight is parameter else "embedding"
    if module is head:
        return "output head"
    if parameter.dim() >= 3:
        return "experts" if "expert" in path + name else "other"
    if "norm" in path.lower():
        return "norms"
    if name == "bias":
        return "biases"
    return "other linear layers" if isinstance(module, nn.Linear) else "other"


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"
