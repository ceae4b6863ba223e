"""Load beyond the ordinary: a million lines, a million tokens, a thousand shards, 32k context, rank 512.

    python -m benchmarks.load                               all cases, half an hour on 2 cores   (make load)
    python -m benchmarks.load --only long_context --lines 20000

Each case is a fresh process, so its peak of resident memory is its own; what it measures are the product's own steps,
or `halfbyte` commands as they are typed. Seconds are of the clock, `cpu_seconds` of the processors, workers included:
on a machine that is shared they tell more. Memory is in MiB, with the 400 that the libraries take once imported;
`worker_peak_mib` is the largest of the processes that render, which share most of it with the one that reads.

Cases that need a real tokenizer or model take --model. The data are invented here: support tickets of 50 to 250
characters.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import default_output, describe, write

CPU = torch.device("cpu")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROW_TOKENS = 1024
LOW_NUM_FILES = 256
WORDS = re.findall(
    r"\w+",
    "order parcel refund invoice address delivery account password payment card voucher shoes blue size return "
    "exchange yesterday arrived broken still waiting number please cannot find why when how long does take my the not",
)
Figures = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"comma-separated; of {', '.join(CASES)}")
    parser.add_argument("--model", default=MODEL, help="hub id or folder; only its name is recorded")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of a data file, and words of the long example")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options)))
        return 0
    rows = []
    for case in options.only.split(","):
        rows.append({"case": case, **in_own_process(case, options)})
        print(json.dumps(rows[-1]), flush=True)
    result = {**describe(CPU), "cores": os.cpu_count(), "model": Path(options.model).name, "rows": rows}
    write(result, options.output or default_output("load_limits", CPU))
    return 0


def in_own_process(case: str, options: argparse.Namespace) -> Figures:
    """Run one case in a process and a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--lines", str(options.lines), "--shards", str(options.shards)]
        words = ["-m", "benchmarks.load", "--case", case, "--folder", folder, "--model", options.model, *sizes]
        done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} ended with {done.returncode}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(options: argparse.Namespace) -> Figures:
    """Run the case in this process, with the peaks of memory and the processor's time."""
    figures = CASES[options.case](options)
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    figures["cpu_seconds"] = round(own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime, 1)
    figures.setdefault("peak_mib", round(own.ru_maxrss / 1024))
    if "tokenise_seconds" in figures:
        figures["worker_peak_mib"] = round(workers.ru_maxrss / 1024)
    return figures


