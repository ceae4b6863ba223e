"""Adapters under PEFT's names: LoraConfig, get_peft_model, PeftModel."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.export import merge_in_place
from halfbyte.hf.peft_class import AdaptedModel
from halfbyte.hf.said import refuse_unless_default, say
from halfbyte.models import load_adapter, read_adapter_config, save_adapter, spec_from_adapter_config
from halfbyte.nn import (
    AdapterReport,
    LoraSpec,
    adapters_disabled,
    attach_adapters,
)
from halfbyte.nn.attach import report_adapters
from halfbyte.nn.spec import INPUT_EMBEDDING

_ONLY: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "init_lora_weights": True,
    "task_type": "CAUSAL_LM",
    "layer_replication": None,
    "target_parameters": None,
}


class TaskType:
    """PEFT's task types; halfbyte trains causal language models."""

    CAUSAL_LM = "CAUSAL_LM"


@dataclasses.dataclass
class LoraConfig:
    """PEFT's LoRA options by their own names and with PEFT's own defaults."""

    r: int = 8
    target_modules: list[str] | tuple[str, ...] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    inference_mode: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    layer_replication: list[tuple[int, int]] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.init_lora_weights, str):
            raise ConfigError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r} looks at the weights, which are in 4 bits "
                "already when adapters are attached to a model; use `halfbyte train --lora.init=...` for that"
            )
        values = {name: getattr(self, name) for name in _ONLY}
        values["task_type"] = getattr(self.task_type, "value", self.task_type)
        refuse_unless_default("LoraConfig", values, _ONLY)

    @property
    def spec(self) -> LoraSpec:
        """The same in halfbyte's own words. Without target_modules: every linear layer but the output head."""
        return LoraSpec(
            rank=self.r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            rslora=self.use_rslora,
            dora=self.use_dora,
            targets=_names(self.target_modules) or "all-linear",
            exclude=_tuple(self.exclude_modules) or (),
            rank_pattern=dict(self.rank_pattern or {}),
            alpha_pattern=dict(self.alpha_pattern or {}),
            layers_to_transform=_tuple(self.layers_to_transform),
            layers_pattern=_tuple(self.layers_pattern),
            modules_to_save=_tuple(self.modules_to_save) or (),
            trainable_tokens=_tokens(self.trainable_token_indices),
        )

    @classmethod
    def from_spec(cls, spec: LoraSpec, *, base_model: str | None = None) -> LoraConfig:
        """The inverse of `spec`."""
        return cls(
            r=spec.rank,
            target_modules=spec.targets,
            lora_alpha=spec.alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            modules_to_save=list(spec.modules_to_save) or None,
            rank_pattern=dict(spec.rank_pattern),
            alpha_pattern=dict(spec.alpha_pattern),
            trainable_token_indices={name: list(ids) for name, ids in spec.trainable_tokens.items()} or None,
            base_model_name_or_path=base_model,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str]) -> LoraConfig:
        """Read an adapter_config.json; the path is its folder or a file beside it."""
        values = read_adapter_config(Path(pretrained_model_name_or_path))
        return cls.from_spec(spec_from_adapter_config(values), base_model=values.get("base_model_name_or_path"))


PeftConfig = LoraConfig


