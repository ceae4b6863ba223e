"""The parts of a run, made from its config: model, data, adapters, training arguments."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config import LoraSection, RunConfig
from halfbyte.config.adapter_init import begins_from_weights
from halfbyte.config.load import save_run_config
from halfbyte.config.output import REPORT_FILE, RUN_FILES, SUMMARY_FILE
from halfbyte.config.resolve import config_of_all
from halfbyte.data import (
    Example,
    PreparedData,
    Renderer,
    TokenizedExample,
    build_renderer,
    split_held_out,
    token_spans,
)
from halfbyte.data.template_tokens import find_split_markers
from halfbyte.distributed import current_world
from halfbyte.errors import ConfigError
from halfbyte.models import LoadedModel, load_model
from halfbyte.models.adapter_files import load_adapter
from halfbyte.models.attention import PACKED_ATTENTION
from halfbyte.models.streaming import ON_DEVICE, Residency
from halfbyte.models.weight_splits import NewSplits
from halfbyte.nn import AdapterReport, LoraSpec, attach_adapters, iter_lora
from halfbyte.quant import QuantSpec
from halfbyte.train.arguments import HalfbyteArguments
from halfbyte.train.checkpoint import find_checkpoint, list_checkpoints, remove_leftovers, step_of
from halfbyte.train.continued import EarlierAdapter, check_targets
from halfbyte.train.progress import prepare_examples, read_examples
from halfbyte.train.samples import printable
from halfbyte.train.tokens import RunTokens, spec_with_tokens, start_new_tokens_

SHOWN_TOKENS = 160
# Fields of the train section that are no training arguments of transformers, or go there in another form.
NOT_ARGUMENTS = {
    "num_samples",
    "max_sample_tokens",
    "resume",
    "overwrite",
    "bf16",
    "fp16",
    "eval_steps",
    "save_steps",
    "fused",
    "cuda_graphs",
    "fp8",
    "batch_size",
    "loraplus_lr_ratio",
    "on_bad_step",
    "loss_spike",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The examples of a run, to train on and held out."""

    train: PreparedData
    held_out: PreparedData | None
    held_out_examples: list[Example]
    renderer: Renderer


def make_folder(config: RunConfig) -> Path:
    """Make the output folder, where it is not there.

    Raises:
        ConfigError: The system does not allow it.
    """
    assert config.output_dir is not None
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; name another folder with --output") from error
    return folder


def prepare_folder(folder: Path, config: RunConfig, say: Callable[[str], None]) -> str | None:
    """Clear away what a crash has left, and an old run where that is to be replaced; the first rank does it for all.

    Args:
        folder: Of the run; no other process trains into it.
        config: Of the run.
        say: Is told of damaged checkpoints, and from where the run goes on.

    Returns:
        The checkpoint to go on from, or None to begin anew.

    Raises:
        ConfigError: The folder cannot be written to.
    """
    world = current_world()
    return world.gather(_prepare_folder(folder, config, say) if world.is_main else None)[0]


def _prepare_folder(folder: Path, config: RunConfig, say: Callable[[str], None]) -> str | None:
    try:
        remove_leftovers(folder)
        _remove_old_run(folder, config)
        save_run_config(config_of_all(config, current_world().size), folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}; name another with --output") from error
    if config.train.resume is not True:
        return None
    checkpoint = find_checkpoint(folder, say)
    if checkpoint is None:
        say(f"no checkpoint in {folder} is whole, so the run begins anew")
        return None
    say(f"going on after step {step_of(checkpoint)}, from {checkpoint}; --overwrite would begin anew")
    return str(checkpoint)


def load_base(config: RunConfig, console: Console, *, residency: Residency = ON_DEVICE) -> LoadedModel:
    """Load the base model as the config says, with our attention unless it names another.

    Args:
        config: Of the run.
        console: Is shown the progress.
        residency: Which weights live in host memory.
    """
    path = config.model.path
    with console.status(f"loading {path}") as status:
        loaded = load_model(
            path,
            quant=make_quant_spec(config),
            compute_dtype=config.compute_dtype,
            device=config.model.device,
            allow_16bit_experts=config.model.allow_16bit_experts,
            attn_implementation=config.model.attention or PACKED_ATTENTION,
            revision=config.model.revision,
            residency=residency,
            splits=_make_splits(config),
            on_progress=lambda done, total: status.update(f"loading {path}: {done / max(total, 1):.0%}"),
        )
    _check_context(loaded.model, config)
    return loaded


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> RunData:
    """Read, split and tokenise the examples, telling `console` what was found; the template goes to the tokenizer."""
    options = config.data
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    loaded = read_examples(options.train, options, console)
    _say(console, loaded.report)
    if options.held_out is not None:
        training = loaded.examples
        other = read_examples(options.held_out, options, console)
        _say(console, other.report)
        held_out = other.examples
    else:
        training, held_out = split_held_out(loaded.examples, options.held_out_fraction, config.train.seed)
    train = prepare_examples(training, renderer, options, console)
    _say(console, train.report)
    console.print(mark_trained(tokenizer, train.examples[0], in_colour=console.color_system is not None))
    prepared = prepare_examples(held_out, renderer, options, console) if held_out else None
    if prepared is not None:
        _say(
            console, f"held out: {prepared.report.num_examples} examples, {prepared.report.num_trained_tokens:,} tokens"
        )
    else:
        _say(console, "held out: nothing, so there will be no held-out loss and no answers to compare")
    if any(example.messages for example in training):
        split = find_split_markers(tokenizer, options.chat_template)
        if split:
            _say(
                console,
                f"{', '.join(split)} of the chat template: several tokens each to this tokenizer; "
                "--model.added_tokens=template makes them one each, and trains their rows",
            )
        tokenizer.chat_template = renderer.chat_template
    return RunData(train=train, held_out=prepared, held_out_examples=held_out, renderer=renderer)


