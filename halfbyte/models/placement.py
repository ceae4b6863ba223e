"""Which checkpoint tensors make which parameter of the model.

For the ordinary causal language models a tensor's name is the parameter's name. Three things come between:

* a checkpoint of the bare decoder lacks the `model.` prefix, or has one too many;
* transformers 5 renames and joins tensors of some families (stacked experts, split projections) by rules that it keeps
  for each model; we ask it for the rules and apply them one parameter at a time;
* bitsandbytes stores a 4-bit weight as several tensors.

Strict both ways: a parameter that no tensor fills, or a tensor that fills no parameter, is an error, apart from what
the family declares harmless.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.errors import FormatError
from halfbyte.models.weights import LazyTensor
from halfbyte.quant.bnb_format import is_quantized_key, quantized_prefixes

# Buffers that older checkpoints carry and that models compute for themselves.
HARMLESS_LEFTOVERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
# Families whose checkpoints need no rules of transformers where every name fits. Building its table of rules, for all
# families at once, takes a quarter of the time in which a small model loads.
PLAIN_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"}
)
SHOWN_NAMES = 5


@dataclasses.dataclass(slots=True, eq=False)
class Placement:
    """The tensors that fill one parameter, or several where a rule splits a tensor."""

    target: str
    """The parameter's path in the model; the first where there are several."""
    tensors: list[LazyTensor]
    is_quantized: bool = False
    """Whether the tensors are the parts of one 4-bit weight."""
    rule: WeightConverter | None = None
    """What makes the parameters of the tensors, where that is more than taking one as it is."""
    patterns: list[str] = dataclasses.field(default_factory=list)
    """The pattern of the rule that each tensor matched."""

    def convert(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Read the tensors and return the parameters that the rule makes of them."""
        assert self.rule is not None
        rule = copy.deepcopy(self.rule)
        for tensor, pattern in zip(self.tensors, self.patterns, strict=True):
            rule.add_tensor(self.target, tensor.name, pattern, tensor.read)  # type: ignore[arg-type]
        made = rule.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def products(self) -> list[str]:
        """Return the parameters that the rule makes, by name: its targets in the place of the first."""
        assert self.rule is not None
        first, *others = self.rule.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


def make_placements(model: PreTrainedModel, tensors: Iterable[LazyTensor]) -> list[Placement]:
    """Assign every checkpoint tensor to the parameter it fills, in the order of the tensors.

    Args:
        model: The model on the meta device, its linear layers not yet replaced.
        tensors: What the checkpoint holds.

    Raises:
        FormatError: Parameters without a tensor, tensors without a parameter, or shapes that differ.
    """
    tensors = list(tensors)
    expected: dict[str, torch.Tensor] = model.state_dict()
    quantized = {f"{prefix}.weight" for prefix in quantized_prefixes(tensor.name for tensor in tensors)}
    names = {_weight_of(tensor.name, quantized) or tensor.name for tensor in tensors}
    is_plain = model.config.model_type in PLAIN_FAMILIES and names <= expected.keys()
    rename = _Renamer(model, expected, rules=[] if is_plain else get_model_conversion_mapping(model))
    placements: dict[str, Placement] = {}
    unexpected = []
    for tensor in tensors:
        owner = _weight_of(tensor.name, quantized)
        target, pattern = rename(owner or tensor.name)
        if target not in expected:
            unexpected.append(tensor.name)
            continue
        placement = placements.setdefault(
            target, Placement(target, [], is_quantized=owner is not None, rule=rename.rules.get(pattern or ""))
        )
        placement.tensors.append(tensor)
        placement.patterns.append(pattern or "")
        if placement.rule is None and owner is None:
            _check_shape(tensor, target, expected[target])
    _check_complete(model, expected, placements, unexpected)
    return list(placements.values())


class _Renamer:
    """transformers' rules for one model."""

    def __init__(self, model: PreTrainedModel, expected: dict[str, torch.Tensor], rules: Sequence[Any]) -> None:
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._expected = expected
        self.rules = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """Return the parameter's path, and the pattern of the rule that makes it, if one does."""
        target, pattern = rename_source_key(
            name,
            self._renamings,
            self._converters,
            self._prefix,
            self._expected,
        )
        if target not in self._expected and name in self._expected:
            return name, None
        return target, pattern


def _weight_of(name: str, quantized: set[str]) -> str | None:
    """Return the name of the 4-bit weight that this tensor is a part of."""
    if name in quantized:
        return name
    if is_quantized_key(name):
        weight = name[: name.rindex("weight.") + len("weight")]
        return weight if weight in quantized else None
    return None


def _check_shape(tensor: LazyTensor, target: str, expected: torch.Tensor) -> None:
    if tensor.shape != tuple(expected.shape):
        raise FormatError(
            f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, but config.json makes {target} "
            f"{list(expected.shape)}: they belong to different models"
        )


def _check_complete(
    model: PreTrainedModel,
    expected: dict[str, torch.Tensor],
    placements: dict[str, Placement],
    unexpected: list[str],
) -> None:
    leftover = [*HARMLESS_LEFTOVERS, *(model._keys_to_ignore_on_load_unexpected or ())]
    unexpected = [name for name in unexpected if not _matches(name, leftover)]
    if unexpected:
        raise FormatError(
            f"the weights hold {len(unexpected)} tensors that {type(model).__name__} has no place for: "
            f"{_shown(unexpected)}; config.json and weights belong to different models"
        )
    made_by_rules = {name for placement in placements.values() if placement.rule for name in placement.products()}
    optional = list(model._keys_to_ignore_on_load_missing or ())
    missing = [
        name
        for name in expected
        if name not in placements and name not in made_by_rules and not _matches(name, optional)
    ]
    tied = _tied_groups(model)
    missing = [name for name in missing if not any(name in group and group & placements.keys() for group in tied)]
    if missing:
        raise FormatError(
            f"the weights lack {len(missing)} of the tensors that {type(model).__name__} needs: {_shown(missing)}"
        )


def _tied_groups(model: PreTrainedModel) -> list[set[str]]:
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return list(groups.values())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
