"""A whole run: a model and a file of examples in, a tuned model out.

    plan -> load -> read, split, tokenise -> attach adapters -> measure -> train -> measure again -> summary

Everything a run leaves is in its output folder: adapter and tokenizer, run.yaml, summary.json, report.html, logs/,
checkpoint-N/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.config import RunConfig, resolve_output_dir
from halfbyte.config.held import hold
from halfbyte.config.load import lasting_config, to_yaml
from halfbyte.config.resolve import config_of_all
from halfbyte.device import keep_freed_memory, resolve_device
from halfbyte.distributed import World, current_world
from halfbyte.models.fingerprint import fingerprint_base
from halfbyte.nn import LoraSpec, adapters_disabled
from halfbyte.train.callbacks import ProgressLine
from halfbyte.train.continued import find_earlier
from halfbyte.train.evaluate import HeldOut
from halfbyte.train.loggers import check_loggers
from halfbyte.train.planning import PlannedRun, plan_run
from halfbyte.train.report import RunRecord, make_record, save_report
from halfbyte.train.samples import Sample, answer_questions, choose_questions
from halfbyte.train.saver import saying_what_is_left
from halfbyte.train.setup import RunData, attach, build_arguments, load_base, load_data, make_folder, prepare_folder
from halfbyte.train.summary import Comparison, Summary, make_summary, print_summary
from halfbyte.train.tokens import add_tokens
from halfbyte.train.trainer import HalfbyteTrainer, TrainerOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves in memory."""

    output_dir: Path
    model: PreTrainedModel
    """With its adapters, in eval mode."""
    tokenizer: PreTrainedTokenizerBase
    summary: Summary


def run_training(config: RunConfig, *, console: Console | None = None) -> RunResult:
    """Train as the config says.

    Args:
        config: The run.
        console: Where progress and summary go; by default stderr.

    Raises:
        HalfbyteError: Something cannot be honoured, read or gone on with; the message says what to do.
    """
    started = time.perf_counter()
    console = console or Console(stderr=True, highlight=False)
    world = current_world()
    config = _resolve_folder(config, world)
    check_loggers(config.train.report_to)
    device = resolve_device(config.model.device)
    if device.type == "cpu":
        keep_freed_memory()
    earlier = find_earlier(config)
    planned = plan_run(config, device)
    config = planned.config
    _say(console, planned.text)
    loaded = load_base(config, console, residency=planned.residency)
    base_fingerprint = fingerprint_base(loaded.source)
    _say(console, loaded.report)
    if earlier is not None:
        loaded = dataclasses.replace(loaded, tokenizer_folder=earlier.tokenizer)
    tokens = add_tokens(config, loaded.tokenizer)
    for note in (*(() if earlier is None else earlier.notes), *(() if tokens is None else (tokens.note,))):
        _say(console, note)
    data = load_data(config, loaded.tokenizer, console)
    spec, report = attach(loaded, config, tokens=tokens, earlier=earlier)
    _say(console, report)
    folder = make_folder(config)
    with hold(folder) if world.is_main else contextlib.nullcontext():
        checkpoint = prepare_folder(folder, config, functools.partial(_say, console))
        progress = ProgressLine(console)
        trainer = HalfbyteTrainer(
            loaded.model,
            build_arguments(config, on_cpu=loaded.report.device.type == "cpu", has_held_out=data.held_out is not None),
            train_dataset=data.train.examples,
            eval_dataset=None if data.held_out is None else data.held_out.examples,
            processing_class=loaded.tokenizer,
            callbacks=[progress],
            options=_trainer_options(config, spec, planned, base_fingerprint=base_fingerprint),
        )
        for line in (*trainer.notes, trainer.describe_plan(), f"writing to {folder}"):
            _say(console, line)
        comparison = _train_and_compare(trainer, _Judge(trainer, data, config), progress, checkpoint)
        summary = make_summary(trainer, report, comparison, seconds=time.perf_counter() - started)
        record = make_record(trainer, summary, config=config, folder=folder, data=data.train.report, plan=planned.plan)
        if world.is_main:
            _save_results(record, folder)
    print_summary(console, summary, folder)
    loaded.model.eval()
    return RunResult(output_dir=folder, model=loaded.model, tokenizer=loaded.tokenizer, summary=summary)


