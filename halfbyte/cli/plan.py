"""halfbyte plan: what a run will take of memory and how fast it will be, from a config.json alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser, add_override
from halfbyte.cli.console import json_text
from halfbyte.cli.planned import describe_run, find_shape, take_gpus
from halfbyte.config import DataSection, LoraSection, MemorySection, ModelSection, QuantSection, RunConfig, TrainSection
from halfbyte.config.load import make_section, parse_overrides, read_yaml
from halfbyte.config.memory import parse_size

if TYPE_CHECKING:
    from halfbyte.memory.cards import Card

SECTIONS = ("model.revision", "model.dtype", "quant", "lora", "data", "train", "memory")
NO_DATA = "(none)"
# Of host memory, where this machine is not the one planned for.
ASSUMED_HOST = "64GiB"
EXAMPLES = """
examples:
  halfbyte plan meta-llama/Llama-3.1-8B --gpu 12GiB
  halfbyte plan ./Llama-65B/config.json --gpu "RTX 4090" --host 64GiB
  halfbyte plan run.yaml --gpu this

Speeds on cards other than the H100 and the H200 are scaled by data sheets: a guess, and said so.
"""


def add_arguments(parser: CommandParser) -> None:
    parser.usage = "halfbyte plan MODEL [DATA] [--gpu CARD] [options]\n       halfbyte plan RUN.yaml [--gpu CARD]"
    parser.add_argument(
        "source", metavar="MODEL|RUN.yaml", help="hub id, folder, config.json or GGUF file; or a YAML file of options"
    )
    parser.add_argument("data", metavar="DATA", nargs="?", help="examples: how long a run over them takes")
    parser.add_argument("--gpu", metavar="CARD", default="this", help='8GiB, "RTX 4090", cpu, or this (default)')
    parser.add_argument("--gpus", metavar="NxCARD", help='several on one host, a rank each: 2x24GiB, 4x"RTX 4090"')
    parser.add_argument("--host", metavar="SIZE", help=f"host memory; default: this machine's, or {ASSUMED_HOST}")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    config, ranks = _read_config(args), take_gpus(args)
    card = _find_card(args, config)

    from halfbyte.memory.plan import Budget, make_plan
    from halfbyte.memory.plan_text import as_record, show_plan, why_nothing_fits
    from halfbyte.memory.request import pins_of, run_shape_of, share_of_batch

    config = share_of_batch(config, ranks)
    shape = find_shape(config.model.path, config.model.revision)
    is_narrow = config.compute_dtype != "float32" and (card.is_gpu or card.has_bf16)
    run_shape = run_shape_of(
        config,
        compute_bytes=2 if is_narrow else 4,
        is_fusable=shape.is_fusable,
        ranks=ranks,
        host_ranks=ranks,
        # Who asks for it has the bridge that a size or a name does not tell of; training looks.
        cards_reach=card.peer_gbps > 0 or not card.is_gpu or bool(config.memory.sharded),
    )
    budget = Budget(
        device_bytes=min(card.memory_bytes if card.is_gpu else 0, config.memory.gpu_bytes or card.memory_bytes),
        host_bytes=_host_bytes(args, config, card) // ranks,
    )
    pins = pins_of(config)
    plan = make_plan(shape, run_shape, card, budget, pins=pins)
    if args.json:
        print(json_text(as_record(plan)))
        return 0 if plan.fits else 2
    if not plan.fits:
        raise why_nothing_fits(plan, pins)
    print(show_plan(plan))
    if card.is_gpu and args.host is None and config.memory.host is None:
        print(f"host memory: {ASSUMED_HOST} assumed; --host tells otherwise")
    if args.data:
        print(describe_run(config, plan))
    return 0


def _read_config(args: argparse.Namespace) -> RunConfig:
    """Return the run that is planned; its data may be left out."""
    path = Path(args.source) if args.source.lower().endswith((".yaml", ".yml")) else None
    add_override(args, "model.path", None if path else args.source)
    add_override(args, "data.train", args.data)
    values = (read_yaml(path) if path else {}) | parse_overrides(args.overrides)
    values.setdefault("data.train", NO_DATA)
    model: ModelSection = make_section("model", values)
    data: DataSection = make_section("data", values)
    quant: QuantSection = make_section("quant", values)
    lora: LoraSection = make_section("lora", values)
    train: TrainSection = make_section("train", values)
    memory: MemorySection = make_section("memory", values)
    return RunConfig(model=model, data=data, quant=quant, lora=lora, train=train, memory=memory)


def _find_card(args: argparse.Namespace, config: RunConfig) -> Card:
    from halfbyte.memory.cards import find_card

    if args.gpu not in ("this", "cpu"):
        return find_card(args.gpu)
    from halfbyte.device import resolve_device
    from halfbyte.memory.this_machine import card_of

    device = resolve_device("cpu" if args.gpu == "cpu" else config.model.device)
    return card_of(device)


def _host_bytes(args: argparse.Namespace, config: RunConfig, card: Card) -> int:
    if args.host is not None:
        return parse_size(args.host, option="--host")
    if config.memory.host_bytes is not None:
        return config.memory.host_bytes
    return card.memory_bytes if not card.is_gpu else parse_size(ASSUMED_HOST, option="--host")
