"""Adapters on a whole model, against PEFT on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.models.modes import checkpoint_layers_
from halfbyte.nn import (
    Linear4bit,
    LoraLinear,
    LoraSpec,
    adapters_disabled,
    attach_adapters,
    iter_lora,
    iter_trainable,
    quantize_linears_,
)
from halfbyte.nn.attach import count_parameters, iter_saved
from halfbyte.nn.convert import replace_module
from halfbyte.nn.saved_module import plain_linear
from halfbyte.quant import QuantSpec
from tests.nn.models import WORDS, make_tokens, peft_model, tiny_llama, tiny_quantized_llama
from tests.oracles import assert_close

SPEC = LoraSpec(rank=4, alpha=8, dropout=0.0, seed=1)


def adapted_llama(spec: LoraSpec = SPEC, **changes: object) -> torch.nn.Module:
    """A quantised Llama whose adapters already say something."""
    model = tiny_quantized_llama(**changes)
    attach_adapters(model, spec)
    generator = torch.Generator().manual_seed(4)
    for _, layer in iter_lora(model):
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model


def gradients(model: torch.nn.Module, *, seed: int = 3) -> dict[str, torch.Tensor]:
    """One step's gradients."""
    tokens = make_tokens(seed=seed)
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in iter_trainable(model)}


def test_attach_adapters_gives_the_gradients_of_peft_on_the_same_weights() -> None:
    ours = adapted_llama()
    base = tiny_quantized_llama()
    for path, module in list(base.named_modules()):
        if isinstance(module, Linear4bit):
            replace_module(base, path, plain_linear(module))
    theirs = peft_model(base, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    their_layers = dict(theirs.base_model.model.named_modules())
    for path, layer in iter_lora(ours):
        their_layers[path].lora_A["default"].weight.data.copy_(layer.lora_A)
        their_layers[path].lora_B["default"].weight.data.copy_(layer.lora_B)
    tokens = make_tokens()
    logits, expected = ours(tokens).logits, theirs(tokens).logits
    assert_close("logits", expected, logits, dtype=torch.float32, roundings=32, reduction_length=WORDS)
    gradients(ours)
    theirs(tokens, labels=tokens).loss.backward()
    for path, layer in iter_lora(ours):
        their_A, their_B = their_layers[path].lora_A["default"].weight, their_layers[path].lora_B["default"].weight
        assert_close(f"{path} A", their_A.grad, layer.lora_A.grad, dtype=torch.float32, roundings=64)
        assert_close(f"{path} B", their_B.grad, layer.lora_B.grad, dtype=torch.float32, roundings=64)


def test_attach_adapters_reports_what_peft_counts() -> None:
    theirs = peft_model(tiny_llama(), r=4, target_modules="all-linear")
    model = tiny_quantized_llama()
    report = attach_adapters(model, SPEC)
    assert (report.trainable_parameters, report.total_parameters) == theirs.get_nb_trainable_parameters()
    assert report.num_modules == 14
    assert report.modules["model.layers.0.mlp.up_proj"] == 4
    share = 100 * report.trainable_parameters / report.total_parameters
    assert str(report) == (
        "14 adapters of rank 4: q_proj x 2, k_proj x 2, v_proj x 2, o_proj x 2, gate_proj x 2, up_proj x 2, "
        f"down_proj x 2\n{report.trainable_parameters:,} of {report.total_parameters:,} parameters are trained "
        f"({share:.2f}%)"
    )


def test_attach_adapters_reports_different_ranks_and_saved_modules() -> None:
    spec = LoraSpec(rank=4, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 2}, modules_to_save=("lm_head",))
    text = str(attach_adapters(tiny_quantized_llama(), spec))
    assert "4 adapters: q_proj x 2 (rank 4), v_proj x 2 (rank 2); trained whole: lm_head" in text


def test_attach_adapters_trains_adapters_only() -> None:
    model = adapted_llama()
    names = [name for name, _ in iter_trainable(model)]
    assert len(names) == 28
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    assert all(parameter.dtype == torch.float32 for _, parameter in iter_trainable(model))
    assert count_parameters(model)[0] == sum(p.numel() for _, p in iter_trainable(model))


def test_attach_adapters_changes_nothing_yet() -> None:
    model, tokens = tiny_quantized_llama(), make_tokens()
    before = model(tokens).logits
    attach_adapters(model, SPEC)
    assert model(tokens).logits.equal(before)


def test_attach_adapters_refuses_a_second_time() -> None:
    with pytest.raises(ConfigError, match="has adapters already"):
        attach_adapters(adapted_llama(), SPEC)


