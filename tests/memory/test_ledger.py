"""Bytes and milliseconds as planned, against what an H100 and an H200 reserved and took; see docs/memory.md."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.memory.activation_policy import Policy
from halfbyte.memory.cards import H100, find_card
from halfbyte.memory.cost_model import CostModel
from halfbyte.memory.ledger import LedgerMaker, adapter_numbers, block_weight_bytes, optimizer_bytes
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.run_shape import Choice, RunShape
from halfbyte.memory.weight_slab import slab_bytes
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable, quantize_linears_
from halfbyte.nn.streamed_block import quantized_layers
from halfbyte.optim import build_optimizer
from halfbyte.quant import QuantSpec
from tests.memory.shapes import CONFIGS, shape_of
from tests.models.tiny import CONFIGS as TINY_CONFIGS
from tests.models.tiny import build_tiny

MEASURED = json.loads((Path(__file__).parent / "measured_plans.json").read_text())["rows"]
GIB = 2**30
SLACK_GIB = 120 / 1024


def name_of(row: dict[str, Any]) -> str:
    policies = "+".join(f"{policy}{count}" for policy, count in row["policies"])
    segments = "" if row["expandable_segments"] else "-fixed"
    return f"{row['model']}-{row['rows']}x{row['row_tokens']}-{policies}-{row['streamed_blocks']}{segments}"


def makers(row: dict[str, Any]) -> tuple[LedgerMaker, Choice]:
    run = RunShape(
        row_tokens=row["row_tokens"],
        batch_rows=row["rows"],
        pages_optimizer=True,
        expandable_segments=row["expandable_segments"],
    )
    choice = Choice(
        rows=row["rows"],
        policies=tuple((policy, count) for policy, count in row["policies"]),
        streamed_blocks=row["streamed_blocks"],
        embedding_on_host=row["embedding_on_host"],
    )
    return LedgerMaker(shape_of(row["model"]), run, find_card(row.get("card", H100.name))), choice


@pytest.mark.parametrize("row", MEASURED, ids=name_of)
def test_planned_bytes_are_what_was_measured(row: dict[str, Any]) -> None:
    maker, choice = makers(row)
    ledger = maker.make(choice)
    pairs = {"allocated": (ledger.allocated_bytes, row["allocated_gib"])}
    if row["expandable_segments"]:
        # Fixed segments leave gaps that no formula foretells; plans are for those that grow.
        pairs["reserved"] = ledger.reserved_bytes, row["reserved_gib"]
    for name, (planned_bytes, measured_gib) in pairs.items():
        planned = planned_bytes / GIB
        # Never more than 2% too little. At most 5% too much or, for the smallest models, the part of the allocator's
        # gaps that is planned for whatever the size.
        assert planned > 0.98 * measured_gib, f"{name}: planned {planned / measured_gib:.1%} of what was measured"
        most = max(1.05 * measured_gib, measured_gib + SLACK_GIB)
        assert planned < most, f"{name}: planned {planned / measured_gib:.1%} of what was measured"


# Where other work ran beside a row, its time was not taken.
@pytest.mark.parametrize("row", [row for row in MEASURED if row["micro_batch_ms"] is not None], ids=name_of)
def test_planned_speed_is_near_what_was_measured(row: dict[str, Any]) -> None:
    maker, choice = makers(row)
    share = 1e3 * CostModel(maker).predict(choice).micro_batch_seconds / row["micro_batch_ms"]
    # Cards of one type differ by 9%.
    assert 0.88 < share < 1.12, f"predicted {share:.1%} of what was measured"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_bytes_of_weights_adapters_and_state_are_exact(family: str, double_quant: bool, dora: bool) -> None:
    model = build_tiny(family)
    config = TINY_CONFIGS[family].to_dict()
    run = RunShape(rank=4, double_quant=double_quant, dora=dora)
    shape = ModelShape.from_config(config)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    quantize_linears_(model, QuantSpec(double_quant=double_quant))
    weights = quantized_layers(model.model.layers[0])
    assert sum(block_weight_bytes(shape, run)) == pytest.approx(slab_bytes(weights), abs=256)
    attach_adapters(model, LoraSpec(rank=4, dora=dora))
    trained = [parameter for _, parameter in iter_trainable(model)]
    assert shape.layers * adapter_numbers(shape, run) == sum(p.numel() for p in trained)
    optimizer = build_optimizer("adamw_8bit", [{"params": trained}], lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(
        tensor.nbytes
        for entry in optimizer.state_dict()["state"].values()
        for tensor in entry.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    )
    assert optimizer_bytes(shape, run) == pytest.approx(state, rel=0.01)


def test_a_checkpoint_on_its_way_is_planned_for() -> None:
    model = build_tiny("llama")
    quantize_linears_(model, QuantSpec())
    attach_adapters(model, LoraSpec(rank=512))
    trained = [parameter for _, parameter in iter_trainable(model)]
    optimizer = build_optimizer("adamw_8bit", [{"params": trained}], lr=1e-3)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    # Copies of the adapters and of the state, and the larger of the two files in memory.
    adapters, state = sum(p.nbytes for p in trained), file.getbuffer().nbytes
    run = RunShape(rank=512)
    maker = LedgerMaker(ModelShape.from_config(TINY_CONFIGS["llama"].to_dict()), run, H100)
    ledger = maker.make(Choice(rows=1, policies=(("keep", 2),)))
    (entry,) = [entry for entry in ledger.entries if entry.purpose.startswith("a checkpoint")]
    assert entry.host_bytes == pytest.approx(adapters + state + max(adapters, state), rel=0.02)


def test_dora_is_planned_to_take_its_products_and_magnitudes() -> None:
    shape, choice = shape_of("Llama-7B"), Choice(rows=4, policies=(("keep", 32),))

    def plan(**options: Any) -> tuple[float, int]:
        maker = LedgerMaker(shape, RunShape(fused=False, **options), H100)
        return CostModel(maker).predict(choice).seconds, maker.make(choice).device_bytes

    plain, dora, without_dropout = plan(), plan(dora=True), plan(dora=True, drops=False)
    assert plain[0] < without_dropout[0] < dora[0]
    assert plain[1] < dora[1] < plain[1] * 1.01
    # What was taken out of the base is as large as the adapters.
    maker = LedgerMaker(shape, RunShape(), H100)
    assert plan(keeps_first=True)[1] - plain[1] == 4 * maker.adapter_numbers


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_known_models_are_counted(name: str) -> None:
    config = dict(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert shape_of(name).num_parameters == sum(p.numel() for p in model.parameters())


def test_less_is_never_planned_to_take_more() -> None:
    maker = LedgerMaker(shape_of("Llama-7B"), RunShape(), find_card("24GiB"))
    mixes: list[tuple[tuple[Policy, int], ...]] = [
        (("block", 32),),
        (("block", 22), ("keep", 10)),
        (("block", 12), ("keep", 20)),
        (("keep", 32),),
    ]
    sizes = [maker.make(Choice(rows=4, policies=policies)).device_bytes for policies in mixes]
    assert sizes == sorted(set(sizes))
    on_device, visiting = (
        maker.make(Choice(rows=4, policies=(("keep", 32),), streamed_blocks=count)) for count in (0, 16)
    )
    assert visiting.device_bytes < on_device.device_bytes
    assert visiting.host_bytes > on_device.host_bytes
