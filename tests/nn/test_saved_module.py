"""A module trained whole: an fp32 copy in the place of a frozen original."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.nn import Linear4bit, LoraSpec, SavedModule, attach_adapters, iter_trainable
from halfbyte.nn.attach import iter_saved
from halfbyte.quant import QuantSpec
from tests.nn.models import make_tokens, peft_model, tiny_llama, tiny_quantized_llama
from tests.oracles import assert_close


@pytest.mark.parametrize(
    "original",
    [nn.Linear(64, 40, dtype=torch.bfloat16), nn.LayerNorm(64, dtype=torch.bfloat16)],
    ids=["linear", "norm"],
)
def test_saved_module_computes_in_the_dtype_of_its_input(original: nn.Module) -> None:
    module = SavedModule.from_module(original)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    assert y.equal(original(x))
    y.float().sum().backward()
    assert module.trained.weight.dtype == module.trained.weight.grad.dtype == torch.float32
    assert original.weight.grad is None
    assert module.unwrap() is original


def test_saved_module_embeds_in_the_dtype_of_its_original() -> None:
    original = nn.Embedding(20, 64, dtype=torch.bfloat16)
    module = SavedModule.from_module(original)
    y = module(torch.arange(5))
    assert y.equal(original(torch.arange(5)))
    assert module.num_embeddings == 20
    y.float().sum().backward()
    assert module.trained.weight.grad.dtype == torch.float32


def test_saved_module_trains_a_4bit_original_from_what_it_dequantises_to() -> None:
    original = Linear4bit.from_linear(nn.Linear(64, 40), QuantSpec())
    module = SavedModule.from_module(original)
    assert isinstance(module.trained, nn.Linear)
    assert module.trained.weight.equal(original.weight)
    x = torch.randn(3, 64)
    assert_close("y", original(x), module(x), dtype=torch.float32, reduction_length=64)
    wrapped = SavedModule.from_module(nn.Sequential(original, nn.ReLU()))
    wrapped(x).sum().backward()
    assert wrapped.trained[0].weight.grad is not None


def test_saved_module_answers_for_the_module_in_use() -> None:
    module = SavedModule.from_module(nn.Linear(64, 40))
    assert module.weight is module.trained.weight
    assert module.out_features == 40
    module.adapter_enabled = False
    assert module.weight is module.original.weight
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("tied", [False, True])
def test_saved_modules_are_trained_beside_adapters_like_those_of_peft(tied: bool) -> None:
    spec = LoraSpec(rank=4, dropout=0.0, modules_to_save=("lm_head",), seed=1)
    model = tiny_quantized_llama(tied=tied)
    before = model.model.embed_tokens.weight.clone()
    report = attach_adapters(model, spec)
    theirs = peft_model(tiny_llama(tied=tied), r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    assert report.trainable_parameters == theirs.get_nb_trainable_parameters()[0]
    assert report.saved_modules == ("lm_head",)
    tokens = make_tokens()
    model(tokens, labels=tokens).loss.backward()
    ((path, module),) = iter_saved(model)
    assert path == "lm_head"
    assert module.trained.weight.grad.abs().sum() > 0
    torch.optim.SGD([p for _, p in iter_trainable(model)], lr=1.0).step()
    assert model.model.embed_tokens.weight.equal(before)
    assert model.get_output_embeddings().weight is module.trained.weight