def test_attach_adapters_seed_decides_each_adapter_by_its_path() -> None:
    model, fewer = tiny_quantized_llama(), tiny_quantized_llama()
    attach_adapters(model, SPEC)
    torch.manual_seed(77)
    attach_adapters(fewer, LoraSpec(rank=4, targets=("v_proj",), seed=1))
    layers = dict(iter_lora(model))
    for path, layer in iter_lora(fewer):
        assert layer.lora_A.equal(layers[path].lora_A)
    values = {layer.lora_A.sum().item() for layer in layers.values()}
    assert len(values) == len(layers)


def test_attach_adapters_works_on_plain_layers() -> None:
    model = tiny_llama()
    attach_adapters(model, SPEC)
    assert all(isinstance(layer.base, torch.nn.Linear) for _, layer in iter_lora(model))
    grads = gradients(model)
    assert len(grads) == 28
    workspaces = {id(layer.workspace) for _, layer in iter_lora(model)}
    assert workspaces == {id(model.halfbyte_workspace)}


@pytest.mark.parametrize("saved", [(), ("lm_head",)], ids=["adapters", "and a saved head"])
def test_adapters_disabled_is_the_base(saved: tuple[str, ...]) -> None:
    tokens = make_tokens()
    expected = tiny_quantized_llama()(tokens).logits
    model = adapted_llama(LoraSpec(rank=4, modules_to_save=saved, seed=1))
    for _, module in iter_saved(model):
        module.trained.weight.data.mul_(2)
    tuned = model.eval()(tokens).logits
    with adapters_disabled(model):
        assert model(tokens).logits.equal(expected)
        with adapters_disabled(model):
            pass
        assert model(tokens).logits.equal(expected)
    assert model(tokens).logits.equal(tuned)
    assert not tuned.equal(expected)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert model(tokens).logits.equal(tuned)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(dropout: float, use_reentrant: bool) -> None:
    model = adapted_llama(LoraSpec(rank=4, dropout=dropout, seed=1)).train()
    model.config.use_cache = False
    torch.manual_seed(0)
    expected = gradients(model)
    if use_reentrant:
        model.enable_input_require_grads()
    checkpoint_layers_(model, {"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert grad.equal(expected[name]), name


def test_training_with_evaluation_in_between_equals_training_without() -> None:
    def train(evaluate: bool) -> dict[str, torch.Tensor]:
        model = adapted_llama(LoraSpec(rank=4, dropout=0.3, seed=1)).train()
        optimizer = torch.optim.AdamW([p for _, p in iter_trainable(model)], lr=1e-2)
        for step in range(4):
            torch.manual_seed(step)
            gradients(model, seed=step)
            optimizer.step()
            if evaluate:
                model.eval()
                with torch.no_grad():
                    model(make_tokens(seed=9))
                    with adapters_disabled(model):
                        model.generate(make_tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
                model.train()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    without, with_evaluation = train(False), train(True)
    assert without.keys() == with_evaluation.keys()
    for name, tensor in without.items():
        assert tensor.equal(with_evaluation[name]), name


def test_a_model_with_adapters_answers_transformers() -> None:
    model = adapted_llama()
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() > 0
    assert model.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert model.model.layers[0].mlp.up_proj.in_features == 64
    answer = model.generate(make_tokens(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer.shape[0] == 1


def test_a_model_with_adapters_can_be_copied_and_cast() -> None:
    model, tokens = adapted_llama(), make_tokens()
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    assert twin(tokens).logits.equal(expected)
    layers = list(iter_lora(twin))
    assert {id(layer.workspace) for _, layer in layers} == {id(twin.halfbyte_workspace)}
    twin.bfloat16()
    assert twin.dtype == torch.bfloat16
    assert all(layer.lora_A.dtype == torch.float32 for _, layer in layers)
    logits = twin(tokens).logits
    assert logits.dtype == torch.bfloat16
    # About forty roundings in a row: two layers of seven products, norms, residuals and softmax.
    assert_close("logits", expected, logits, dtype=torch.bfloat16, roundings=40)


def test_a_model_with_adapters_round_trips_through_its_state_dict() -> None:
    model, tokens = adapted_llama(), make_tokens()
    other = tiny_llama()
    quantize_linears_(other, QuantSpec(codebook="fp4"))
    attach_adapters(other, LoraSpec(rank=4, alpha=8))
    other.load_state_dict(model.state_dict())
    assert other.eval()(tokens).logits.equal(model.eval()(tokens).logits)


def test_the_first_layer_computes_no_gradient_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.ops import lora_linear

    model = adapted_llama()
    tokens = make_tokens()
    loss = model(tokens, labels=tokens).loss
    calls = []
    expand = lora_linear.expand_weight

    def count(*args: object, **options: object) -> torch.Tensor:
        calls.append(args)
        return expand(*args, **options)

    monkeypatch.setattr(lora_linear, "expand_weight", count)
    loss.backward()
    assert len(calls) == 14 - 3
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoraLinear)
