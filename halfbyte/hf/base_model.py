"""The base model under transformers' and bitsandbytes' names."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.device import default_compute_dtype, default_device, free_bytes, resolve_device
from halfbyte.distributed import enter_world
from halfbyte.errors import ConfigError
from halfbyte.hf.said import refuse_unknown, refuse_unless_default, say
from halfbyte.models import load_config, load_model, resolve_source
from halfbyte.models.modes import checkpoint_layers_
from halfbyte.models.vocabulary import resize_vocabulary_
from halfbyte.nn.attach import ADAPTER_MODULES
from halfbyte.quant import QuantSpec

_HARMLESS = {"low_cpu_mem_usage", "local_files_only", "trust_remote_code"}
_ONLY = {
    "use_safetensors": True,
    "max_memory": None,
    "offload_folder": None,
    "offload_state_dict": False,
    "load_in_8bit": False,
    "subfolder": "",
    "variant": None,
    "cache_dir": None,
    "token": None,
    "use_auth_token": None,
    "tp_plan": None,
}
# All of them divide a model in proportion to the cards' free memory.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
_KNOWN = {
    *_HARMLESS,
    *_ONLY,
    "quantization_config",
    "device_map",
    "dtype",
    "torch_dtype",
    "revision",
    "attn_implementation",
    "load_in_4bit",
    "use_cache",
}


@dataclasses.dataclass
class BitsAndBytesConfig:
    """bitsandbytes' 4-bit options by their own names and with their own defaults.

    The defaults are those of bitsandbytes (fp4, single quantisation, float32 products), not those that suit QLoRA;
    where they apply, loading says so.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            raise ConfigError("BitsAndBytesConfig: load_in_8bit cannot be honoured; halfbyte keeps weights in 4 bits")
        if self.llm_int8_enable_fp32_cpu_offload:
            raise ConfigError("BitsAndBytesConfig: llm_int8_enable_fp32_cpu_offload cannot be honoured; leave it out")
        if self.llm_int8_skip_modules not in (None, [], ["lm_head"]):
            raise ConfigError(
                f"BitsAndBytesConfig: llm_int8_skip_modules={self.llm_int8_skip_modules} cannot be honoured; "
                "all linear layers but the output head are kept in 4 bits"
            )
        if self.bnb_4bit_quant_storage not in (None, "uint8", torch.uint8):
            raise ConfigError("BitsAndBytesConfig: bnb_4bit_quant_storage other than uint8 cannot be honoured")

    @property
    def quant_spec(self) -> QuantSpec | None:
        """The quantisation these options ask for; None where load_in_4bit is off."""
        if not self.load_in_4bit:
            return None
        return QuantSpec(codebook=self.bnb_4bit_quant_type, double_quant=self.bnb_4bit_use_double_quant)  # type: ignore[arg-type]


