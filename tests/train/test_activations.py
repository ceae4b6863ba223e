from __future__ import annotations

import pytest
import torch

from halfbyte.models.fused_layers import fuse_layers_, iter_fused_layers, kept_bytes_per_token
from halfbyte.train.activations import (
    PROBE_TOKENS,
    choose_checkpointing,
    choose_policy_,
    free_bytes,
    measure_kept_bytes,
)
from halfbyte.train.loss import LossPath
from tests.train.runs import build_model


def test_measure_kept_bytes_grows_with_layers_and_leaves_no_trace() -> None:
    model = build_model().eval()
    path = LossPath(model)
    before = torch.get_rng_state()
    kept = measure_kept_bytes(model, path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    # At least the input of each of 7 products and the products of the gated MLP, in 2 layers, in fp32.
    assert kept > 2 * PROBE_TOKENS * (4 * 64 + 3 * 96) * 4
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    assert 0.4 * kept < measure_kept_bytes(model, LossPath(model)) < 0.7 * kept


def test_measure_kept_bytes_is_small_with_checkpointing() -> None:
    model = build_model()
    path = LossPath(model)
    kept = measure_kept_bytes(model, path)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert measure_kept_bytes(model, path) < kept / 3
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
    too_many = int(free_bytes(torch.device("cpu")) / measure_kept_bytes(model, path) * PROBE_TOKENS)
    on, note = choose_checkpointing(model, path, wanted="auto", num_tokens=too_many)
    assert on
    assert "GiB are free for it" in note


def test_choose_policy_does_as_told_or_takes_over_what_the_model_has() -> None:
    model = build_model()
    fuse_layers_(model)
    for wanted, policy in ((True, "block"), (False, "keep")):
        assert "as set" in choose_policy_(model, wanted=wanted, num_tokens=1)
        assert {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)} == {policy}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert "as the model has it" in choose_policy_(model, wanted="auto", num_tokens=1)
    assert {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)} == {"block"}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_choose_policy_keeps_what_fits() -> None:
    model = build_model()
    fuse_layers_(model)
    room = free_bytes(torch.device("cpu")) * 0.8 / 1.3
    chosen = []
    for policy in ("keep", "mlp", "block"):
        num_tokens = int(0.9 * room / kept_bytes_per_token(model, policy, itemsize=4))
        note = choose_policy_(model, wanted="auto", num_tokens=num_tokens)
        chosen += {layer.halfbyte_binding.policy for layer in iter_fused_layers(model)}
        assert "GiB are free for it" in note
    assert chosen == ["keep", "mlp", "block"]
