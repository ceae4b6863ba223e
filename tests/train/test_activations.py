from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.memory.activation_policy import KeptNumbers, Policy
from halfbyte.models.fused_layers import (
    fuse_layers_,
    iter_fused_layers,
    kept_bytes_per_token,
    passing_bytes_per_token,
)
from halfbyte.models.modes import checkpoint_layers_
from halfbyte.train.activations import (
    PROBE_TOKENS,
    choose_checkpointing,
    choose_policy_,
    describe_policies,
    free_bytes,
    measure_kept_bytes,
    plan_policies,
)
from halfbyte.train.loss import LossPath
from tests.train.runs import build_model


def kept_on_cpu(model: PreTrainedModel) -> int:
    kept = measure_kept_bytes(model, LossPath(model))
    assert set(kept) == {torch.device("cpu")}
    return kept[torch.device("cpu")]


def test_measure_kept_bytes_grows_with_layers_and_leaves_no_trace() -> None:
    model = build_model().eval()
    before = torch.get_rng_state()
    kept = kept_on_cpu(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    # At least the input of each of 7 products and the products of the gated MLP, in 2 layers, in fp32.
    assert kept > 2 * PROBE_TOKENS * (4 * 64 + 3 * 96) * 4
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    assert 0.4 * kept < kept_on_cpu(model) < 0.7 * kept


def test_measure_kept_bytes_is_small_with_checkpointing() -> None:
    model = build_model()
    path = LossPath(model)
    kept = kept_on_cpu(model)
    checkpoint_layers_(model)
    assert kept_on_cpu(model) < kept / 3
    for wanted in (False, "auto"):
        assert choose_checkpointing(model, path, wanted=wanted, num_tokens=1)[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_choose_checkpointing_does_as_told(wanted: bool) -> None:
    model = build_model()
    assert choose_checkpointing(model, LossPath(model), wanted=wanted, num_tokens=1)[0] is wanted


def test_choose_checkpointing_weighs_the_batch_against_memory() -> None:
    model = build_model()
    path = LossPath(model)
    on, note = choose_checkpointing(model, path, wanted="auto", num_tokens=64)
    assert not on
    assert "gradient checkpointing: off" in note
    too_many = int(free_bytes(torch.device("cpu")) / kept_on_cpu(model) * PROBE_TOKENS)
    on, note = choose_checkpointing(model, path, wanted="auto", num_tokens=too_many)
    assert on
    assert "GiB are free for it" in note


def test_choose_policy_does_as_told_or_takes_over_what_the_model_has() -> None:
    model = build_model()
    fuse_layers_(model)
    for wanted, policy in ((True, "block"), (False, "keep")):
        assert "as set" in choose_policy_(model, wanted=wanted, num_tokens=1)
        assert {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)} == {policy}
    checkpoint_layers_(model)
    assert "as the model has it" in choose_policy_(model, wanted="auto", num_tokens=1)
    assert {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)} == {"block"}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_choose_policy_keeps_what_fits() -> None:
    model = build_model()
    fuse_layers_(model)
    room = free_bytes(torch.device("cpu")) * 0.8 / 1.1
    chosen = []
    for policy in ("keep", "mlp", "block"):
        kept = sum(one.device for one in kept_bytes_per_token(model, policy, itemsize=4))
        kept += passing_bytes_per_token(model, itemsize=4)
        note = choose_policy_(model, wanted="auto", num_tokens=int(0.97 * room / kept))
        chosen += {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)}
        assert "GiB are free for it" in note
    assert chosen == ["keep", "mlp", "block"]


def test_choose_policy_offloads_as_told_as_far_as_host_memory_goes() -> None:
    model = build_model()
    fuse_layers_(model)
    note = choose_policy_(model, wanted="offload", num_tokens=64)
    assert "in host memory" in note
    assert "as set" in note
    assert [layer.halfbyte_binding.policy for layer in iter_fused_layers(model)] == ["offload"] * 2
    one = kept_bytes_per_token(model, "offload", itemsize=4)[0].host
    note = choose_policy_(model, wanted="offload", num_tokens=int(free_bytes(torch.device("cpu")) / one * 0.6))
    assert [layer.halfbyte_binding.policy for layer in iter_fused_layers(model)] == ["block", "offload"]
    assert "of the first 1 blocks computed again" in note
    assert "of the last 1 in host memory" in note


LADDER = ("keep", "mlp", "offload", "block")
# Bytes a token of each of four blocks.
KEPT = {
    "keep": [KeptNumbers(9, 0)] * 4,
    "mlp": [KeptNumbers(6, 0)] * 4,
    "offload": [KeptNumbers(0, 4)] * 4,
    "block": [KeptNumbers(1, 0)] * 4,
}


@pytest.mark.parametrize(
    ("device", "host", "expected"),
    [
        (36, 0, ["keep"] * 4),
        (35, 0, ["mlp", "keep", "keep", "keep"]),
        (24, 0, ["mlp"] * 4),
        # 18 for three blocks and 4 for the one that is put away.
        (23, 99, ["offload", "mlp", "mlp", "mlp"]),
        (20, 99, ["offload", "offload", "mlp", "mlp"]),
        (8, 99, ["offload"] * 4),
        # Two in passing, and two that keep 1.
        (10, 8, ["block", "block", "offload", "offload"]),
        (3, 8, ["block", "block", "offload", "offload"]),
        (23, 0, ["block"] * 4),
    ],
)
def test_plan_policies_takes_the_fastest_mix_that_fits(device: int, host: int, expected: list[Policy]) -> None:
    assert plan_policies(KEPT, KeptNumbers(device, host), ladder=LADDER) == expected


def test_plan_policies_recomputes_where_nothing_is_put_away() -> None:
    assert plan_policies(KEPT, KeptNumbers(0, 99), ladder=("keep", "mlp", "block")) == ["block"] * 4
    assert plan_policies(KEPT, KeptNumbers(14, 99), ladder=("keep", "mlp", "block")) == ["block"] * 2 + ["mlp"] * 2


def test_describe_policies_names_first_and_last() -> None:
    assert describe_policies(["keep"] * 3) == "all kept"
    assert describe_policies(["block", "mlp", "mlp"]).startswith("of the first 1 blocks computed again")
