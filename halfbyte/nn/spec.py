"""What adapters a model gets. The matching rules are PEFT's, see `halfbyte.nn.targets`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from halfbyte.config.adapter_init import ZERO, check_init
from halfbyte.errors import ConfigError

ALL_LINEAR = "all-linear"
INPUT_EMBEDDING = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Which layers get an adapter, and how large it is."""

    rank: int = 16
    """Rows of lora_A, columns of lora_B."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.05
    """Probability of dropping an element of the adapter's input in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Train the lengths of the weights' rows too (DoRA)."""
    init: str = ZERO
    """What adapters begin as: "zero", which changes nothing, or from the weights of the base: "pissa",
    "pissa_niter_N", "loftq". See `halfbyte.nn.split`."""
    loftq_iterations: int = 1
    """Rounds of LoftQ."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """"all-linear" (all but the output head), names (the last part or more of a layer's path), or a regular
    expression for the whole path."""
    exclude: str | tuple[str, ...] = ()
    """Names, or a regular expression for the whole path, of layers that get none although they match."""
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Another rank for layers whose path ends with a match of the key; the first matching key counts."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Another alpha, likewise."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the layers that get adapters; None for all."""
    layers_pattern: str | tuple[str, ...] | None = None
    """Name of the list of layers that those numbers count in; None for the first number in a path."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules trained whole, as fp32 copies, beside the adapters."""
    trainable_tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Ids of tokens whose rows are trained, by the name of the module: of the embedding (INPUT_EMBEDDING, whatever it
    is called; of a tied head as well) or of the output head. May lie beyond the vocabulary that the base has."""
    vocabulary: int | None = None
    """Tokens that embedding and head know, where those are more than the base has."""
    seed: int | None = None
    """Makes each adapter's first values depend on this and its path alone; None draws from torch's generator."""

    def with_ranks_times(self, factor: float) -> LoraSpec:
        """Return adapters of other ranks with the same scaling."""
        return dataclasses.replace(
            self,
            rank=round(self.rank * factor),
            alpha=self.alpha * self.alpha_factor(factor),
            rank_pattern={key: round(rank * factor) for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: alpha * self.alpha_factor(factor) for key, alpha in self.alpha_pattern.items()},
        )

    def alpha_factor(self, factor: float) -> float:
        """Return what alpha is multiplied with where ranks are multiplied with `factor`."""
        return math.sqrt(factor) if self.rslora else factor

    def __post_init__(self) -> None:
        for name, rank in {
            "rank": self.rank,
            **{f"rank_pattern[{k}]": v for k, v in self.rank_pattern.items()},
        }.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"lora.{name} is {rank!r}; it must be a whole number of at least 1")
        check_init(self.init, self.loftq_iterations, dora=self.dora)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.targets:
            raise ConfigError('lora.targets is empty; give "all-linear", names, or a regular expression')
        is_regex = isinstance(self.targets, str) and self.targets != ALL_LINEAR
        if is_regex and (self.layers_to_transform is not None or self.layers_pattern is not None):
            raise ConfigError(
                "lora.layers_to_transform and layers_pattern need lora.targets to be names or all-linear; "
                f"the regular expression {self.targets!r} can name the layers itself"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("lora.layers_pattern is set but lora.layers_to_transform is not; set both or neither")
