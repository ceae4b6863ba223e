"""Fused decoder layers against the library's own forward of the same quantised model, loss and every gradient."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.models.attention import PACKED_ATTENTION, register_packed_attention
from halfbyte.models.fused_layers import FusedLayer, fuse_layers_, kept_bytes_per_token, set_policy, unfuse_layers_
from halfbyte.models.modes import checkpoint_layers_
from halfbyte.models.packed_inputs import build_forward_inputs
from halfbyte.nn import LoraSpec, adapters_disabled, attach_adapters, quantize_linears_
from halfbyte.quant import QuantSpec
from tests.models.tiny import CONFIGS

FAMILIES = ("llama", "llama-stretched", "mistral", "qwen2", "qwen3", "smollm3")
POLICIES = ("keep", "mlp", "offload", "block")
LENGTHS = (5, 11, 16)


def make_model(
    family: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    **changes: object,
) -> PreTrainedModel:
    register_packed_attention()
    config = CONFIGS[family].__class__.from_dict(CONFIGS[family].to_dict() | changes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=dtype)
    quantize_linears_(model, QuantSpec())
    for name, parameter in model.named_parameters():
        # Random norms and biases, or a mistake with them would not show.
        if "norm" in name or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.2
    attach_adapters(model, LoraSpec(rank=4, alpha=8, dropout=dropout, seed=0, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.train()


def make_batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return one packed row of three documents."""
    ids = torch.arange(sum(LENGTHS), device=device)[None] * 7 % 90 + 3
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    return {"input_ids": ids, "position_ids": positions, "cu_seq_lens": bounds}


def loss_and_grads(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    hidden = model.model(**build_forward_inputs(model, batch)).last_hidden_state
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device, dtype=torch.float32).sin().view_as(hidden)
    loss = (hidden.float() * weights).sum()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_agree(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], *, policy: str = "keep", adapters_ride: bool | None = None
) -> None:
    expected_loss, expected = loss_and_grads(model, batch)
    report = fuse_layers_(model, policy=policy, adapters_ride=adapters_ride)
    assert report.num_fused == 2, report
    assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
    loss, grads = loss_and_grads(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        difference = (grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_agree_with_the_library(family: str, policy: str, adapters_ride: bool) -> None:
    assert_agree(make_model(family), make_batch(), policy=policy, adapters_ride=adapters_ride)


@pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_layer_with_dropout_passes_gradcheck(family: str, policy: str, adapters_ride: bool) -> None:
    model = make_model(family, dropout=0.3)
    assert fuse_layers_(model, policy=policy, adapters_ride=adapters_ride).num_fused == 2
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    layer, inputs = model.model.layers[0], build_forward_inputs(model, make_batch())
    x = torch.randn(1, sum(LENGTHS), 64, dtype=torch.float64, requires_grad=True)
    angles = model.model.rotary_emb(x, inputs.pop("position_ids"))
    del inputs["input_ids"]
    names = ("self_attn.k_proj.lora_A", "self_attn.o_proj.lora_B", "mlp.up_proj.lora_A", "mlp.down_proj.lora_A")
    parameters = [layer.get_parameter(name) for name in names]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        options = {"position_embeddings": angles, **inputs}
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,), options)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "up_proj"]], ids="-".join)
@pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
def test_fused_layers_take_adapters_on_some_projections(targets: list[str], adapters_ride: bool) -> None:
    assert_agree(make_model("qwen2", targets=targets), make_batch(), adapters_ride=adapters_ride)


def test_fused_layers_without_adapters_equal_the_base() -> None:
    model = make_model("llama")
    ids = make_batch()["input_ids"]
    with torch.no_grad(), adapters_disabled(model):
        expected = model(ids, use_cache=False).logits
        fuse_layers_(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_fused_layers_keep_generation_hidden_states_and_checkpointing() -> None:
    model = make_model("llama").eval()
    ids = make_batch()["input_ids"][:, :9]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    states = model(ids, output_hidden_states=True).hidden_states
    fuse_layers_(model)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).equal(expected)
    for fused, plain in zip(model(ids, output_hidden_states=True, use_cache=False).hidden_states, states, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    _, grads = loss_and_grads(model.train(), make_batch())
    checkpoint_layers_(model)
    model.enable_input_require_grads()
    _, again = loss_and_grads(model, make_batch())
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad)


def test_fused_layers_change_no_name_and_can_be_undone() -> None:
    model = make_model("llama")
    before, kinds = list(model.state_dict()), [type(layer) for layer in model.model.layers]
    fuse_layers_(model)
    assert list(model.state_dict()) == before
    unfuse_layers_(model)
    assert [type(layer) for layer in model.model.layers] == kinds


