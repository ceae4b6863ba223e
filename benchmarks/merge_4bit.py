"""What is left of a fine-tune's gain when its adapter goes back into 4 bits.

    python -m benchmarks.merge_4bit RUN [--rows 64] [--examples 100] [--out X.json]

RUN is the folder of a finished run that held examples out. Losses are over the first of those: of the base in 4 bits,
of base and adapter, of both merged in 16 bits, of that rounded to 4 bits weight by weight, and calibrated as `halfbyte
merge --bits 4` does on the examples that the run learned. `kept` is the share of the adapter's gain. The base alone,
calibrated on the same rows, and in 16 bits, come last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.cli.calibration import read_calibration
from halfbyte.config import RunConfig
from halfbyte.config.load import load_config
from halfbyte.data import build_renderer, load_examples, prepare, split_held_out
from halfbyte.data.examples import TokenizedExample
from halfbyte.device import describe_machine
from halfbyte.export import export_calibrated, merge_in_place
from halfbyte.models import load_adapter, load_model
from halfbyte.nn import adapters_disabled, quantize_linears_
from halfbyte.train.batches import BatchOptions, iter_batches, pad_id_of
from halfbyte.train.evaluate import evaluate_loss
from halfbyte.train.setup import make_quant_spec

Row = dict[str, object]


def measure(run: Path, *, num_rows: int, num_examples: int) -> Iterator[Row]:
    """Yield the loss of each form."""
    config = load_config(run / "run.yaml")
    base, spec = config.model.path, make_quant_spec(config)
    assert spec is not None, "the run's base is not in 4 bits"
    loaded = load_model(base, quant=spec)
    model, tokenizer = loaded.model, loaded.tokenizer
    held_out = read_held_out(config, tokenizer)[:num_examples]

    def loss_of(one: PreTrainedModel) -> float:
        options = BatchOptions(pad_id=pad_id_of(tokenizer), row_tokens=config.data.max_length)
        return evaluate_loss(one, iter_batches(held_out, options, batch_size=2)).loss

    load_adapter(model, run)
    with adapters_disabled(model):
        losses = {"base, 4 bits": loss_of(model)}
    losses["base and adapter"] = loss_of(model)
    gain = losses["base, 4 bits"] - losses["base and adapter"]
    merged = merge_in_place(model)
    losses["merged, 16 bits"] = loss_of(merged)
    quantize_linears_(merged, spec)
    losses["merged, each weight rounded to 4 bits"] = loss_of(merged)
    for name, loss in losses.items():
        yield {"form": name, "loss": round(loss, 4), "kept": round((losses["base, 4 bits"] - loss) / gain, 3)}
    batches = read_calibration(
        config.data.train, config.data, tokenizer, num_rows=num_rows, held_out_seed=config.train.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, adapter in (("merged, 4 bits, calibrated", run), ("base, 4 bits, calibrated", None)):
            started = time.perf_counter()
            out = Path(folder) / str(adapter is None)
            export_calibrated(base, out, spec, batches, adapter=adapter, trained_on=spec)
            seconds = time.perf_counter() - started
            loss = loss_of(load_model(out, quant=spec).model)
            kept = {} if adapter is None else {"kept": round((losses["base, 4 bits"] - loss) / gain, 3)}
            yield {"form": name, "loss": round(loss, 4), **kept, "rows": num_rows, "seconds": round(seconds)}
    yield {"form": "base, 16 bits", "loss": round(loss_of(load_model(base, quant=None).model), 4)}


def read_held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedExample]:
    """Return the examples that a run held out, tokenised."""
    options = config.data
    loaded = load_examples(options.train, format=options.format, columns=options.columns, split=options.split)
    _, held_out = split_held_out(loaded.examples, options.held_out_fraction, config.train.seed)
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    return list(prepare(held_out, renderer, max_length=options.max_length, overlong=options.overlong).examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="of 512 tokens, to calibrate on")
    parser.add_argument("--examples", type=int, default=100, help="held-out examples to measure on")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for row in measure(options.run, num_rows=options.rows, num_examples=options.examples):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.out is not None:
        record = {"machine": str(describe_machine()), "threads": torch.get_num_threads(), "bench": "merge_4bit"}
        options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
