from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaConfig, PreTrainedModel

from halfbyte.models.attention import register_packed_attention
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable
from halfbyte.train.batches import BatchOptions, iter_batches
from halfbyte.train.loss import LossPath
from tests.oracles import assert_close
from tests.train.runs import build_examples
from tests.train.tiny import CONFIGS, SIZES, build_tiny

SCALED = {
    "cohere": CohereConfig(**SIZES, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
}


def build(family: str) -> PreTrainedModel:
    if family in CONFIGS:
        model = build_tiny(family)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SCALED[family])
    model.set_attn_implementation(register_packed_attention())
    return model


def batch_of(row_tokens: int | None) -> dict[str, object]:
    return next(iter_batches(build_examples(6), BatchOptions(pad_id=0, row_tokens=row_tokens), batch_size=6))


@pytest.mark.parametrize("row_tokens", [32, None])
@pytest.mark.parametrize("family", [*CONFIGS, *SCALED])
def test_loss_path_matches_whole_logits(family: str, row_tokens: int | None) -> None:
    model = build(family).eval()
    attach_adapters(model, LoraSpec(rank=2, seed=0, dropout=0.0))
    path = LossPath(model)
    assert path.chunked, path.note
    batch = batch_of(row_tokens)
    model.set_attn_implementation("eager")
    whole = LossPath(model)
    whole.chunked = False
    expected = whole(batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in iter_trainable(model)}
    model.zero_grad()

    model.set_attn_implementation("halfbyte")
    actual = path(batch)
    actual.backward()
    assert_close("loss", expected, actual, dtype=torch.float32, roundings=64)
    for name, parameter in iter_trainable(model):
        assert_close(name, gradients[name], parameter.grad, dtype=torch.float32, roundings=256, reduction_length=192)
    assert_close("sum", expected, path.sum_losses(batch) / batch["num_trained"], dtype=torch.float32, roundings=64)


def test_loss_path_divides_by_the_whole_batch() -> None:
    model = build("llama").eval()
    path, batch = LossPath(model), batch_of(32)
    mean = path(batch)
    assert_close("loss", mean * batch["num_trained"] / 1000, path(batch, num_items=1000), dtype=torch.float32)


def test_loss_path_takes_whole_logits_where_the_config_does_not_tell() -> None:
    class Odd(type(build("llama"))):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.1
            return out

    torch.manual_seed(0)
    model = Odd(LlamaConfig(**SIZES)).eval()
    path = LossPath(model)
    assert not path.chunked
    assert "whole logits" in path.note
    batch = batch_of(None)
    logits = model(input_ids=batch["input_ids"]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    assert_close("loss", expected, path(batch), dtype=torch.float32, roundings=64)
    assert_close("sum", expected * batch["num_trained"], path.sum_losses(batch), dtype=torch.float32, roundings=64)


def test_loss_path_takes_a_trained_head() -> None:
    model = build("llama")
    attach_adapters(model, LoraSpec(rank=2, seed=0, modules_to_save=("lm_head",)))
    path = LossPath(model)
    assert path.chunked, path.note
    path(batch_of(32)).backward()
    head_gradients = [p.grad for name, p in iter_trainable(model) if "lm_head" in name]
    assert len(head_gradients) == 1
    assert head_gradients[0].abs().sum() > 0


def test_loss_path_takes_an_adapted_head() -> None:
    model = build("llama")
    attach_adapters(model, LoraSpec(rank=2, seed=0, targets=("lm_head", "q_proj")))
    path = LossPath(model)
    assert not path.chunked
    path(batch_of(32)).backward()
    assert all(p.grad is not None for _, p in iter_trainable(model))
