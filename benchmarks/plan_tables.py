"""Write the tables of docs/memory.md: what was planned and measured, and what fits which card.

    python -m benchmarks.plan_tables

The first is made of tests/memory/measured_plans.json and today's plans, the second of plans alone, but for the cells
that were measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.bench_memory import MODELS
from halfbyte.memory.cards import H100, Card, find_card
from halfbyte.memory.cost_model import CostModel
from halfbyte.memory.ledger import LedgerMaker
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.plan import Budget, Pins, make_plan
from halfbyte.memory.run_shape import Choice, RunShape

PAGE = Path("docs/memory.md")
MEASURED = Path("tests/memory/measured_plans.json")
GIB = 2**30
WORDS = {"keep": "kept", "offload": "put away", "block": "computed again", "mlp": "kept but gate and up"}
TABLE_CARDS = ("6GiB", "8GiB", "RTX 3060 12GB", "16GiB", "RTX 4090", "L40S", "H100 SXM")
TABLE_MODELS = (
    "SmolLM2-135M",
    "Llama-3.2-1B",
    "Qwen3-4B",
    "Llama-7B",
    "Qwen2.5-7B",
    "Llama-3-8B",
    "Llama-13B",
    "Llama-65B",
)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("measured", measured_table()), ("fits", fits_table())):
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda match, table=table: match[1] + table + match[2], text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def measured_table() -> str:
    """Return what was planned beside what was measured, in Markdown."""
    lines = [
        "| model, rows x tokens | card | activations | blocks that visit | planned | reserved | "
        "| planned ms | measured ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(MEASURED.read_text())["rows"]:
        if row["expandable_segments"]:
            lines.append(_measured_line(row))
    return "\n".join(lines)


def _measured_line(row: dict[str, Any]) -> str:
    run = RunShape(row_tokens=row["row_tokens"], batch_rows=row["rows"], pages_optimizer=True)
    card = find_card(row.get("card", H100.name))
    maker = LedgerMaker(_shape(row["model"]), run, card)
    policies = tuple((policy, count) for policy, count in row["policies"])
    choice = Choice(
        rows=row["rows"],
        policies=policies,
        streamed_blocks=row["streamed_blocks"],
        embedding_on_host=row["embedding_on_host"],
    )
    planned = maker.make(choice).reserved_bytes / GIB
    predicted = 1e3 * CostModel(maker).predict(choice).micro_batch_seconds
    kept = ", ".join(f"{count} {WORDS[policy]}" for policy, count in policies)
    sizes = f"{row['model']}, {row['rows']} x {row['row_tokens']}"
    measured = "" if row["micro_batch_ms"] is None else f"{row['micro_batch_ms']:,.0f}"
    return (
        f"| {sizes} | {card.name.partition(' ')[0]} | {kept} | {row['streamed_blocks']} | {planned:.2f} GiB | "
        f"{row['reserved_gib']:.2f} GiB | {planned / row['reserved_gib'] - 1:+.1%} | {predicted:,.0f} | {measured} |"
    )


def fits_table() -> str:
    """Return how fast each model trains on each card, in Markdown."""
    cards = [find_card(name) for name in TABLE_CARDS]
    lines = ["| | " + " | ".join(card.name for card in cards) + " |", "|---" * (len(cards) + 1) + "|"]
    for name in TABLE_MODELS:
        lines.append(f"| {name} | " + " | ".join(_cell(name, card) for card in cards) + " |")
    return "\n".join(lines)


def _cell(name: str, card: Card) -> str:
    """Return the speed of one model on one card, with a letter for each thing that is not simply on the device."""
    run = RunShape(row_tokens=1024, batch_rows=8)
    budget = Budget(device_bytes=card.memory_bytes, host_bytes=64 * GIB)
    plan = make_plan(_shape(name), run, card, budget, pins=Pins())
    if not plan.fits:
        return "-"
    choice, speed = plan.best.choice, plan.tokens_per_second(plan.best)
    kinds = {policy for policy, _ in choice.policies}
    marks = ("w" * (choice.streamed_blocks > 0)) + ("a" * ("offload" in kinds)) + ("r" * bool(kinds & {"block", "mlp"}))
    digits = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    return f"{digits}{f' ({marks})' if marks else ''}"


def _shape(name: str) -> ModelShape:
    return ModelShape.from_config(MODELS[name].to_dict(), name=name)


if __name__ == "__main__":
    main()
