"""The main job on a small model: train it on a shop's tickets, ask what it has learned, merge, and use the result.

    python -m examples.shop.demo MODEL [--output DIR]

MODEL is SmolLM2-135M-Instruct as hub id, folder or GGUF file (`make demo` finds one). What it shows: held-out loss and
answers before and after, and how many of the held-out questions' facts are right. What it leaves: the run with its
adapter in DIR, one plain transformers model in DIR-merged. It ends with status 1 if too few facts were learned.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.shop.scoring import HELD_OUT, TICKETS, Question, count_right, load_questions, states_fact
from halfbyte import (
    DataSection,
    GenerationOptions,
    HalfbyteError,
    ModelSection,
    RunConfig,
    TrainSection,
    adapters_disabled,
    generate_text,
    merge_adapter,
    run_training,
)
from halfbyte.train import RunResult

WANTED_AFTER, ALLOWED_BEFORE = 0.6, 0.1
NUM_EPOCHS = 2.0
MAX_ANSWER_TOKENS = 32
NUM_SHOWN = 8
SHOWN_CHARACTERS = 90
NUM_CHECKED = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the model says to every held-out question, without and with what it learned."""

    questions: list[Question]
    before: list[str]
    after: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shop.demo", description="Train a small model on a shop's tickets."
    )
    parser.add_argument("model", help="SmolLM2-135M-Instruct: hub id, folder or GGUF file")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quillmoor"), help="folder to write; replaced if there"
    )
    parser.add_argument(
        "--epochs", type=float, default=NUM_EPOCHS, help="times through the tickets; default: %(default)s"
    )
    args = parser.parse_args(arguments)
    console = Console(highlight=False)
    started = time.perf_counter()
    try:
        result = run_training(demo_config(args.model, args.output, num_epochs=args.epochs), console=console)
        with console.status("asking the held-out questions, without the adapter and with it"):
            answers = ask(result)
        show_answers(console, answers)
        passed = show_score(console, result, answers)
        merged = args.output.with_name(f"{args.output.name}-merged")
        console.print(str(merge_adapter(args.model, args.output, merged, overwrite=True)), markup=False, soft_wrap=True)
    except HalfbyteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    show_merged(console, merged, answers)
    show_next(console, args.output, merged, seconds=time.perf_counter() - started)
    return 0 if passed else 1


def demo_config(model: str, output: Path, *, num_epochs: float = NUM_EPOCHS) -> RunConfig:
    """Return the run: the defaults, but for what suits a model this small and facts to be learned by heart.

    The learning rate is ten times that for a large model, and gradients are clipped less. A step sees one packed row of
    256 tokens, four or five tickets: for the same time, many small steps learn more than few large ones.
    """
    return RunConfig(
        model=ModelSection(path=model),
        data=DataSection(train=str(TICKETS), held_out=str(HELD_OUT), max_length=256),
        train=TrainSection(
            num_train_epochs=num_epochs,
            per_device_train_batch_size=1,
            learning_rate=2e-3,
            max_grad_norm=1.0,
            num_samples=0,
            overwrite=True,
        ),
        output_dir=str(output),
    )


def ask(result: RunResult) -> Answers:
    """Put every held-out question to the base model and to the tuned one."""
    questions = load_questions()
    prompts = [[{"role": "user", "content": asked.question}] for asked in questions]
    options = GenerationOptions(max_new_tokens=MAX_ANSWER_TOKENS, batch_size=len(prompts))
    with adapters_disabled(result.model):
        before = generate_text(result.model, result.tokenizer, prompts, options=options)
    after = generate_text(result.model, result.tokenizer, prompts, options=options)
    return Answers(questions=questions, before=before, after=after)


def show_answers(console: Console, answers: Answers) -> None:
    """Show some of the answers side by side, spread evenly over the questions."""
    table = Table(title="held-out questions", title_justify="left", show_lines=True, expand=True)
    for heading in ("question", "before", "after"):
        table.add_column(heading, ratio=1)
    for shown in range(NUM_SHOWN):
        # Each fact has two questions; now the first is shown, now the second.
        number = shown * len(answers.questions) // NUM_SHOWN + shown % 2
        asked, after = answers.questions[number], _one_line(answers.after[number])
        missed = "" if states_fact(answers.after[number], asked.facts) else f"\n[red]right: {asked.facts[0]}[/]"
        table.add_row(asked.question, _one_line(answers.before[number]), f"[green]{after}[/]{missed}")
    console.print(table)


def show_score(console: Console, result: RunResult, answers: Answers) -> bool:
    """Show loss and facts before and after; return whether the facts are as many as they should be."""
    total = len(answers.questions)
    before, after = count_right(answers.questions, answers.before), count_right(answers.questions, answers.after)
    loss_before, loss_after = result.summary.held_out_before, result.summary.held_out_after
    assert loss_before is not None
    assert loss_after is not None
    table = Table("", "before", "after", title=f"{total} held-out questions", title_justify="left")
    table.add_row("loss", f"{loss_before.loss:.3f}", f"{loss_after.loss:.3f}")
    table.add_row("facts right", f"{before} of {total}", f"{after} of {total}")
    table.add_row("", f"{before / total:.0%}", f"{after / total:.0%}")
    console.print(table)
    passed = after >= WANTED_AFTER * total and before <= ALLOWED_BEFORE * total
    console.print(
        f"wanted: at least {WANTED_AFTER:.0%} after, at most {ALLOWED_BEFORE:.0%} before: "
        f"{'reached' if passed else 'NOT REACHED'}",
        style="green" if passed else "red",
    )
    return passed


def show_merged(console: Console, folder: Path, answers: Answers) -> None:
    """Answer some questions with the merged model, loaded by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # fp32, because many CPUs are slow at 16 bits.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = Table("question", "with the adapter", "merged", title_justify="left", show_lines=True, expand=True)
    table.title = f"{folder} in plain transformers"
    stride = len(answers.questions) // NUM_CHECKED
    for asked, tuned in list(zip(answers.questions, answers.after, strict=True))[::stride][:NUM_CHECKED]:
        messages = [{"role": "user", "content": asked.question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        table.add_row(asked.question, _one_line(tuned), _one_line(answer))
    console.print(table)


def show_next(console: Console, run: Path, merged: Path, *, seconds: float) -> None:
    """Say what there is now, and what to type."""
    console.print(f"{seconds / 60:.1f} minutes in all\n")
    for command, what in (
        (f"halfbyte chat {run} --compare", "talk to it, the base model's answers beside"),
        (f"halfbyte eval {run} {os.path.relpath(HELD_OUT)}", "measure it again"),
        (f"halfbyte chat {merged}", "talk to the merged model"),
        ("halfbyte train MODEL YOUR.jsonl", "train on your own"),
    ):
        console.print(f"  [bold].venv/bin/{command}[/]   {what}", soft_wrap=True)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    # What a model says may look like markup.
    return escape(line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}...")


if __name__ == "__main__":
    sys.exit(main())
