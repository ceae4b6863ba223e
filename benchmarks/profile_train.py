"""Where the time of a training step on a GPU goes: kernels by class, beside what each class has to take at least.

    python -m benchmarks.profile_train --output profile.json --picture docs/h100_step.svg
    python -m benchmarks.profile_train --fp8 --dropout 0.05 --kernels 40

One micro-batch of Llama-7B's shape, 4 x 1024 tokens, through fused blocks, launched kernel by kernel under torch's
profiler. Floors are from arithmetic: operations at PEAK_FLOPS, bytes at PEAK_BYTES, both as measured for large products
and copies on an H100; of attention what its kernel took alone. A kernel may beat them where its data stays in caches.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_train import LLAMA_7B, build_random_model
from halfbyte.models.attention import DocumentLayout
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.nn import LoraSpec, attach_adapters
from halfbyte.train.loss import LossPath

ROWS, TOKENS = 4, 1024
PEAK_FLOPS, PEAK_BYTES = 790e12, 2.99e12
ATTENTION_MS = 0.47
FROZEN, SMALL = "products of frozen weights and the head", "products of adapters"
# By what a kernel's name contains, the first that does.
CLASSES = {
    "_dequantize": "expanding 4-bit weights",
    "cudnn": "attention",
    "swiglu": "gated product",
    "rms_norm": "norms",
    "rotate": "rotation",
    "_adapter_inner": "adapters: inner products, casts",
    "_stack_adapters": "adapters: inner products, casts",
    "_adapter_columns": "adapters: inner products, casts",
    "_quantize_rows": "bringing activations to fp8",
    "cross_entropy": "loss",
}
OTHERS = "copies, sums and the rest"
# A product of the frozen weights takes longer than this, one of an adapter less.
SMALL_PRODUCT_US = 150


def floors_ms() -> dict[str, float]:
    """Return the least milliseconds of each class that has a floor worth the name."""
    width, ff_width, layers = LLAMA_7B["hidden_size"], LLAMA_7B["intermediate_size"], LLAMA_7B["num_hidden_layers"]
    tokens = ROWS * TOKENS
    weights = layers * (4 * width**2 + 3 * width * ff_width)
    flops = 2 * tokens * (2 * weights - 3 * width**2 + 2 * width * LLAMA_7B["vocab_size"])
    moved = {
        "expanding 4-bit weights": 2 * weights * (0.5 + 1 / 64 + 2),
        "gated product": layers * tokens * 2 * ff_width * (3 + 7),
        "norms": layers * tokens * 2 * width * (2 + 4 + 2 * 5),
        "rotation": layers * tokens * 2 * width * 2 * (2 + 2),
    }
    floors = {name: 1e3 * num_bytes / PEAK_BYTES for name, num_bytes in moved.items()}
    return {FROZEN: 1e3 * flops / PEAK_FLOPS, "attention": ATTENTION_MS * layers, **floors}


def classify(kernels: Iterable[tuple[str, float]]) -> list[dict[str, object]]:
    """Return milliseconds, launches and floor of each class of kernels, given as name and microseconds."""
    spent: dict[str, list[float]] = {}
    for name, microseconds in kernels:
        spent.setdefault(_class_of(name, microseconds), []).append(microseconds)
    floors = floors_ms()
    classes = sorted(spent.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "class": name,
            "ms": round(sum(times) / 1e3, 2),
            "launches": len(times),
            "floor_ms": round(floors[name], 1) if name in floors else None,
        }
        for name, times in classes
    ]


def _class_of(name: str, microseconds: float) -> str:
    if name.startswith(("nvjet", "sm90_xmma", "cutlass")):
        return FROZEN if microseconds > SMALL_PRODUCT_US else SMALL
    return next((label for part, label in CLASSES.items() if part in name), OTHERS)


def draw(rows: list[dict[str, object]], title: str) -> str:
    """Return an SVG: a bar a class, its floor in dark."""
    height, scale = 26, 2.8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1020" height="{60 + height * len(rows)}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="12" y="24" font-size="15">{title}</text>',
    ]
    for number, row in enumerate(rows):
        y, ms, floor = 44 + height * number, float(str(row["ms"])), row["floor_ms"]
        lines.append(f'<text x="290" y="{y + 13}" text-anchor="end">{row["class"]}</text>')
        lines.append(f'<rect x="300" y="{y}" width="{ms * scale:.1f}" height="18" fill="#9ecae1"/>')
        if floor is not None:
            lines.append(f'<rect x="300" y="{y}" width="{float(str(floor)) * scale:.1f}" height="18" fill="#3182bd"/>')
        longest = max(ms, float(str(floor or 0)))
        expected = "" if floor is None else f", {floor} by arithmetic"
        text = f"{ms} ms{expected}; {row['launches']} launches"
        lines.append(f'<text x="{306 + longest * scale:.0f}" y="{y + 13}">{text}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def profile_step(device: torch.device, *, fp8: bool, dropout: float) -> list[tuple[str, float]]:
    """Return name and microseconds of every kernel of one micro-batch."""
    model = build_random_model(LLAMA_7B, device)
    attach_adapters(model, LoraSpec(dropout=dropout, seed=0))
    fuse_layers_(model, fp8=fp8)
    loss_path = LossPath(model)
    model.train()
    ids = torch.randint(4, LLAMA_7B["vocab_size"], (ROWS, TOKENS), device=device)
    batch = {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(TOKENS, device=device).expand(ROWS, TOKENS).contiguous(),
        "cu_seq_lens": torch.arange(0, ROWS * TOKENS + 1, TOKENS, dtype=torch.int32, device=device),
        "document_layout": DocumentLayout(runs=((ROWS, TOKENS),), max_length=TOKENS),
        "trained": torch.arange(ROWS * TOKENS, device=device),
    }
    for _ in range(4):
        loss_path(batch, num_items=ROWS * TOKENS).backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        loss_path(batch, num_items=ROWS * TOKENS).backward()
        torch.cuda.synchronize()
    return [(e.name, e.device_time) for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def print_kernels(kernels: Iterable[tuple[str, float]], count: int) -> None:
    """Print milliseconds, launches and microseconds a launch of the kernels that take longest together."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, microseconds in kernels:
        times[name].append(microseconds)
    for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:count]:
        print(f"{sum(spent) / 1e3:8.2f} ms {len(spent):5} x {sum(spent) / len(spent):7.1f} us  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the rows go as JSON; default: stdout")
    parser.add_argument("--picture", type=Path, help="where an SVG goes")
    parser.add_argument("--fp8", action="store_true", help="fp8 products of the frozen weights")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--kernels", type=int, default=0, help="print so many kernels by name")
    options = parser.parse_args()
    kernels = profile_step(torch.device("cuda"), fp8=options.fp8, dropout=options.dropout)
    print_kernels(kernels, options.kernels)
    rows = classify(kernels)
    total = sum(float(str(row["ms"])) for row in rows)
    title = f"{torch.cuda.get_device_name()}, Llama-7B shape, {ROWS} x {TOKENS} tokens: {total:.0f} ms of kernels"
    text = json.dumps({"title": title, "rows": rows}, indent=1) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        options.output.write_text(text)
    if options.picture is not None:
        options.picture.write_text(draw(rows, title))


if __name__ == "__main__":
    main()
