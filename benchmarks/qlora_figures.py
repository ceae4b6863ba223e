"""The figures of docs/how-qlora-works.md: errors and losses of 4-bit weights, and bytes of a 7B run by technique.

    python -m benchmarks.qlora_figures                              writes the page's tables
    python -m benchmarks.qlora_figures --measure MODEL --data FILE  measures first, some minutes on a CPU

Errors are over all linear layers of MODEL and over normal numbers: the root of the squared error's sum over that of the
weights. Losses are over the first answers of FILE, in float32, so that nothing but the weights differs. Bytes of the
7B run are the memory plan's, which is checked against an H100 (docs/memory.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.bench_memory import MODELS
from halfbyte.data import build_renderer, load_examples, prepare
from halfbyte.device import describe_machine
from halfbyte.memory.cards import H100
from halfbyte.memory.ledger import LedgerMaker
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.run_shape import Choice, RunShape
from halfbyte.models import load_model
from halfbyte.ops import quantize_4bit
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.quant import QuantSpec
from halfbyte.train.batches import BatchOptions, iter_batches, pad_id_of
from halfbyte.train.evaluate import evaluate_loss

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "how-qlora-works.md"
RESULTS = REPOSITORY / "benchmarks" / "results" / "qlora_figures_cpu_202611.json"
GIB = 2**30
NUM_EXAMPLES, ROW_TOKENS, NUM_NORMAL = 50, 512, 2**22
SPECS = (
    QuantSpec(codebook="nf4", double_quant=False),
    QuantSpec(codebook="nf4"),
    QuantSpec(codebook="fp4", double_quant=False),
    QuantSpec(codebook="fp4"),
    QuantSpec(codebook="nf4", block_size=32),
    QuantSpec(codebook="nf4", block_size=128),
    QuantSpec(codebook="nf4", block_size=256),
)
Row = dict[str, object]


def measure(model: str, data: Path) -> Iterator[Row]:
    """Yield errors, bits a weight and the loss of each way to quantise; those of float32 weights first."""
    loaded = load_model(model, quant=None, compute_dtype="float32", device="cpu")
    head = loaded.model.get_output_embeddings()
    weights = [m.weight.detach() for m in loaded.model.modules() if isinstance(m, nn.Linear) and m is not head]
    normal = torch.randn(NUM_NORMAL, generator=torch.Generator().manual_seed(0)).view(-1, 1024)
    batches = make_batches(loaded.tokenizer, data)
    yield {"codebook": "none", "loss": round(evaluate_loss(loaded.model, batches).loss, 4)}
    for spec in SPECS:
        packed = load_model(model, quant=spec, compute_dtype="float32", device="cpu").model
        yield {
            "codebook": spec.codebook,
            "block_size": spec.block_size,
            "double_quant": spec.double_quant,
            "bits": round(bits_per_weight(weights, spec), 4),
            "error_normal": round(relative_error([normal], spec), 5),
            "error_weights": round(relative_error(weights, spec), 5),
            "loss": round(evaluate_loss(packed, batches).loss, 4),
        }


def make_batches(tokenizer, data: Path) -> list:  # type: ignore[no-untyped-def, type-arg]
    """Return the first answers of a file as plain text: no template, of which a base model knows nothing."""
    examples = load_examples(data, format="text", columns={"text": "answer"}).examples[:NUM_EXAMPLES]
    prepared = prepare(examples, build_renderer(tokenizer, train_on="all"), max_length=ROW_TOKENS)
    options = BatchOptions(pad_id=pad_id_of(tokenizer), row_tokens=ROW_TOKENS)
    return list(iter_batches(prepared.examples, options, batch_size=1))


def relative_error(weights: list[torch.Tensor], spec: QuantSpec) -> float:
    wrong = total = 0.0
    for weight in weights:
        restored = dequantize_4bit(quantize_4bit(weight, spec), dtype=torch.float32)
        wrong += (weight - restored).double().square().sum().item()
        total += weight.double().square().sum().item()
    return (wrong / total) ** 0.5


def bits_per_weight(weights: list[torch.Tensor], spec: QuantSpec) -> float:
    packed = [quantize_4bit(weight, spec) for weight in weights]
    return 8 * sum(q.nbytes for q in packed) / sum(q.numel for q in packed)


def error_table() -> str:
    """Return what was measured, in Markdown."""
    lines = [
        "| 4-bit form | block | scales | bits a weight | error, normal numbers | error, SmolLM2-135M | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(RESULTS.read_text())["rows"]:
        if row["codebook"] == "none":
            lines.append(f"| none: float32 | | | 32 | 0 | 0 | {row['loss']:.4f} |")
            continue
        scales = "8 bits" if row["double_quant"] else "32 bits"
        lines.append(
            f"| {row['codebook'].upper()} | {row['block_size']} | {scales} | {row['bits']:.3f} | "
            f"{row['error_normal']:.2%} | {row['error_weights']:.2%} | {row['loss']:.4f} |"
        )
    return "\n".join(lines)


def technique_table() -> str:
    """Return the bytes of a 7B run, one technique after the other, in Markdown."""
    kept, away = (("keep", 32),), (("offload", 32),)
    steps = (
        ("16-bit weights, adapters, 32-bit AdamW", {"in_4bit": False, "state_bits": 32}, {"policies": kept}),
        ("weights in NF4", {"double_quant": False, "state_bits": 32}, {"policies": kept}),
        ("scales in 8 bits", {"state_bits": 32}, {"policies": kept}),
        ("AdamW's state in 8 bits", {}, {"policies": kept}),
        ("... and in host memory", {"pages_optimizer": True}, {"policies": kept}),
        ("activations in host memory", {"pages_optimizer": True}, {"policies": away}),
        ("weights of 24 blocks visit", {"pages_optimizer": True}, {"policies": away, "streamed_blocks": 24}),
    )
    lines = ["| | on the GPU | saves | host memory |", "|---|---|---|---|"]
    before = None
    for name, run, choice in steps:
        ledger = LedgerMaker(shape_7b(), RunShape(**run), H100).make(Choice(rows=4, **choice))  # type: ignore[arg-type]
        device, host = ledger.device_bytes / GIB, ledger.host_bytes / GIB
        saves = "" if before is None else f"{before - device:.2f} GiB"
        lines.append(f"| {name} | {device:.2f} GiB | {saves} | {host:.2f} GiB |")
        before = device
    return "\n".join(lines)


def part_table() -> str:
    """Return the bytes of a 7B run by part, in Markdown."""
    ledger = LedgerMaker(shape_7b(), RunShape(), H100).make(Choice(rows=4, policies=(("keep", 32),)))
    lines = ["| part | on the GPU |", "|---|---|"]
    small = 0.0
    for entry in ledger.entries:
        if entry.device_bytes < 0.05 * GIB:
            small += entry.device_bytes
        else:
            lines.append(f"| {entry.purpose} | {entry.device_bytes / GIB:.2f} GiB |")
    lines += [f"| smaller parts | {small / GIB:.2f} GiB |", f"| in all | {ledger.device_bytes / GIB:.2f} GiB |"]
    return "\n".join(lines)


def shape_7b() -> ModelShape:
    return ModelShape.from_config(MODELS["Llama-7B"].to_dict(), name="Llama-7B")


def render_page(text: str) -> str:
    """Return the page with its tables made anew."""
    for name, table in (("error", error_table()), ("parts", part_table()), ("techniques", technique_table())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--data", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.measure:
        rows = []
        for row in measure(options.measure, options.data):
            rows.append(row)
            print(json.dumps(row), flush=True)
        record = {
            "machine": str(describe_machine()),
            "date": datetime.date.today().isoformat(),
            "bench": "qlora_figures",
            "model": Path(options.measure).name,
            "data": f"the first {NUM_EXAMPLES} answers of {options.data.parent.name}/{options.data.name}",
        }
        RESULTS.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    if PAGE.exists():
        PAGE.write_text(render_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
