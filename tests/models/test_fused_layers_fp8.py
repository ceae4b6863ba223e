"""Fused decoder layers with fp8 products of the frozen weights, against the same layers in fp32 or bf16."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.models.fused_layers import fuse_layers_
from tests.models.test_fused_layers import FAMILIES, POLICIES, loss_and_grads, make_batch, make_model

# Rounding to e4m3 errs by 2^-4 / sqrt(3) = 3.6% in the mean square, a product of two roundings by 5.1%. A gradient of
# two layers goes through some twelve products whose errors add in quadrature, 18%, twice that where the softmax of
# these models, with their large weights, is steep: a cosine of 1 / sqrt(1 + 0.36^2) for a single matrix. All gradients
# together are dominated by those behind fewer products.
MIN_COSINE, MIN_COSINE_OF_ONE = 0.995, 0.94


def compare(model: PreTrainedModel, batch: dict[str, torch.Tensor], *, policy: str, adapters_ride: bool) -> None:
    fuse_layers_(model, policy=policy, adapters_ride=adapters_ride)
    expected_loss, expected = loss_and_grads(model, batch)
    fuse_layers_(model, policy=policy, adapters_ride=adapters_ride, fp8=True)
    loss, grads = loss_and_grads(model, batch)
    again_loss, again = loss_and_grads(model, batch)
    assert loss != expected_loss
    assert again_loss == loss
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert again[name].equal(grad)
        assert cosine(grad, expected[name]) > MIN_COSINE_OF_ONE, name
    whole, exact = (torch.cat([grad.flatten() for grad in some.values()]) for some in (grads, expected))
    assert cosine(whole, exact) > MIN_COSINE
    assert (whole.norm() / exact.norm()).item() == pytest.approx(1, abs=0.1)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("adapters_ride", [False, True], ids=["added", "riding"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_in_fp8_have_the_gradients_of_fp32(family: str, dropout: float, adapters_ride: bool) -> None:
    compare(make_model(family, dropout=dropout), make_batch(), policy="keep", adapters_ride=adapters_ride)


def test_fused_layers_in_fp8_have_the_same_gradients_under_every_policy() -> None:
    model, batch = make_model("qwen3", dropout=0.3), make_batch()
    results = []
    for policy in POLICIES:
        fuse_layers_(model, policy=policy, adapters_ride=True, fp8=True)
        results.append(loss_and_grads(model, batch))
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        assert all(grads[name].equal(grad) for name, grad in results[0][1].items())


def test_fused_layers_in_fp8_take_adapters_on_some_projections() -> None:
    model = make_model("qwen2", targets=["q_proj", "v_proj"])
    compare(model, make_batch(), policy="mlp", adapters_ride=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_in_fp8_have_the_gradients_of_bf16_on_a_gpu(family: str, dropout: float) -> None:
    model = make_model(family, device="cuda", dtype=torch.bfloat16, dropout=dropout)
    compare(model, make_batch("cuda"), policy="keep", adapters_ride=True)