def mark_trained(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample, *, in_colour: bool) -> Text:
    """Return an example as the model sees it, what is learned in green, or between [[ and ]] where there is no colour.

    A wrong mask or template is plain to see here, before the first step, and nowhere afterwards.
    """
    opening, closing = ("", "") if in_colour else ("[[", "]]")
    text = Text(f"the model sees, and learns {'what is green' if in_colour else 'what is in [[ ]]'}:\n")
    for span in token_spans(tokenizer, example.window(0, SHOWN_TOKENS)):
        words = printable(span.text)
        if span.is_trained:
            text.append(f"{opening}{words}{closing}", style="bold green")
        else:
            text.append(words, style="dim")
    return text.append(" ..." if len(example) > SHOWN_TOKENS else "")


def attach(
    loaded: LoadedModel, config: RunConfig, *, tokens: RunTokens | None = None, earlier: EarlierAdapter | None = None
) -> tuple[LoraSpec, AdapterReport]:
    """Give the model new adapters, or those of an earlier run to go on with.

    Args:
        loaded: The base.
        config: Of the run.
        tokens: That the run adds.
        earlier: The adapter to go on with.

    Raises:
        ConfigError: Options mean nothing in the model, or contradict the adapter.
        FormatError: The adapter does not fit the model.
    """
    model = loaded.model
    if earlier is None:
        spec = spec_with_tokens(make_lora_spec(config.lora, seed=config.train.seed), model, config, tokens)
        report = attach_adapters(model, spec, loaded.splits)
        start_new_tokens_(model, tokens)
        return spec, report
    check_targets(model, config.lora, earlier.spec)
    if tokens is not None and tokens.new_ids:
        raise ConfigError(
            f"model.added_tokens names {len(tokens.new_ids)} tokens that the adapter to go on with does not have; "
            "leave them out, or start a new adapter"
        )
    report = load_adapter(model, earlier.weights, trainable=True)
    for _, layer in iter_lora(model):
        layer.set_dropout(earlier.spec.dropout)
    return earlier.spec, report


def make_quant_spec(config: RunConfig) -> QuantSpec | None:
    """Return how to quantise, or None where the config says not to."""
    options = config.quant
    if not options.enabled:
        return None
    return QuantSpec(codebook=options.codebook, block_size=options.block_size, double_quant=options.double_quant)


def make_lora_spec(options: LoraSection, *, seed: int) -> LoraSpec:
    """Return the adapters that the config means."""
    names = {field.name for field in dataclasses.fields(LoraSpec)} - {"seed"}
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return LoraSpec(**values, seed=seed)


def build_arguments(config: RunConfig, *, on_cpu: bool, has_held_out: bool) -> HalfbyteArguments:
    """Return the training arguments that the config means."""
    section = config.train
    values: dict[str, Any] = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if field.name not in NOT_ARGUMENTS
    }
    values["report_to"] = list(section.report_to)
    values["lr_scheduler_kwargs"] = dict(section.lr_scheduler_kwargs) or None
    values["per_device_eval_batch_size"] = section.per_device_eval_batch_size or section.per_device_train_batch_size
    if section.warmup_steps is not None:
        values["warmup_ratio"] = 0.0
    else:
        del values["warmup_steps"]
    for kind, steps, wanted in (("eval", section.eval_steps, has_held_out), ("save", section.save_steps, True)):
        values[f"{kind}_strategy"] = "no" if not wanted else "epoch" if steps is None else "steps"
        if steps is not None:
            values[f"{kind}_steps"] = steps
    return HalfbyteArguments(config.output_dir, use_cpu=on_cpu, disable_tqdm=True, **values)


def _remove_old_run(folder: Path, config: RunConfig) -> None:
    # A run that goes on is not at its end any more, whatever it was.
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    if config.train.overwrite:
        for path in (*list_checkpoints(folder), folder / "logs"):
            shutil.rmtree(path, ignore_errors=True)
        for name in (*RUN_FILES, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)


def _make_splits(config: RunConfig) -> NewSplits | None:
    if not begins_from_weights(config.lora.init):
        return None
    return NewSplits(make_lora_spec(config.lora, seed=config.train.seed))


def _check_context(model: PreTrainedModel, config: RunConfig) -> None:
    text_config = model.config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and config.data.max_length > context:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but {config.model.path} was made for {context} tokens; set "
            f"data.max_length to {context} or less"
        )
    if config.model.attention == "sdpa" and getattr(text_config, "attn_logit_softcapping", None) is not None:
        raise ConfigError(
            f"model.attention is sdpa, which leaves out the softcap of {config.model.path}'s attention; leave it out, "
            "or choose eager"
        )


def _say(console: Console, text: object) -> None:
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)
