"""The training loop under transformers' and trl's names: TrainingArguments, SFTConfig, SFTTrainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers import (
    TrainingArguments as TransformersArguments,
)

from halfbyte.data import TokenizedExample, build_renderer, examples_from_rows, prepare
from halfbyte.errors import ConfigError
from halfbyte.hf.base_model import AutoModelForCausalLM
from halfbyte.hf.peft_model import LoraConfig, PeftModel, as_lora_config, get_peft_model
from halfbyte.hf.said import refuse_unless_default, say
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions

TrainingArguments = HalfbyteArguments
"""transformers' arguments, older names too; bf16=True needs no GPU."""

# What trl's trainer takes beside transformers' arguments, with the name it has now.
_SFT_NAMES = {
    "dataset_text_field": "dataset_text_field",
    "max_seq_length": "max_length",
    "max_length": "max_length",
    "packing": "packing",
    "assistant_only_loss": "assistant_only_loss",
    "completion_only_loss": "completion_only_loss",
}
# Options of trl that only say how it works inside, and so change nothing here.
_SFT_HARMLESS = {"dataset_num_proc", "dataset_batch_size", "dataset_kwargs", "packing_strategy", "eval_packing"}
_SFT_ONLY = {
    "neftune_noise_alpha": None,
    "loss_type": "nll",
    "activation_offloading": False,
    "chat_template_path": None,
    "model_init_kwargs": None,
    "eos_token": None,
    "pad_token": None,
    "padding_free": False,
    "infinite": None,
    "num_of_sequences": None,
    "compute_metrics": None,
    "preprocess_logits_for_metrics": None,
    "data_collator": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _SFTOptions:
    """How rows become examples."""

    dataset_text_field: str = "text"
    max_length: int | None = 1024
    packing: bool = False
    assistant_only_loss: bool = False
    completion_only_loss: bool | None = None


class SFTConfig(HalfbyteArguments):
    """trl's configuration: TrainingArguments with the options of the data.

    Raises:
        ConfigError: An option is unknown, or is one that cannot be honoured.
    """

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        self.sft, rest = _split_options("SFTConfig", options)
        super().__init__(output_dir=output_dir, **rest)


class SFTTrainer(HalfbyteTrainer):
    """trl's trainer: takes rows of text, conversations or prompts with completions, and trains adapters on them.

    Args:
        model: A model with adapters (get_peft_model), one without and a `peft_config`, or the name of one.
        args: TrainingArguments, SFTConfig, or transformers' own.
        train_dataset: A `datasets.Dataset`, or any sequence of rows.
        eval_dataset: Held-out rows.
        processing_class: The tokenizer; `tokenizer=` is understood too.
        peft_config: The adapters to attach; where the model has the same already, nothing is attached.
        formatting_func: Makes the text of a row.
        callbacks: transformers' callbacks.
        **options: trl's options of the data, now in SFTConfig and formerly here.

    Raises:
        ConfigError: An argument cannot be honoured.
        DataError: Rows cannot be understood.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TransformersArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **options: Any,
    ) -> None:
        tokenizer = options.pop("tokenizer", None) or processing_class
        arguments = _as_arguments(args, model)
        self.sft = _merge_options(arguments, options)
        self.peft_model = _with_adapters(model, peft_config)
        inner = self.peft_model.get_base_model()
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(inner.config._name_or_path)
        if compute_device_of(inner).type == "cpu" and not arguments.use_cpu and torch.cuda.is_available():
            arguments.use_cpu = True
        build = _ExampleBuilder(tokenizer, self.sft, formatting_func)
        super().__init__(
            inner,
            arguments,
            train_dataset=build("train_dataset", train_dataset),
            eval_dataset=None if eval_dataset is None else build("eval_dataset", eval_dataset),
            processing_class=tokenizer,
            callbacks=list(callbacks or ()),
            options=TrainerOptions(
                row_tokens=self.sft.max_length if self.sft.packing else None,
                base_model=inner.config._name_or_path,
                lora=_active_config(self.peft_model).spec,
            ),
        )
        # Scripts save the adapter with trainer.model.save_pretrained; on the bare model that would write 4-bit shards.
        self.model.save_pretrained = self.peft_model.save_pretrained
        for note in self.notes:
            say(note)


def _split_options(where: str, options: Mapping[str, Any]) -> tuple[_SFTOptions, dict[str, Any]]:
    """Separate trl's options from transformers' ones."""
    refuse_unless_default(where, options, _SFT_ONLY)
    ours = {_SFT_NAMES[name]: value for name, value in options.items() if name in _SFT_NAMES}
    dropped = {*_SFT_NAMES, *_SFT_HARMLESS, *_SFT_ONLY}
    return _SFTOptions(**ours), {name: value for name, value in options.items() if name not in dropped}


def _merge_options(arguments: HalfbyteArguments, options: Mapping[str, Any]) -> _SFTOptions:
    """Read trl's options from an SFTConfig, and from the trainer's own arguments as older releases had them."""
    given, rest = _split_options("SFTTrainer", options)
    if rest:
        raise ConfigError(f"SFTTrainer: halfbyte does not know the argument {next(iter(rest))!r} and ignores none")
    base = getattr(arguments, "sft", _SFTOptions())
    named = {_SFT_NAMES[name] for name in options if name in _SFT_NAMES}
    return dataclasses.replace(base, **{name: getattr(given, name) for name in named})


def _as_arguments(args: TransformersArguments | None, model: Any) -> HalfbyteArguments:
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return SFTConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-SFT")
    if isinstance(args, HalfbyteArguments):
        return args
    # transformers' own, or trl's: take over what differs from the defaults of its class.
    defaults = {field.name: field.default for field in dataclasses.fields(args) if field.init}
    changed = {name: getattr(args, name) for name, value in defaults.items() if getattr(args, name) != value}
    for derived in ("logging_dir", "run_name", "accelerator_config"):
        changed.pop(derived, None)
    return SFTConfig(**changed)


def _with_adapters(model: str | PreTrainedModel | PeftModel, peft_config: Any) -> PeftModel:
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model)
    if isinstance(model, PeftModel):
        if peft_config is not None and as_lora_config(peft_config).spec != _active_config(model).spec:
            raise ConfigError("SFTTrainer: the model has other adapters than peft_config says; leave peft_config out")
        return model
    if peft_config is None:
        raise ConfigError("SFTTrainer: give peft_config=LoraConfig(...), or a model from get_peft_model")
    config: LoraConfig = as_lora_config(peft_config)
    return get_peft_model(model, config)


def _active_config(model: PeftModel) -> LoraConfig:
    return model.peft_config[model.active_adapter]


class _ExampleBuilder:
    """Turns the rows of a data set into what the model sees, and says what was understood."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: _SFTOptions, formatting_func: Callable[[Any], Any] | None
    ) -> None:
        self.tokenizer, self.options, self.formatting_func = tokenizer, options, formatting_func

    def __call__(self, name: str, rows: Any) -> list[TokenizedExample]:
        if rows is None:
            raise ConfigError(f"SFTTrainer: {name} is missing")
        layout: str | None = "text"
        columns: dict[str, str] | None = None
        if self.formatting_func is not None:
            rows = [{"text": text} for row in rows for text in self._texts(row)]
        else:
            layout, columns = self._layout(rows)
        examples = examples_from_rows(rows, name=name, format=layout, columns=columns)
        renderer = build_renderer(self.tokenizer, train_on=self._train_on(examples.format))
        max_length = self.options.max_length or self.tokenizer.model_max_length
        prepared = prepare(examples.examples, renderer, max_length=max_length)
        say(f"{name}: {len(prepared.examples)} examples, format {examples.format}")
        for line in str(prepared.report).splitlines():
            say(f"  {line}")
        return prepared.examples

    def _layout(self, rows: Iterable[Mapping[str, Any]]) -> tuple[str | None, dict[str, str] | None]:
        """The text column where the data has one; otherwise the format is recognised by the columns."""
        field = self.options.dataset_text_field
        first = next(iter(rows), {})
        return ("text", {"text": field}) if field in first else (None, None)

    def _train_on(self, layout: str) -> Literal["assistant", "all"]:
        """trl learns whole conversations unless told otherwise, and completions without their prompts."""
        if self.options.assistant_only_loss or self.options.completion_only_loss:
            return "assistant"
        if layout == "prompt_completion" and self.options.completion_only_loss is None:
            return "assistant"
        if layout != "text":
            say("all tokens are learned, as in trl; assistant_only_loss=True learns the answers only")
        return "all"

    def _texts(self, row: Mapping[str, Any]) -> list[str]:
        assert self.formatting_func is not None
        text = self.formatting_func(row)
        return [text] if isinstance(text, str) else list(text)