def test_fused_layers_notice_a_replaced_adapter() -> None:
    model = make_model("llama")
    fuse_layers_(model)
    loss_and_grads(model, make_batch())
    layer = model.model.layers[0]
    layer.self_attn.q_proj = layer.self_attn.q_proj.unwrap()
    _, grads = loss_and_grads(model, make_batch())
    unfuse_layers_(model)
    _, expected = loss_and_grads(model, make_batch())
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "why"), [("gpt_neox", "no decoder layers"), ("gemma2", "not among"), ("mixtral", "not among")]
)
def test_what_does_not_fit_is_said(family: str, why: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    report = fuse_layers_(model)
    assert report.num_fused == 0
    assert why in str(report)
    assert not any(isinstance(module, FusedLayer) for module in model.modules())


def test_a_norm_that_is_trained_is_not_fused() -> None:
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.requires_grad_()
    assert "norm" in str(fuse_layers_(model))


def test_attention_weights_that_are_dropped_are_not_fused() -> None:
    assert "attention weights" in str(fuse_layers_(make_model("llama", attention_dropout=0.1)))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fused_layer_goes_back_twice_where_the_graph_is_retained(policy: str) -> None:
    model = make_model("llama", dropout=0.3)
    fuse_layers_(model, policy=policy)
    hidden = model.model(**build_forward_inputs(model, make_batch())).last_hidden_state
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(hidden.sin().sum(), parameters, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(hidden.sin().sum(), parameters), strict=True):
        torch.testing.assert_close(again, once)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_gives_the_same_bits(family: str, adapters_ride: bool, dropout: float) -> None:
    model = make_model(family, dropout=dropout)
    fuse_layers_(model, adapters_ride=adapters_ride)
    loss, grads = loss_and_grads(model, make_batch())
    for policies in (*([policy] * 2 for policy in POLICIES), ["offload", "keep"], ["block", "offload"]):
        set_policy(model, policies)
        again_loss, again = loss_and_grads(model, make_batch())
        assert again_loss.equal(loss), policies
        assert all(again[name].equal(grad) for name, grad in grads.items()), policies


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_agree_with_the_library_on_a_gpu(family: str, policy: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_agree(make_model(family, device="cuda"), make_batch("cuda"), policy=policy)


@pytest.mark.gpu
def test_offloading_takes_less_of_the_device_than_recomputing() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    model = make_model("llama", device="cuda", num_attention_heads=8, num_key_value_heads=8, **sizes)
    fuse_layers_(model)
    batch = {"input_ids": torch.arange(8192, device="cuda").remainder(90)[None]}
    peaks = {}
    for policy in POLICIES:
        set_policy(model, policy)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            loss_and_grads(model, batch)
        peaks[policy] = torch.cuda.max_memory_allocated()
    assert peaks["offload"] < peaks["block"] < peaks["mlp"] < peaks["keep"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_block_keeps_is_what_it_says(family: str, policy: str) -> None:
    model = make_model(family)
    fuse_layers_(model, policy=policy)
    inputs = build_forward_inputs(model, make_batch())
    hidden = torch.randn(1, sum(LENGTHS), 64, requires_grad=True)
    angles = model.model.rotary_emb(hidden, inputs.pop("position_ids"))
    del inputs["input_ids"]
    y = model.model.layers[0](hidden, position_embeddings=angles, **inputs)
    node = y.grad_fn.next_functions[0][0]
    heads = [node.states[0].heads] if node.states else []
    found = [getattr(state, name) for state in [*heads, *(node.states or ())] for name in state.__slots__]
    found += [part for value in found if isinstance(value, tuple) for part in value]
    found += node.saved_tensors[len(model.model.layers[0].halfbyte_binding.parts.parameters) :]
    expected = kept_bytes_per_token(model, policy, itemsize=4)[0]
    assert wide_bytes(found) == expected.device * sum(LENGTHS)
    # On a CPU what is put away stays what it is.
    put_away = node.offloaded[0].resident if node.offloaded else ()
    assert wide_bytes(put_away) == expected.host * sum(LENGTHS)
    assert not put_away or node.offloaded[0].nbytes == expected.host * sum(LENGTHS)


def wide_bytes(found: Iterable[object]) -> int:
    """Return the bytes of the tensors that are not narrow: r is a vector, u as wide as ranks, and so are sums."""
    wide = [t for t in found if isinstance(t, torch.Tensor) and t.numel() > 16 * sum(LENGTHS)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in wide}.values())