def _resolve_folder(config: RunConfig, world: World) -> RunConfig:
    """Return the configuration with an output folder, and whether its run goes on; all ranks as the first sees it."""
    config = resolve_output_dir(config, ranks=world.size)
    folder, resume = world.gather([config.output_dir, config.train.resume])[0]
    return dataclasses.replace(config, output_dir=folder, train=dataclasses.replace(config.train, resume=resume))


def _save_results(record: RunRecord, folder: Path) -> None:
    with saying_what_is_left(folder):
        save_report(record)
        # Last of all: it says that the run is complete.
        record.summary.save(folder)


def _train_and_compare(
    trainer: HalfbyteTrainer, judge: _Judge, progress: ProgressLine, checkpoint: str | None
) -> Comparison:
    before = judge.ask_base()
    if before.held_out is not None:
        _say(progress.console, f"before training: held-out {before.held_out}")
    try:
        with trainer.interruption.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.interruption.raise_stop(trainer.state.global_step, trainer.saver)
    finally:
        progress.close()
    return judge.compare(before, judge.ask_tuned())


def _trainer_options(
    config: RunConfig, spec: LoraSpec, planned: PlannedRun, *, base_fingerprint: str
) -> TrainerOptions:
    return TrainerOptions(
        row_tokens=config.data.max_length if config.data.packing else None,
        base_model=config.model.path,
        base_fingerprint=base_fingerprint,
        lora=spec,
        fused=config.train.fused,
        cuda_graphs=config.train.cuda_graphs,
        fp8=config.train.fp8,
        loraplus_lr_ratio=config.train.loraplus_lr_ratio,
        policies=planned.policies,
        on_bad_step=config.train.on_bad_step,
        loss_spike=config.train.loss_spike,
        config_text=to_yaml(lasting_config(config_of_all(config, current_world().size))),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    held_out: HeldOut | None
    answers: list[str]


class _Judge:
    """Measures the base and the tuned model on the same held-out text and questions."""

    def __init__(self, trainer: HalfbyteTrainer, data: RunData, config: RunConfig) -> None:
        self.trainer = trainer
        self.max_new_tokens = config.train.max_sample_tokens
        self.questions = choose_questions(
            data.held_out_examples, data.renderer, count=config.train.num_samples, max_tokens=config.data.max_length
        )

    def ask_base(self) -> _Verdict:
        with adapters_disabled(self.trainer.model):
            held_out = self.trainer.measure() if self.trainer.eval_dataset else None
        return _Verdict(held_out, self._answers(by_base=True))

    def ask_tuned(self) -> _Verdict:
        is_measured = self.trainer.held_out_step == self.trainer.state.global_step
        held_out = self.trainer.held_out if is_measured else None
        if held_out is None and self.trainer.eval_dataset:
            held_out = self.trainer.measure()
        return _Verdict(held_out, self._answers(by_base=False))

    def compare(self, before: _Verdict, after: _Verdict) -> Comparison:
        answers = zip(self.questions, before.answers, after.answers, strict=True)
        return Comparison(
            before=before.held_out,
            after=after.held_out,
            samples=tuple(
                Sample(origin=q.origin, question=q.text, expected=q.expected, before=first, after=second)
                for q, first, second in answers
            ),
        )

    def _answers(self, *, by_base: bool) -> list[str]:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return answer_questions(model, tokenizer, self.questions, max_new_tokens=self.max_new_tokens, by_base=by_base)


def _say(console: Console, text: object) -> None:
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)
