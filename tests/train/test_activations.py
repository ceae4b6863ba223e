from __future__ import annotations

import pytest
import torch

from halfbyte.train.activations import PROBE_TOKENS, choose_checkpointing, free_bytes, measure_kept_bytes
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
