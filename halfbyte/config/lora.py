"""Options of the adapters. PEFT's names are accepted as aliases."""

from __future__ import annotations

import dataclasses
import re

from halfbyte.config.adapter_init import ZERO, check_init
from halfbyte.config.option import option
from halfbyte.config.values import NONE_WORDS, TRUE_WORDS, check_section
from halfbyte.errors import ConfigError

ALL_LINEAR = "all-linear"
PLAIN_NAMES = re.compile(r"[\w.\-]+(\s*,\s*[\w.\-]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoraSection:
    """The adapters that are trained"""

    rank: int = option(16, minimum=1, aliases=("r",))
    """Rows of lora_A, columns of lora_B."""
    alpha: float = option(32.0, above=0, aliases=("lora_alpha",))
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = option(0.05, minimum=0, below=1, aliases=("lora_dropout",))
    """Share of the adapter's input dropped in training."""
    targets: str | tuple[str, ...] = option(ALL_LINEAR, aliases=("target_modules",))
    """Which layers get an adapter: all-linear (all but the output head), names (q_proj,v_proj), or a regular
    expression for the whole path."""
    exclude: str | tuple[str, ...] = option((), aliases=("exclude_modules",))
    """Names, or a regular expression, of layers that get none although they match."""
    rslora: bool = option(False, aliases=("use_rslora",))
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = option(False, aliases=("use_dora",))
    """Train the lengths of the weights' rows too (DoRA). Slower, the more so with dropout."""
    init: str = option(ZERO, aliases=("init_lora_weights",))
    """What adapters begin as: zero changes nothing; pissa, pissa_niter_N (N rounds of a faster decomposition) and loftq
    begin from the weights, which must not be in 4 bits already."""
    loftq_iterations: int = option(1, minimum=1, aliases=("loftq_iter",))
    """Rounds of quantising and decomposing of lora.init=loftq."""
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Another rank for layers whose path matches: down_proj=32."""
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Another alpha for layers whose path matches."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the decoder layers that get adapters. none: all."""
    layers_pattern: tuple[str, ...] | None = None
    """Name of the list of layers, where it is none of the usual ones."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters and saved with them (lm_head)."""
    trainable_token_indices: tuple[int, ...] = ()
    """Ids of tokens whose rows of embedding and head are trained, beside those of model.added_tokens."""
    adapter: str | None = option(None, aliases=("init_from", "lora_model_dir"))
    """Go on from this trained adapter (folder or file) instead of a new one, with a new optimizer; options of this
    section that are given must not contradict it, but for dropout."""

    def __post_init__(self) -> None:
        check_section(self, "lora")
        # PEFT's word for it.
        if self.init in TRUE_WORDS:
            object.__setattr__(self, "init", ZERO)
        check_init(self.init, self.loftq_iterations, dora=self.dora)
        if self.init != ZERO and self.adapter is not None:
            raise ConfigError(
                f"lora.adapter goes on from trained adapters, and lora.init={self.init} says how new ones begin; leave "
                "one of them out"
            )
        for name in ("targets", "exclude"):
            object.__setattr__(self, name, _names_or_regex(name, getattr(self, name)))
        if not self.targets:
            raise ConfigError("lora.targets is empty; allowed: all-linear, names, or a regular expression")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                if value <= 0:
                    raise ConfigError(f"lora.{name}[{key}] is {value}; allowed: above 0")
        is_regex = isinstance(self.targets, str) and self.targets != ALL_LINEAR
        if is_regex and self.layers_to_transform is not None:
            raise ConfigError("lora.layers_to_transform needs lora.targets to be names; an expression can tell layers")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("lora.layers_pattern is set but lora.layers_to_transform is not; set both or neither")


def _names_or_regex(option_name: str, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Read `q_proj,v_proj` as names; text with a character that names do not have is a regular expression."""
    if not isinstance(value, str) or value == ALL_LINEAR:
        return value
    if value.strip() in NONE_WORDS:
        return ()
    if PLAIN_NAMES.fullmatch(value):
        return tuple(part.strip() for part in value.split(","))
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"lora.{option_name} is {value!r}, no regular expression: {error}") from None
    return value
