"""Plans against what happens: models and cards of every size, each run as its plan has it, under its budget.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python -m benchmarks.bench_plan --cases 65B:24,7B:6

Random 4-bit weights, rank 16 on all projections, NF4 with double quantisation, paged 8-bit AdamW, 8 rows of 1024 tokens
a step, in micro-batches of 4, dropout 0.05. The allocator may reserve the budget less the CUDA context, no more.
A row holds bytes and milliseconds, planned and measured; tests/memory/measured_plans.json keeps them for tests, and
docs/memory.md for people. On a GPU only.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator

import torch

from benchmarks.bench_memory import MODELS
from benchmarks.bench_train import Setting, measure_speed
from benchmarks.random_model import build_random_4bit
from halfbyte.device import default_compute_dtype, free_bytes, peak_resident_bytes
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.plan import Budget, MemoryPlan, Pins, make_plan
from halfbyte.memory.request import has_expandable_segments
from halfbyte.memory.run_shape import RunShape
from halfbyte.memory.this_machine import card_of
from halfbyte.models.host_embedding import host_embedding_

GIB = 2**30
ROWS, ROW_TOKENS, BATCH_ROWS, STEPS = 4, 1024, 8, 4
CASES = {
    "Llama-65B": (8, 24),
    "Llama-13B": (6, 12, 24),
    "Llama-7B": (4, 6, 8, 12),
    "Llama-3-8B": (6, 8, 12, 16),
    "Qwen2.5-7B": (6, 8, 12, 16),
    "Qwen3-4B": (4, 6, 8, 12),
    "Llama-3.2-1B": (2, 3, 4, 8),
    "SmolLM2-135M": (1, 1.5, 2, 4),
}


def rows(device: torch.device) -> Iterator[dict[str, object]]:
    """Yield each model under each budget."""
    if device.type == "cuda":
        for model, budgets in CASES.items():
            for gib in budgets:
                yield measure(model, gib, device)


def measure(model_name: str, gib: float, device: torch.device) -> dict[str, object]:
    """Plan, train as planned under the budget, and return both sides."""
    card = card_of(device)
    config = MODELS[model_name]
    shape = ModelShape.from_config(config.to_dict(), name=model_name)
    run = RunShape(
        row_tokens=ROW_TOKENS,
        batch_rows=BATCH_ROWS,
        pages_optimizer=True,
        expandable_segments=has_expandable_segments(),
    )
    budget = Budget(device_bytes=int(gib * GIB), host_bytes=free_bytes(torch.device("cpu")))
    plan = make_plan(shape, run, card, budget, pins=Pins(rows=ROWS))
    row: dict[str, object] = {"model": model_name, "budget_gib": gib, "fits": plan.fits, "card": card.name}
    if not plan.fits:
        return row
    return row | run_as_planned(plan, model_name, device)


def run_as_planned(plan: MemoryPlan, model_name: str, device: torch.device) -> dict[str, object]:
    """Train as a plan has it, and return bytes and milliseconds, planned and measured."""
    choice, ledger, card = plan.best.choice, plan.best.ledger, plan.card
    gc.collect()
    torch.cuda.empty_cache()
    allowed = plan.budget.device_bytes - card.context_bytes
    torch.cuda.set_per_process_memory_fraction(allowed / card.memory_bytes)
    started = time.perf_counter()
    try:
        model = build_random_4bit(MODELS[model_name], device, streamed_blocks=choice.streamed_blocks)
        if choice.embedding_on_host:
            host_embedding_(model, dtype=default_compute_dtype(device), device=device)
        built = time.perf_counter() - started
        setting = Setting(
            batch=choice.rows,
            seq=plan.run.row_tokens,
            steps=STEPS,
            accumulation=plan.run.batch_rows // choice.rows,
            checkpointing="auto",
            policies=choice.policy_of_blocks,
        )
        measured = measure_speed(model, setting)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "rows": choice.rows,
        "row_tokens": plan.run.row_tokens,
        "policies": [list(run) for run in choice.policies],
        "streamed_blocks": choice.streamed_blocks,
        "embedding_on_host": choice.embedding_on_host,
        "expandable_segments": plan.run.expandable_segments,
        "planned_allocated_gib": round(ledger.allocated_bytes / GIB, 2),
        "allocated_gib": measured["peak_alloc_GiB"],
        "planned_reserved_gib": round(ledger.reserved_bytes / GIB, 2),
        "reserved_gib": measured["peak_reserved_GiB"],
        "planned_micro_batch_ms": round(1e3 * plan.best.time.micro_batch_seconds, 1),
        "micro_batch_ms": measured["step_ms"],
        "planned_tokens_per_second": round(plan.tokens_per_second(plan.best)),
        "tokens_per_second": measured["tok_s"],
        "relieved": measured.get("relieved", []),
        "loss": measured["loss"],
        "build_s": round(built, 1),
        "peak_rss_gib": round(peak_resident_bytes() / GIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", required=True, help="MODEL:GIB,MODEL:GIB,...")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so many seconds")
    options = parser.parse_args()
    started = time.monotonic()
    for case in options.cases.split(","):
        if time.monotonic() - started > options.seconds:
            return
        name, _, gib = case.rpartition(":")
        print(json.dumps(measure(name, float(gib), torch.device("cuda", 0))), flush=True)


if __name__ == "__main__":
    main()
