"""Write the tables of docs/several-gpus.md: how a step grows from one card to many, planned and not measured.

    python -m benchmarks.plan_ranks

Each rank has an H100 and 16 rows of 1024 tokens a step, so that the batch grows with the ranks; what is left of a
step's speed is what adding up gradients leaves. A ring sends 2 (n - 1) / n of all gradients through every rank's link
to the next; the slowest link decides, which is that between hosts as soon as there are two.
"""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.memory.cards import H100
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.plan import Budget, MemoryPlan, make_plan
from halfbyte.memory.run_shape import RunShape

PAGE = Path("docs/several-gpus.md")
GIB = 2**30
RANKS_OF_HOST, HOST_GIB, ROWS, ROW_TOKENS = 8, 1024, 16, 1024
# Bytes a second between neighbours in a ring, in 1e9: by NVLink, by a network card for each GPU, by one for each host.
WITHIN_HOST, NETWORKS = 150.0, {"400 Gb/s a GPU": 45.0, "100 Gb/s a host": 11.0}
WORLDS = (1, 2, 4, 8, 16, 32, 64)


def _llama(name: str, *, width: int, ff_width: int, layers: int, heads: int, key_heads: int, words: int) -> ModelShape:
    sizes = {"hidden_size": width, "intermediate_size": ff_width, "num_hidden_layers": layers, "vocab_size": words}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    return ModelShape.from_config({"model_type": "llama", **sizes, **heads_of}, name=name)


SHAPES = (
    _llama("7B", width=4096, ff_width=11008, layers=32, heads=32, key_heads=32, words=32000),
    _llama("70B", width=8192, ff_width=28672, layers=80, heads=64, key_heads=8, words=128256),
    _llama("405B", width=16384, ff_width=53248, layers=126, heads=128, key_heads=8, words=128256),
)


def plan_of(shape: ModelShape, ranks: int, network_gbps: float) -> MemoryPlan:
    """Return the plan of one rank among so many."""
    on_host = min(ranks, RANKS_OF_HOST)
    run = RunShape(
        row_tokens=ROW_TOKENS,
        batch_rows=ROWS,
        ranks=ranks,
        host_ranks=on_host,
        cards_reach=True,
        pages_optimizer=True,
        peer_gbps=WITHIN_HOST if ranks <= RANKS_OF_HOST else network_gbps,
    )
    budget = Budget(device_bytes=H100.memory_bytes, host_bytes=HOST_GIB * GIB // on_host)
    return make_plan(shape, run, H100, budget)


def table() -> str:
    """Return the table, in Markdown."""
    network_names = list(NETWORKS)
    lines = [
        f"| model | cards | weights | step | tokens/s, {network_names[0]} | of perfect | "
        f"tokens/s, {network_names[1]} | of perfect |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        alone = plan_of(shape, 1, WITHIN_HOST)
        perfect = alone.tokens_per_second(alone.best)
        for ranks in WORLDS:
            plans = [plan_of(shape, ranks, gbps) for gbps in NETWORKS.values()]
            cells = [
                f"{speed:,.0f} | {speed / ranks / perfect:.1%}"
                for speed in (plan.tokens_per_second(plan.best) for plan in plans)
            ]
            choice = plans[0].best.choice
            where = (
                f"{choice.streamed_blocks} of {shape.layers} blocks visit"
                if choice.streamed_blocks
                else "on every card"
            )
            where += " from the host's cards" if choice.home == "cards" else ""
            cards = f"{ranks}" if ranks <= RANKS_OF_HOST else f"{ranks}, {ranks // RANKS_OF_HOST} hosts"
            lines.append(
                f"| {shape.name} | {cards} | {where} | {plans[0].best.time.seconds:.2f} s | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    pattern = r"(<!-- planned -->\n).*?(\n<!-- end -->)"
    PAGE.write_text(
        re.sub(pattern, lambda match: match[1] + table() + match[2], text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
