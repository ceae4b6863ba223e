"""Weights that live in host memory: the same bits as weights that stay, under every policy and in every path."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.export import export_bnb4bit
from halfbyte.models.fused_layers import fuse_layers_, set_policy
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.models.load import load_model
from halfbyte.models.static_decoder import why_not_static
from halfbyte.models.streaming import Residency, is_streamed, spread, stream_blocks_, streamer_of
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantSpec
from tests.models.test_fused_layers import POLICIES, loss_and_grads, make_batch, make_model
from tests.models.tiny import edit_config, logits_of, save_tiny

NUM_BLOCKS = 6
CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def make(*, device: str = "cpu", fused: bool = True, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    changes = {"num_hidden_layers": NUM_BLOCKS}
    model = make_model("llama", device=device, dtype=dtype, dropout=dropout, **changes)
    if fused:
        fuse_layers_(model)
    return model


def assert_same_training(model: PreTrainedModel, streamed: PreTrainedModel, *, device: str, exact: bool) -> None:
    batch = make_batch(device)
    # Attention's backward on a GPU adds in an order of its own.
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        expected_loss, expected = loss_and_grads(model, batch)
        loss, grads = loss_and_grads(streamed, batch)
        torch.testing.assert_close(loss, expected_loss, **tolerance)
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], **tolerance)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_on_weights_in_files_gives_the_same_bits(policy: str, device: str, tmp_path: Path) -> None:
    model, streamed = make(device=device, dropout=0.1), make(device=device, dropout=0.1)
    streamer = stream_blocks_(streamed, NUM_BLOCKS - 1, device=torch.device(device), spill_folder=tmp_path)
    assert streamer.reads_files
    for one in (model, streamed):
        set_policy(one, policy)
    assert_same_training(model, streamed, device=device, exact=device == "cpu")
    streamer.release()
    assert_same_training(model, streamed, device=device, exact=device == "cpu")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("count", [1, 4, NUM_BLOCKS])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_on_streamed_weights_gives_the_same_bits(policy: str, count: int, device: str) -> None:
    model, streamed = make(device=device, dropout=0.1), make(device=device, dropout=0.1)
    stream_blocks_(streamed, count, device=torch.device(device))
    for one in (model, streamed):
        set_policy(one, policy)
    assert_same_training(model, streamed, device=device, exact=device == "cpu")


@pytest.mark.parametrize("num_slots", [2, 5])
def test_any_number_of_slots_gives_the_same_bits(num_slots: int) -> None:
    model, streamed = make(), make()
    stream_blocks_(streamed, NUM_BLOCKS, device=CPU, num_slots=num_slots)
    assert_same_training(model, streamed, device="cpu", exact=True)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_path_for_any_architecture_fetches_weights_itself(device: str) -> None:
    model, streamed = make(device=device, fused=False), make(device=device, fused=False)
    stream_blocks_(streamed, 4, device=torch.device(device))
    assert_same_training(model, streamed, device=device, exact=device == "cpu")


def test_fusing_comes_before_or_after() -> None:
    model, streamed = make(), make(fused=False)
    stream_blocks_(streamed, 3, device=CPU)
    fuse_layers_(streamed)
    assert_same_training(model, streamed, device="cpu", exact=True)
    streamer = streamer_of(streamed)
    assert streamer is not None
    assert streamer.slot_bytes > 0


def test_what_a_backward_kept_outlives_a_visit() -> None:
    """The library's forward keeps a weight for its backward while fused blocks go on using the slots."""
    streamed = make()
    stream_blocks_(streamed, NUM_BLOCKS, device=CPU, num_slots=2)
    loss_and_grads(streamed, make_batch())
    x = torch.randn(3, streamed.config.hidden_size, requires_grad=True)
    layer = streamed.model.layers[0].self_attn.q_proj
    y = layer(x)
    for index, backward in itertools.product(range(NUM_BLOCKS), (False, True)):
        streamed.model.layers[index].halfbyte_streamed.arrive(backward=backward)
    (grad,) = torch.autograd.grad(y.sum(), x)
    reference = make().model.layers[0].self_attn.q_proj
    (expected,) = torch.autograd.grad(reference(x).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_streamed_model_generates_the_same(device: str) -> None:
    model, streamed = make(device=device).eval(), make(device=device).eval()
    stream_blocks_(streamed, NUM_BLOCKS, device=torch.device(device))
    assert "live elsewhere" in str(why_not_static(streamed, 1))
    options = GenerationOptions(max_new_tokens=6)
    answers = []
    for one in (model, streamed):
        with inference_state(one):
            tokens = iter_tokens(one, [[5, 9, 33]], options=options, stop_ids=frozenset())
            answers.append([token for step in tokens for token in step])
    assert answers[0] == answers[1]


def test_names_and_state_stay_and_moving_the_model_leaves_weights_at_home() -> None:
    model, streamed = make(), make()
    stream_blocks_(streamed, 3, device=CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = streamed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    homes = {n: m.packed.data_ptr() for n, m in streamed.named_modules() if isinstance(m, Linear4bit)}
    streamed.to(torch.float64)
    assert homes == {n: m.packed.data_ptr() for n, m in streamed.named_modules() if isinstance(m, Linear4bit)}


@pytest.mark.parametrize("stored_in_4bit", [False, True])
def test_loading_puts_weights_where_they_live(stored_in_4bit: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "plain")
    if stored_in_4bit:
        export_bnb4bit(folder, tmp_path / "small", QuantSpec())
        folder = tmp_path / "small"
    options = {"quant": QuantSpec(), "device": "cpu", "compute_dtype": "float32"}
    plain = load_model(folder, **options).model
    streamed = load_model(folder, residency=Residency(streamed_blocks=1), **options).model
    assert is_streamed(streamed)
    assert not is_streamed(plain)
    homes = [m.lives_elsewhere for n, m in streamed.named_modules() if isinstance(m, Linear4bit) and ".layers.0." in n]
    assert homes
    assert all(homes)
    assert not any(
        m.lives_elsewhere for n, m in streamed.named_modules() if isinstance(m, Linear4bit) and ".layers.1." in n
    )
    assert torch.equal(logits_of(plain), logits_of(streamed))


def test_more_blocks_than_there_are_is_one_clear_message(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="streamed_blocks is 99, but LlamaForCausalLM has 2"):
        load_model(folder, quant=QuantSpec(), device="cpu", residency=Residency(streamed_blocks=99))
    with pytest.raises(ConfigError, match=r"needs weights in 4 bits"):
        load_model(folder, quant=None, device="cpu", residency=Residency(streamed_blocks=1))


def test_blocks_are_spread() -> None:
    assert spread(0, 8) == set()
    assert spread(8, 8) == set(range(8))
    assert spread(4, 8) == {0, 2, 4, 6}
    assert len(spread(5, 13)) == 5


def test_state_dicts_are_of_what_lives_on_the_host() -> None:
    model = make()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream_blocks_(model, NUM_BLOCKS, device=CPU, num_slots=2)
    loss_and_grads(model, make_batch())
    state = model.state_dict()
    loss_and_grads(model, make_batch())
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_loading_over_weights_in_host_memory_is_refused() -> None:
    model = make()
    state = model.state_dict()
    stream_blocks_(model, 2, device=CPU)
    with pytest.raises(RuntimeError, match="does not live on the device"):
        model.load_state_dict(state)


def test_only_blocks_with_4bit_weights_count(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    skipped = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["layers.1", "lm_head"]}
    edit_config(folder, quantization_config=skipped)
    options = {"quant": QuantSpec(), "device": "cpu", "compute_dtype": "float32"}
    expected = logits_of(load_model(folder, **options).model)
    loaded = load_model(folder, residency=Residency(streamed_blocks=1), **options)
    assert torch.equal(logits_of(loaded.model), expected)
    with pytest.raises(ConfigError, match="has 1 decoder blocks with weights in 4 bits"):
        load_model(folder, residency=Residency(streamed_blocks=2), **options)


def test_a_model_is_loaded_into_files(tmp_path: Path) -> None:
    folder, spill = save_tiny(tmp_path / "model"), tmp_path / "spill"
    spill.mkdir()
    options = {"quant": QuantSpec(), "device": "cpu", "compute_dtype": "float32"}
    expected = logits_of(load_model(folder, **options).model)
    loaded = load_model(folder, residency=Residency(streamed_blocks=2, spill_folder=spill), **options)
    assert f"in files under {spill}" in str(loaded.report)
    assert torch.equal(logits_of(loaded.model), expected)
    assert list(spill.iterdir()) == []