def tickets(count: int, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield invented tickets; no two are equal."""
    chance = random.Random(seed)
    for number in range(count):
        question = " ".join(chance.choices(WORDS, k=chance.randint(5, 15)))
        answer = " ".join(chance.choices(WORDS, k=chance.randint(5, 18)))
        yield {"prompt": f"Order {number}: {question}?", "completion": f"{answer}."}


def write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def lines_jsonl(options: argparse.Namespace) -> Figures:
    """A JSONL file with a million lines, from the file to the first batch."""
    return from_file_to_batch(write_jsonl(options.folder / "tickets.jsonl", tickets(options.lines)), options)


def lines_csv(options: argparse.Namespace) -> Figures:
    """The same as CSV, read only: what follows knows nothing of the file."""
    from halfbyte.data import load_examples

    path = options.folder / "tickets.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, ["prompt", "completion"])
        table.writeheader()
        table.writerows(tickets(options.lines))
    clock = Clock()
    loaded = load_examples(path)
    return {"lines": len(loaded), "file_mib": mib_of(path), **clock.figures("read", len(loaded))}


def from_file_to_batch(source: Path, options: argparse.Namespace) -> Figures:
    """Read, hold out, tokenise, pack, and make the first batch, as `halfbyte train` does one after the other."""
    from halfbyte.cli.tuned import find_tokenizer
    from halfbyte.data import build_renderer, load_examples, prepare, split_held_out
    from halfbyte.train.batches import BatchOptions, build_loader, pad_id_of

    tokenizer, imported_mib = find_tokenizer(options.model), peak_mib()
    told: list[object] = []
    clock = whole = Clock()
    loaded = load_examples(source, on_progress=told.append)
    figures = {"lines": len(loaded), "imported_mib": imported_mib, **clock.figures("read", len(loaded))}
    clock = Clock()
    training, _ = split_held_out(loaded.examples, 0.05, 0)
    figures |= clock.figures("hold_out", len(loaded)) | {"peak_read_mib": peak_mib()}
    clock = Clock()
    prepared = prepare(
        training, build_renderer(tokenizer), max_length=ROW_TOKENS, on_progress=lambda *done: told.append(done)
    )
    figures |= clock.figures("tokenise", len(training)) | {"tokens": prepared.report.num_tokens}
    clock = Clock()
    batches = BatchOptions(pad_id=pad_id_of(tokenizer), row_tokens=ROW_TOKENS)
    loader = build_loader(prepared.examples, batches, batch_size=4, seed=0)
    figures |= clock.figures("pack", len(training))
    next(iter(loader))
    figures |= {"first_batch_seconds": whole.seconds, "progress_reports": len(told)}
    return figures


def long_example(options: argparse.Namespace) -> Figures:
    """One answer of a million words beside short ones: cut at the context, and said."""
    from halfbyte.cli.tuned import find_tokenizer
    from halfbyte.data import build_renderer, load_examples, prepare

    words = " ".join(random.Random(0).choices(WORDS, k=options.lines))
    rows = iter([*tickets(10), {"prompt": "All of it?", "completion": words}])
    path = write_jsonl(options.folder / "long.jsonl", rows)
    tokenizer = find_tokenizer(options.model)
    clock = Clock()
    prepared = prepare(load_examples(path).examples, build_renderer(tokenizer), max_length=ROW_TOKENS)
    (cut,) = prepared.report.cut
    return {"file_mib": mib_of(path), "example_tokens": cut.num_tokens, "seconds": clock.seconds}


def tiny_examples(options: argparse.Namespace) -> Figures:
    """Examples of three words: plain text tokenised, packed, and made into batches; each for itself."""
    from halfbyte.cli.tuned import find_tokenizer
    from halfbyte.data import Example, build_renderer, prepare
    from halfbyte.train.batches import BatchOptions, build_loader, pad_id_of

    tokenizer, chance = find_tokenizer(options.model), random.Random(0)
    count = max(options.lines // 5, 1)
    examples = [Example(f"x:{n}", text=" ".join(chance.choices(WORDS, k=3))) for n in range(count)]
    clock = Clock()
    prepared = prepare(examples, build_renderer(tokenizer), max_length=ROW_TOKENS)
    figures = {"examples": count, **clock.figures("tokenise", count)}
    clock = Clock()
    batches = BatchOptions(pad_id=pad_id_of(tokenizer), row_tokens=ROW_TOKENS)
    loader = build_loader(prepared.examples, batches, batch_size=4, seed=0)
    figures |= clock.figures("pack", count)
    clock = Clock()
    assert sum(len(batch["origins"]) for batch in loader) == count
    return figures | clock.figures("batches", count)


def data_shards(options: argparse.Namespace) -> Figures:
    """A folder of a thousand files of data, with few files allowed to be open."""
    from halfbyte.data import load_examples

    rows, rows_a_file = tickets(options.shards * 100), 100
    for number in range(options.shards):
        write_jsonl(options.folder / f"tickets-{number:04}.jsonl", (next(rows) for _ in range(rows_a_file)))
    allow_few_files()
    clock = Clock()
    loaded = load_examples(options.folder)
    return {"shards": options.shards, "lines": len(loaded), **clock.figures("read", len(loaded)), **open_files()}


def model_shards(options: argparse.Namespace) -> Figures:
    """A model in a thousand safetensors files with an index, loaded in 4 bits, with few files allowed to be open."""
    from halfbyte.export.shards import ShardWriter
    from halfbyte.models import load_model
    from halfbyte.quant import QuantSpec
    from tests.models.tiny import build_tiny, build_tokenizer

    # Nine tensors a layer: at least as many tensors as files, each file with one.
    model = build_tiny("llama", num_hidden_layers=-(-options.shards // 9), dtype=torch.bfloat16)
    model.config.save_pretrained(options.folder)
    build_tokenizer().save_pretrained(options.folder)
    tensors = model.state_dict()
    writer = ShardWriter(options.folder, tensors, max_shard_bytes=1)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    del model, tensors
    allow_few_files()
    clock = Clock()
    load_model(options.folder, quant=QuantSpec(), device=CPU)
    num_files = len(list(options.folder.glob("*.safetensors")))
    return {"shards": num_files, "seconds": clock.seconds, **open_files()}


def long_context(options: argparse.Namespace) -> Figures:
    """Two steps of one row of 32,768 tokens, by the command; a tiny model, so attention is nearly all of it."""
    from tests.models.tiny import build_tiny, build_tokenizer

    context = 32_768
    model = build_tiny("llama", max_position_embeddings=context, dtype=torch.bfloat16)
    model.save_pretrained(options.folder / "model")
    build_tokenizer().save_pretrained(options.folder / "model")
    chance = random.Random(0)
    words = (" ".join(f"w{chance.randint(4, 95)}" for _ in range(context - 8)) for _ in range(3))
    path = write_jsonl(options.folder / "long.jsonl", ({"text": text} for text in words))
    return train(options.folder / "model", path, options, f"--data.max_length={context}", "--lora.rank=8")


def wide_adapter(options: argparse.Namespace) -> Figures:
    """Two steps with adapters of rank 512 on all projections, wider than some of these are; saved and loaded."""
    path = write_jsonl(options.folder / "tickets.jsonl", tickets(40))
    figures = train(options.model, path, options, "--data.max_length=256", "--lora.rank=512")
    clock = Clock()
    spoken = command("generate", str(options.folder / "run"), "Where is my order?", "--max-new-tokens", "4")
    adapter = options.folder / "run" / "adapter_model.safetensors"
    return {**figures, "adapter_mib": mib_of(adapter), "generate_seconds": clock.seconds, "answered": bool(spoken)}


def train(model: Path | str, data: Path, options: argparse.Namespace, *words: str) -> Figures:
    """Train two steps by the command, and put its peak beside the plan's."""
    common = ["--train.max_steps=2", "--train.per_device_train_batch_size=1", "--train.gradient_accumulation_steps=1"]
    common += words
    record = json.loads(command("plan", str(model), "--gpu", "cpu", "--json", *common))
    output = options.folder / "run"
    clock = Clock()
    alone = ["--model.device=cpu", "--train.num_samples=0", "--data.held_out_fraction=0", "--output", str(output)]
    command("train", str(model), str(data), *common, *alone)
    summary = json.loads((output / "summary.json").read_text())
    return {
        "seconds": clock.seconds,
        "seconds_a_step": round(summary["train_seconds"] / summary["steps"], 2),
        "tokens": summary["num_tokens"],
        "plan_mib": round(record["best"]["host_bytes"] / 2**20),
        "trainable_parameters": summary["trainable_parameters"],
        "peak_mib": round(summary["peak_memory_bytes"] / 2**20),
    }


def command(*words: str) -> str:
    """Run a command of ours in this process, and return what it printed."""
    from halfbyte.cli.main import main as halfbyte

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = halfbyte(words)
    if code:
        raise RuntimeError(f"halfbyte {' '.join(words)} ended with {code}")
    return printed.getvalue()


class Clock:
    """Tells the seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 2)

    def figures(self, name: str, count: int) -> Figures:
        seconds = time.perf_counter() - self.started
        return {f"{name}_seconds": round(seconds, 2), f"{name}_per_second": round(count / max(seconds, 1e-9))}


def allow_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOW_NUM_FILES, LOW_NUM_FILES))


def open_files() -> Figures:
    folder = Path("/proc/self/fd")
    return {"allowed_open": LOW_NUM_FILES, "left_open": len(list(folder.iterdir())) if folder.exists() else None}


def peak_mib() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def mib_of(path: Path) -> float:
    return round(path.stat().st_size / 2**20, 1)


CASES: dict[str, Callable[[argparse.Namespace], Figures]] = {
    case.__name__: case
    for case in (
        lines_jsonl,
        lines_csv,
        long_example,
        tiny_examples,
        data_shards,
        model_shards,
        long_context,
        wide_adapter,
    )
}


if __name__ == "__main__":
    raise SystemExit(main())
