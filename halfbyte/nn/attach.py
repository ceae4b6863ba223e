"""Give a model its adapters, say what that came to, and find them again."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping

from torch import nn

from halfbyte.config.adapter_init import begins_from_weights
from halfbyte.errors import ConfigError
from halfbyte.nn.convert import replace_module, workspace_of
from halfbyte.nn.linear import Linear4bit
from halfbyte.nn.lora import LoraLinear
from halfbyte.nn.saved_module import SavedModule
from halfbyte.nn.spec import LoraSpec
from halfbyte.nn.split import Split
from halfbyte.nn.targets import find_saved, find_targets
from halfbyte.nn.token_rows import RowsEmbedding, RowsHead, TokenRows
from halfbyte.nn.vocabulary import attach_token_rows, find_token_rows, iter_token_rows, select_token_rows

ADAPTER_MODULES = (LoraLinear, SavedModule, RowsEmbedding, RowsHead)
"""What stands in the place of a module that is trained; `unwrap` gives that back."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """What a model's adapters are; its text is for people."""

    modules: dict[str, int]
    """Rank of each adapter by the path of its layer."""
    saved_modules: tuple[str, ...]
    """Paths of the modules trained whole."""
    num_tokens: int
    """Tokens whose rows of embedding and head are trained."""
    dora: bool
    """Whether they train the lengths of rows too."""
    trainable_parameters: int
    total_parameters: int
    """All elements of all weights, a 4-bit weight counted by its elements and not by its bytes."""

    @property
    def num_modules(self) -> int:
        return len(self.modules)

    def __str__(self) -> str:
        names = collections.Counter((path.rpartition(".")[2], rank) for path, rank in self.modules.items())
        ranks = set(self.modules.values())
        parts = [
            f"{name} x {count}" + (f" (rank {rank})" if len(ranks) > 1 else "") for (name, rank), count in names.items()
        ]
        rank_text = f" of rank {ranks.pop()}" if len(ranks) == 1 else ""
        saved = f"; trained whole: {', '.join(self.saved_modules)}" if self.saved_modules else ""
        tokens = f"; rows of {self.num_tokens} tokens" if self.num_tokens else ""
        kind = "DoRA adapters" if self.dora else "adapters"
        text = f"{self.num_modules} {kind}{rank_text}: {', '.join(parts)}{saved}{tokens}"
        if self.trainable_parameters:
            share = 100 * self.trainable_parameters / self.total_parameters
            text += (
                f"\n{self.trainable_parameters:,} of {self.total_parameters:,} parameters are trained ({share:.2f}%)"
            )
        return text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterModules:
    """What an adapter of a model consists of, by path, found in one walk: there are thousands of modules."""

    lora: dict[str, LoraLinear]
    saved: dict[str, SavedModule]
    rows: dict[str, RowsEmbedding | RowsHead]
    """As `iter_token_rows` yields them."""
    linears: tuple[str, ...]
    """Of all linear layers, with adapters and without."""

    @classmethod
    def of(cls, model: nn.Module) -> AdapterModules:
        """Find them."""
        modules = dict(model.named_modules())
        # A wrapped layer's own path, not that of the base inside.
        linears = (path.removesuffix(".base") for path, m in modules.items() if isinstance(m, (nn.Linear, Linear4bit)))
        return cls(
            lora={path: module for path, module in modules.items() if isinstance(module, LoraLinear)},
            saved={path: module for path, module in modules.items() if isinstance(module, SavedModule)},
            rows=dict(select_token_rows(modules.items())),
            linears=tuple(linears),
        )


def attach_adapters(model: nn.Module, spec: LoraSpec, splits: Mapping[str, Split] | None = None) -> AdapterReport:
    """Freeze a model and put adapters that change nothing yet beside the layers that `spec` means.

    Args:
        model: Changed in place.
        spec: Which layers, and how.
        splits: What its weights were split into while they were loaded, where `spec.init` asks for that.

    Raises:
        ConfigError: `spec` matches nothing, or something that cannot be adapted; the model is left as it was.
    """
    if any(isinstance(module, ADAPTER_MODULES) for module in model.modules()):
        raise ConfigError("the model has adapters already; load the base model anew to attach others")
    targets, saved = find_targets(model, spec), find_saved(model, spec)
    find_token_rows(model, spec)
    unsplit = [target.path for target in targets if target.path not in (splits or {})]
    if begins_from_weights(spec.init) and unsplit:
        raise ConfigError(
            f"lora.init={spec.init} begins from weights before they are quantised, and that of {unsplit[0]} was not "
            "split when the model was loaded: the layer shares it with another, or load_model was not given NewSplits; "
            "leave the layer out of lora.targets, or use `halfbyte train`"
        )
    workspace = workspace_of(model)
    model.requires_grad_(False)
    for target in targets:
        base = model.get_submodule(target.path)
        assert isinstance(base, (Linear4bit, nn.Linear))
        layer = LoraLinear.from_base(
            base,
            rank=target.rank,
            alpha=target.alpha,
            rslora=spec.rslora,
            dora=spec.dora,
            dropout=spec.dropout,
            workspace=workspace,
        )
        split = (splits or {}).get(target.path)
        if spec.seed is not None:
            layer.reset_adapter(seed_of(spec.seed, target.path))
        if split is not None:
            layer.start_from(split.first, taken=split.taken)
        replace_module(model, target.path, layer)
    attach_token_rows(model, spec)
    for path in saved:
        replace_module(model, path, SavedModule.from_module(model.get_submodule(path)))
    return report_adapters(model)


def report_adapters(model: nn.Module) -> AdapterReport:
    """Say what the adapters of a model are."""
    trainable, total = count_parameters(model)
    return AdapterReport(
        modules={path: layer.rank for path, layer in iter_lora(model)},
        saved_modules=tuple(path for path, _ in iter_saved(model)),
        num_tokens=len({number for _, module in iter_token_rows(model) for number in module.table.token_ids}),
        dora=any(layer.lora_magnitude_vector is not None for _, layer in iter_lora(model)),
        trainable_parameters=trainable,
        total_parameters=total,
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained and how many there are, 4-bit weights counted by their elements."""
    parameters = list(model.parameters())
    quantized = sum(m.quantized.numel for m in model.modules() if isinstance(m, Linear4bit))
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + quantized


def iter_lora(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield path and module of each layer with an adapter."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLinear))


def iter_saved(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """Yield path and wrapper of each module that is trained whole."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, SavedModule))


def iter_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of everything that is trained."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Make the model behave as its base inside the `with` block.

    A base that lacks what its adapters have begun from gets that back.
    """
    wrappers = [m for m in model.modules() if isinstance(m, (LoraLinear, SavedModule, TokenRows))]
    before = [wrapper.adapter_enabled for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.adapter_enabled = False
    try:
        yield
    finally:
        for wrapper, enabled in zip(wrappers, before, strict=True):
            wrapper.adapter_enabled = enabled


def seed_of(seed: int, path: str) -> int:
    """Return the seed of one layer."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "little")