class AutoModelForCausalLM:
    """transformers' class of that name, for causal language models in 4 or 16 bits."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """Load a model; with a 4-bit `quantization_config`, quantised as it streams in.

        Args:
            pretrained_model_name_or_path: Hub id, folder, or GGUF file.
            **kwargs: transformers' arguments, those of older releases too (`torch_dtype`, `load_in_4bit`).

        Returns:
            A transformers model of its own class; its linear layers hold 4-bit weights.

        Raises:
            ConfigError: An argument that we cannot honour.
            FormatError: Files that are damaged or of an unknown layout.
        """
        where = "AutoModelForCausalLM.from_pretrained"
        refuse_unknown(where, kwargs, _KNOWN)
        refuse_unless_default(where, kwargs, _ONLY)
        quantization = _quantization(kwargs)
        shares = _card_shares(kwargs.get("device_map"))
        device = str(next(iter(shares)))
        source = os.fspath(pretrained_model_name_or_path)
        loaded = load_model(
            source,
            quant=None if quantization is None else quantization.quant_spec,
            compute_dtype=_compute_dtype(source, quantization, kwargs, device),
            device=device,
            attn_implementation=kwargs.get("attn_implementation"),
            revision=kwargs.get("revision"),
            card_shares=shares,
        )
        if len(shares) > 1:
            say(f"{loaded.report.notes[-1]}; one computes at a time, all of them under torchrun")
            say("where one card has room, device_map={'': 0} is quicker")
        if "use_cache" in kwargs:
            loaded.model.config.use_cache = kwargs["use_cache"]
        if quantization is not None and quantization.load_in_4bit:
            say(str(loaded.report).splitlines()[0])
        # transformers' own would put a plain embedding in the place of one that widens as it goes.
        model: Any = loaded.model
        model.resize_token_embeddings = functools.partial(resize_token_embeddings, loaded.model)
        return loaded.model


def resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> torch.nn.Module:
    """Give embedding and head of a model of ours another number of rows, new ones the mean of those that are there.

    Args:
        model: Without adapters.
        new_num_tokens: Rows from now on; as many as there are unless given.
        pad_to_multiple_of: Rounded up to a multiple of this.
        mean_resizing: New rows are the mean either way, without transformers' noise.

    Raises:
        ConfigError: The model has adapters already.
    """
    if any(isinstance(module, ADAPTER_MODULES) for module in model.modules()):
        raise ConfigError("resize_token_embeddings: the model has adapters already; resize it before")
    embedding: Any = model.get_input_embeddings()
    size, multiple = new_num_tokens or embedding.num_embeddings, pad_to_multiple_of or 1
    if not mean_resizing:
        say("new rows are the mean of the others, whatever mean_resizing says")
    resize_vocabulary_(model, -(-size // multiple) * multiple)
    return model.get_input_embeddings()


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze the model and switch gradient checkpointing on.

    PEFT's function also casts embeddings, head and norms to fp32, which costs gigabytes and gains nothing here: our
    norms and losses compute in fp32 and adapters are fp32 master values, so the weights stay as they are.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        checkpoint_layers_(model, gradient_checkpointing_kwargs)
    return model


def _quantization(kwargs: dict[str, Any]) -> BitsAndBytesConfig | None:
    """Read `quantization_config` (ours, transformers' own class, or a dict) or the older `load_in_4bit=True`."""
    given = kwargs.get("quantization_config")
    if given is None:
        return BitsAndBytesConfig(load_in_4bit=True) if kwargs.get("load_in_4bit") else None
    if isinstance(given, BitsAndBytesConfig):
        return given
    values = given if isinstance(given, dict) else given.to_dict()
    fields = {field.name for field in dataclasses.fields(BitsAndBytesConfig)}
    method = values.get("quant_method", "bitsandbytes")
    if str(getattr(method, "value", method)) != "bitsandbytes":
        raise ConfigError(f"quantization_config: quant_method {method!r} cannot be honoured; use BitsAndBytesConfig")
    return BitsAndBytesConfig(**{name: value for name, value in values.items() if name in fields})


def _card_shares(device_map: Any) -> dict[torch.device, float]:
    """The devices that `device_map` means, and how much of a model each takes: of several GPUs what they have free.

    "auto" and its like are this rank's GPU under torchrun, all GPUs of a process that is alone, or the CPU.
    """
    world = enter_world(on_cpu=device_map in ("cpu", {"": "cpu"}))
    if device_map in SPREADS and world.size == 1 and torch.cuda.device_count() > 1:
        cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return {card: float(free_bytes(card)) for card in cards}
    if device_map is None or device_map in SPREADS:
        return {default_device(): 1.0}
    if isinstance(device_map, dict) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, int):
        device_map = torch.device("cuda", device_map)
    if isinstance(device_map, (str, torch.device)):
        return {resolve_device(device_map): 1.0}
    raise ConfigError(f"device_map={device_map!r} cannot be honoured; give one device, for example device_map='auto'")


def _compute_dtype(
    source: str, quantization: BitsAndBytesConfig | None, kwargs: dict[str, Any], device: str
) -> torch.dtype | str:
    """The dtype products are computed in: what was asked for, unless this device is hopeless at it."""
    if quantization is None or quantization.quant_spec is None:
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype")) or "auto"
        return _checkpoint_dtype(source, kwargs.get("revision")) if dtype == "auto" else _as_dtype(dtype)
    if quantization.bnb_4bit_compute_dtype is None:
        say("bnb_4bit_compute_dtype is not given: float32, as in bitsandbytes; bfloat16 is faster on a GPU")
    if quantization.bnb_4bit_quant_type == "fp4":
        say("4-bit type fp4, as asked for or as bitsandbytes' default; nf4 loses less")
    asked = _as_dtype(quantization.bnb_4bit_compute_dtype or torch.float32)
    best = default_compute_dtype(torch.device(device))
    if device == "cpu" and asked not in (torch.float32, best):
        say(f"products are computed in {_name(best)}: this CPU has no fast {_name(asked)}")
        return best
    return asked


def _checkpoint_dtype(source: str, revision: str | None) -> torch.dtype | str:
    """The dtype of the weights, as the config tells it; a 4-bit checkpoint decides for itself."""
    config = load_config(resolve_source(source, revision))
    if getattr(config, "quantization_config", None) is not None or config.dtype is None:
        return "auto"
    return _as_dtype(config.dtype)


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{dtype!r} is no dtype; use 'bfloat16', 'float16' or 'float32'")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
