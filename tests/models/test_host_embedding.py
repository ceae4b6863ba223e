"""An embedding in host memory: the same rows, everything around it where it was, on a GPU with and without a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from halfbyte.export import merge_in_place
from halfbyte.models.expanded_decoder import why_not_expanded
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.models.host_embedding import HostEmbedding, compute_device_of, host_embedding_
from halfbyte.models.load import load_model
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.models.streaming import Residency
from halfbyte.nn import LoraSpec, attach_adapters
from halfbyte.quant import QuantSpec
from tests.models.test_fused_layers import loss_and_grads, make_batch
from tests.models.test_streaming import make
from tests.models.tiny import SIZES, build_tiny, logits_of, save_tiny

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_training_and_answers_are_the_same(device: str) -> None:
    model, moved = make(device=device), make(device=device)
    dtype = compute_dtype_of(moved)
    assert host_embedding_(moved, dtype=dtype, device=torch.device(device))
    assert moved.get_input_embeddings().weight.device.type == "cpu"
    assert compute_device_of(moved).type == device
    assert compute_dtype_of(moved) == dtype
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    results = [loss_and_grads(one, make_batch(device)) for one in (model, moved)]
    torch.testing.assert_close(results[0], results[1], **tolerance)
    answers = []
    for one in (model.eval(), moved.eval()):
        with inference_state(one):
            tokens = iter_tokens(one, [[5, 9, 33]], options=GenerationOptions(max_new_tokens=20), stop_ids=frozenset())
            answers.append([token for step in tokens for token in step])
    assert answers[0] == answers[1]


def test_it_stays_where_it_lives_and_as_it_is() -> None:
    embedding = nn.Embedding(11, 6, dtype=torch.bfloat16)
    moved = HostEmbedding.from_embedding(embedding, dtype=torch.float32, device=torch.device("cpu"))
    home = moved.weight.data_ptr()
    nn.Sequential(moved).to(torch.float64)
    assert moved.weight.data_ptr() == home
    ids = torch.tensor([[3, 3, 10], [0, 1, 2]])
    assert torch.equal(moved(ids), embedding(ids).float())
    assert moved(ids).dtype == torch.float32


def test_a_model_is_loaded_so_and_merged_back(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    options = {"quant": QuantSpec(), "device": "cpu", "compute_dtype": "float32"}
    plain = load_model(folder, **options)
    loaded = load_model(folder, residency=Residency(embedding_on_host=True), **options)
    assert isinstance(loaded.model.get_input_embeddings(), HostEmbedding)
    assert "the embedding, whose rows are read from there" in str(loaded.report)
    assert torch.equal(logits_of(plain.model), logits_of(loaded.model))
    merged = merge_in_place(loaded.model)
    assert type(merged.get_input_embeddings()) is nn.Embedding
    assert torch.equal(logits_of(merge_in_place(plain.model)), logits_of(merged))


def test_an_embedding_that_is_the_head_stays(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama-tied")
    loaded = load_model(folder, quant=QuantSpec(), device="cpu", residency=Residency(embedding_on_host=True))
    assert not isinstance(loaded.model.get_input_embeddings(), HostEmbedding)
    assert "output head as well" in str(loaded.report)


def test_where_it_lives_does_not_decide_who_decodes() -> None:
    model = make().eval()
    assert host_embedding_(model, dtype=torch.float32, device=torch.device("cpu"))
    assert why_not_expanded(model) is None
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    embedding.compute_device = torch.device("cuda")
    assert why_not_expanded(model) == "it is not on a CPU, or computes in fp64"


def test_trained_whole_it_comes_to_the_device() -> None:
    model = build_tiny("llama").requires_grad_(False)
    assert host_embedding_(model, dtype=torch.float32, device=torch.device("cpu"))
    attach_adapters(model, LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("embed_tokens",)))
    ids = torch.arange(3, 9)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = model.get_input_embeddings().weight
    assert trained.grad is not None
    assert trained.grad[3:8].abs().amax(1).min() > 0


def test_an_embedding_that_scales_stays() -> None:
    config = Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = logits_of(model)
    assert not host_embedding_(model, dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(logits_of(model), expected)