class PeftModel(AdaptedModel):
    """A causal language model with adapters; `base_model.model` is the transformers model itself.

    Attributes that are not its own are those of the transformers model (`config`, `device`, `generate` ...). Other
    trainers than ours take it as they take PEFT's own, see `halfbyte.hf.peft_class`.
    """

    def __init__(
        self, model: PreTrainedModel, config: LoraConfig, report: AdapterReport, adapter_name: str = "default"
    ) -> None:
        AdaptedModel.__init__(self, _LoraModel(model), config, adapter_name)
        self.report = report

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on `model`.

        Args:
            model: A model from AutoModelForCausalLM.from_pretrained.
            model_id: The adapter's folder, or its file: adapter_model.safetensors, or an adapter_model.bin, whatever
                of the two formats it really holds. Where the file of that name is absent and the other is there, that
                one is read, and said.
            is_trainable: Whether training goes on.
            adapter_name: What it is called.
            **kwargs: None others are understood.
        """
        refuse_unless_default("PeftModel.from_pretrained", kwargs, {**dict.fromkeys(kwargs), "config": None})
        path = _adapter_file(Path(model_id))
        inner = _inner(model)
        report = load_adapter(inner, path, name=adapter_name, trainable=is_trainable)
        say(f"{report.num_modules} modules got their adapter from {path}")
        return cls(inner, LoraConfig.from_pretrained(path), report, adapter_name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> None:
        """Put another saved adapter beside those that there are; `set_adapter` uses it.

        Under the name of the adapter in use its values are taken, of the same layers and ranks, as a resumed run does.

        Raises:
            ConfigError: The name is that of another adapter, or an argument cannot be honoured.
            FormatError: The file is damaged, or is an adapter of other layers.
        """
        if adapter_name == self.active_adapter:
            super().load_adapter(model_id, adapter_name, **kwargs)
            return
        refuse_unless_default("PeftModel.load_adapter", kwargs, dict.fromkeys(kwargs))
        path = _adapter_file(Path(model_id))
        report = load_adapter(self.get_base_model(), path, name=adapter_name, trainable=is_trainable)
        self.peft_config[adapter_name] = LoraConfig.from_pretrained(path)
        say(f"{report.num_modules} modules got the adapter {adapter_name!r} from {path}")

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use another of the adapters."""
        super().set_adapter(adapter_name)
        self.report = report_adapters(self.get_base_model())

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was in use, the first of the others is from then on."""
        super().delete_adapter(adapter_name)
        self.report = report_adapters(self.get_base_model())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate with the adapter applied, unmerged."""
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        return self.report.trainable_parameters, self.report.total_parameters

    def print_trainable_parameters(self) -> None:
        """Print PEFT's own line; every 4-bit weight counts as one parameter."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model answers as its base does."""
        with adapters_disabled(self.base_model.model):
            yield

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json and adapter_model.safetensors; of adapters with other names in folders below.

        Args:
            save_directory: Made where it is missing.
            **kwargs: PEFT's and transformers' arguments, where they ask for just this. `selected_adapters` names some
                of several, `state_dict` is not needed.
        """
        selected = kwargs.pop("selected_adapters", None) or self.own_adapters
        only = {"safe_serialization": True, "is_main_process": True, "save_embedding_layers": "auto"}
        refuse_unless_default("PeftModel.save_pretrained", kwargs, {**dict.fromkeys(kwargs), **only})
        model, in_use = self.base_model.model, self.active_adapter
        try:
            for name in selected:
                self.set_adapter(name)
                config, folder = self.peft_config[name], Path(save_directory)
                base = config.base_model_name_or_path or model.config._name_or_path
                save_adapter(model, folder if name == "default" else folder / name, base_model=base, spec=config.spec)
        finally:
            self.set_adapter(in_use)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False, **kwargs: Any) -> PreTrainedModel:
        """Give a plain 16-bit model with the adapter added to the dequantised weights.

        PEFT rounds the sum back to 4 bits, where a small update is lost. We never do that.

        Raises:
            ConfigError: Arguments that ask for a part of the adapters.
        """
        refuse_unless_default("merge_and_unload", kwargs, {**dict.fromkeys(kwargs), "adapter_names": None})
        model = merge_in_place(self.base_model.model)
        dtype = str(model.dtype).removeprefix("torch.")
        say(f"merged onto the dequantised weights: a plain {dtype} model, no longer in 4 bits")
        return model


PeftModelForCausalLM = PeftModel


class AutoPeftModelForCausalLM:
    """PEFT's class that loads the base model an adapter names, then the adapter."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], is_trainable: bool = False, **kwargs: Any
    ) -> PeftModel:
        from halfbyte.hf.base_model import AutoModelForCausalLM

        path = Path(pretrained_model_name_or_path)
        base = LoraConfig.from_pretrained(path).base_model_name_or_path
        if not base:
            raise ConfigError(f"{path}: adapter_config.json names no base model; load it yourself, then use PeftModel")
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        return PeftModel.from_pretrained(model, path, is_trainable=is_trainable)


def get_peft_model(model: PreTrainedModel, peft_config: LoraConfig, **kwargs: Any) -> PeftModel:
    """Put fresh adapters on `model`, and freeze the rest."""
    refuse_unless_default("get_peft_model", kwargs, {**dict.fromkeys(kwargs), "adapter_name": "default"})
    inner = _inner(model)
    config = as_lora_config(peft_config)
    return PeftModel(inner, config, attach_adapters(inner, config.spec))


def as_lora_config(config: Any) -> LoraConfig:
    """Take ours, or PEFT's own LoraConfig."""
    if isinstance(config, LoraConfig):
        return config
    if not hasattr(config, "to_dict") or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ConfigError(f"{type(config).__name__} cannot be honoured; use LoraConfig")
    values = config.to_dict()
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    from peft import LoraConfig as PeftLoraConfig

    plain = PeftLoraConfig().to_dict()
    unknown = {
        name: plain[name] for name in values if name not in fields and name not in ("peft_version", "auto_mapping")
    }
    refuse_unless_default("LoraConfig", values, unknown)
    return LoraConfig(**{name: value for name, value in values.items() if name in fields and value is not None})


class _LoraModel(nn.Module):
    """PEFT's middle layer: holds the transformers model as `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _inner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        raise ConfigError("the model is wrapped in adapters already; give the base model")
    return model


def _adapter_file(path: Path) -> Path:
    """The file that holds the adapter `path` names."""
    if path.exists() or path.suffix not in (".bin", ".safetensors"):
        return path
    other = path.with_suffix(".safetensors" if path.suffix == ".bin" else ".bin")
    if not other.exists():
        return path
    say(f"there is no {path.name}; reading {other.name} beside it")
    return other


def _names(targets: list[str] | tuple[str, ...] | set[str] | str | None) -> str | tuple[str, ...] | None:
    return targets if targets is None or isinstance(targets, str) else tuple(sorted(targets))


def _tokens(indices: list[int] | dict[str, list[int]] | None) -> dict[str, tuple[int, ...]]:
    by_name = indices if isinstance(indices, dict) else {INPUT_EMBEDDING: indices}
    return {name: tuple(ids) for name, ids in by_name.items() if ids}


def _tuple(value: Any) -> Any:
    if value is None:
        return None
    return tuple(value) if isinstance(value, (list, tuple, set)) else (value,)
