"""A model over several cards.

There is one CPU. Two names of it are two cards where numbers count; where places count, the second card is torch's meta
device: an operation that mixes it with the CPU is an error, and so is copying from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models import load_model, resolve_source
from halfbyte.models.attention import PACKED_ATTENTION
from halfbyte.models.build import build_meta_model
from halfbyte.models.card_split import CardSplit, cards_of, find_blocks, pass_along_, split_over_cards
from halfbyte.models.describe import load_config
from halfbyte.models.fill import ModelFiller, fill_
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.models.load import quantizable_layers
from halfbyte.models.packed_inputs import read_hidden_states
from halfbyte.models.placement import make_placements
from halfbyte.models.streaming import Residency
from halfbyte.models.weights import iter_weights
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantSpec
from tests.models.tiny import build_tiny

CPU, OTHER, META = torch.device("cpu"), torch.device("cpu", 0), torch.device("meta")
NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


def save(folder: Path, family: str) -> Path:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma2" else {}
    build_tiny(family, num_hidden_layers=NUM_BLOCKS, **layers).save_pretrained(folder)
    return folder


def load(folder: Path, shares: dict[torch.device, float] | None, **options: Any) -> PreTrainedModel:
    options = {"quant": QuantSpec(), "attn_implementation": PACKED_ATTENTION, "device": CPU, **options}
    return load_model(folder, compute_dtype="float32", card_shares=shares, **options).model


@pytest.mark.parametrize(
    ("shares", "on_first"),
    [((1, 1), 2), ((3, 1), 3), ((1, 3), 1), ((1, 1e9), 0), ((1e9, 1), 4)],
)
def test_blocks_are_divided_by_the_shares_of_the_cards(shares: tuple[float, float], on_first: int) -> None:
    with torch.device("meta"):
        model = build_wide(vocab_size=8)
    split = split_over_cards(model, dict(zip((CPU, META), shares, strict=True)), targets=(), itemsize=2)
    assert list(split.cards.values()) == [CPU] * on_first + [META] * (NUM_BLOCKS - on_first)
    assert split.card_of("model.embed_tokens.weight") == split.card_of("lm_head") == CPU
    assert split.card_of("model.layers.3.mlp.up_proj.weight") == split.cards["model.layers.3"]


def test_a_large_embedding_leaves_less_room_for_blocks() -> None:
    with torch.device("meta"):
        model = build_wide(vocab_size=8)
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        # Embedding and head are as large as two blocks: of three blocks' bytes each card holds, one is left here.
        large = build_wide(vocab_size=block // model.config.hidden_size)
    split = split_over_cards(large, {CPU: 1, META: 1}, targets=(), itemsize=2)
    assert [str(card) for card in split.cards.values()] == ["cpu", "meta", "meta", "meta"]
    # In 4 bits blocks are small beside it.
    targets = {name for name, module in large.named_modules() if isinstance(module, nn.Linear) and "layers" in name}
    split = split_over_cards(large, {CPU: 1, META: 1}, targets=targets, itemsize=2)
    assert set(split.cards.values()) == {META}
    assert str(split) == "divided among 2 cards: blocks 0 to 3 on meta; all else on cpu"


def build_wide(**changes: Any) -> PreTrainedModel:
    return build_tiny("llama", num_hidden_layers=NUM_BLOCKS, **changes)


def test_every_weight_is_put_on_its_card(folder: Path) -> None:
    source = resolve_source(folder)
    model = build_meta_model(load_config(source), dtype=torch.float32)
    placements = make_placements(model, [tensor for _, tensor in iter_weights(source)])
    targets = quantizable_layers(model, model.config)
    split = split_over_cards(model, {CPU: 1, META: 1}, targets=targets, itemsize=4)
    filler = ModelFiller(model, spec=QuantSpec(), targets=targets, device=CPU, dtype=torch.float32, split=split)
    fill_(filler, placements)
    filler.finish_()
    assert set(split.cards.values()) == {CPU, META}
    for path, module in model.named_modules():
        assert {tensor.device for tensor in module.parameters(recurse=False)} <= {split.card_of(path)}, path
        if isinstance(module, Linear4bit):
            assert {tensor.device for tensor in module.quantized.tensors()} == {split.card_of(path)}, path


def test_the_model_says_what_is_where(folder: Path) -> None:
    loaded = load_model(folder, quant=QuantSpec(), device=CPU, card_shares={CPU: 1, OTHER: 1})
    # The last of its notes is what halfbyte.hf says.
    assert loaded.report.notes[-1].startswith("divided among 2 cards: block")
    model = loaded.model
    names = {f"model.layers.{n}" for n in range(NUM_BLOCKS)} | {"model.embed_tokens", "model.norm", "lm_head"}
    assert model.hf_device_map.keys() == names
    assert model.hf_device_map["model.embed_tokens"] == model.hf_device_map["lm_head"] == "cpu"
    assert model.hf_device_map["model.layers.3"] == "cpu:0"
    assert cards_of(model, CPU) == (CPU, OTHER)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_finds_everything_on_each_card(family: str, packed: bool, tmp_path: Path) -> None:
    model = load(save(tmp_path, family), None, quant=None)
    paths = find_blocks(model)
    assert len(paths) == NUM_BLOCKS
    pass_along_(model, CardSplit(CPU, dict(zip(paths, [CPU, CPU, META, META], strict=True))))
    seen = []
    for path in paths:
        block = model.get_submodule(path)
        block.register_forward_hook(lambda block, args, out: seen.append(str(next(block.parameters()).device)))
    batch = {"input_ids": torch.arange(10)[None]}
    if packed:
        batch |= {
            "position_ids": torch.cat([torch.arange(4), torch.arange(6)])[None],
            "cu_seq_lens": torch.tensor([0, 4, 10], dtype=torch.int32),
        }
    # All blocks were computed where they live, and only what the last one gives could not come back.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        read_hidden_states(model, batch)
    assert seen == ["cpu", "cpu", "meta"]


@pytest.mark.parametrize("fused", [False, True])
def test_two_cards_answer_as_one(folder: Path, fused: bool) -> None:
    options = GenerationOptions(max_new_tokens=8, temperature=0)
    answers = []
    for shares in (None, {CPU: 1.0, OTHER: 1.0}):
        model = load(folder, shares)
        with inference_state(model):
            answers.append(list(iter_tokens(model, [[1, 5, 9], [7]], options=options, stop_ids=frozenset())))
    assert answers[0] == answers[1]


def test_what_cannot_be_divided_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="flex_attention works on one card"):
        load(folder, {CPU: 1, OTHER: 1}, attn_implementation="flex_attention")
    with pytest.raises(ConfigError, match="begins with cpu:0, but the model is loaded to cpu"):
        load(folder, {OTHER: 1, CPU: 1})
    with pytest.raises(ConfigError, match="has all its weights on them"):
        load(folder, {CPU: 1, OTHER: 1}, residency=Residency(streamed_blocks=1))
