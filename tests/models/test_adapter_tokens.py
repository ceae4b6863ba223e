"""Trained rows of single tokens, against PEFT's trainable_token_indices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.load import load_model
from halfbyte.nn import LoraSpec, adapters_disabled, attach_adapters
from halfbyte.nn.spec import INPUT_EMBEDDING
from halfbyte.nn.vocabulary import iter_token_rows
from tests.models.tiny import VOCABULARY, save_tiny
from tests.oracles import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
ROUNDINGS = 64
NEW = (VOCABULARY, VOCABULARY + 1)
FAMILIES = ("llama", "llama-tied", "gemma3")
SPECS = {
    "new": LoraSpec(rank=4, alpha=8, trainable_tokens={INPUT_EMBEDDING: NEW, "lm_head": NEW}),
    "old": LoraSpec(rank=4, alpha=8, trainable_tokens={INPUT_EMBEDDING: (7, 5)}),
    "both": LoraSpec(rank=4, alpha=8, trainable_tokens={"embed_tokens": (5, *NEW), "lm_head": (5, *NEW)}),
    "whole": LoraSpec(rank=4, alpha=8, modules_to_save=("embed_tokens", "lm_head"), vocabulary=VOCABULARY + 2),
}
IDS = torch.randint(4, VOCABULARY + 2, (2, 12), generator=torch.Generator().manual_seed(1))
OLD_IDS = IDS.clamp(max=VOCABULARY - 1)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def load_base(folder: Path, **options: Any) -> PreTrainedModel:
    return load_model(folder, quant=None, compute_dtype="float32", device="cpu", **options).model


def randomise_(model: Any, *, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def build_tuned(folder: Path, spec: LoraSpec) -> PreTrainedModel:
    model = load_base(folder)
    attach_adapters(model, spec)
    randomise_(model)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_save_adapter_is_read_by_peft(name: str, family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32)
    spec = SPECS[name]
    ours = build_tuned(base, spec)
    save_adapter(ours, tmp_path / "adapter", base_model=str(base), spec=spec)
    plain = AutoModelForCausalLM.from_pretrained(base)
    if name != "old":
        plain.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids = OLD_IDS if name == "old" else IDS
    assert_close("tuned", logits_of(theirs, ids), logits_of(ours, ids), dtype=torch.float32, roundings=ROUNDINGS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("indices", [list(NEW), {"embed_tokens": list(NEW), "lm_head": list(NEW)}, [7, 5], None])
def test_load_adapter_reads_what_peft_wrote(indices: Any, family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base)
    if indices != [7, 5]:
        # More than there are tokens, as a multiple of something asks for.
        plain.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    whole = ["embed_tokens", "lm_head"] if indices is None else None
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        init_lora_weights=False,
        trainable_token_indices=indices,
        modules_to_save=whole,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(plain, config)
    randomise_(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "adapter"))
    ours = load_base(base)
    load_adapter(ours, tmp_path / "adapter")
    ids = OLD_IDS if indices == [7, 5] else IDS
    assert_close("tuned", logits_of(ours, ids), logits_of(theirs, ids), dtype=torch.float32, roundings=ROUNDINGS)


@pytest.mark.parametrize("name", SPECS)
def test_load_adapter_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama-tied", dtype=torch.float32)
    tuned = build_tuned(base, SPECS[name])
    save_adapter(tuned, tmp_path / "adapter", base_model=str(base), spec=SPECS[name])
    again = load_base(base)
    load_adapter(again, tmp_path / "adapter")
    ids = OLD_IDS if name == "old" else IDS
    torch.testing.assert_close(logits_of(again, ids), logits_of(tuned, ids), rtol=0, atol=0)


def test_file_holds_only_the_rows(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    tuned = build_tuned(base, SPECS["new"])
    save_adapter(tuned, tmp_path / "adapter", base_model=str(base), spec=SPECS["new"])
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "lora_" not in name}
    assert shapes == {
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": (2, 64),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 64),
    }


@pytest.mark.parametrize("name", ["new", "whole"])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_disabled_adapters_are_the_base_with_mean_rows(family: str, name: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family, dtype=torch.float32)
    tuned = build_tuned(base, SPECS[name])
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    expected = logits_of(plain, OLD_IDS)
    mean_D = plain.get_input_embeddings().weight.detach().mean(0)
    plain.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        plain.get_input_embeddings().weight[VOCABULARY:] = mean_D
    head = plain.get_output_embeddings()
    if family == "llama":
        with torch.no_grad():
            head.weight[VOCABULARY:] = head.weight[:VOCABULARY].mean(0)
    with adapters_disabled(tuned):
        assert_close("old words", logits_of(tuned, OLD_IDS)[..., :VOCABULARY], expected, dtype=torch.float32)
        assert_close("all words", logits_of(tuned), logits_of(plain), dtype=torch.float32, roundings=ROUNDINGS)
    assert tuned.config.vocab_size == VOCABULARY + 2


def test_gradients_are_those_of_the_rows_of_a_whole_embedding(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama-tied", dtype=torch.float32)
    ours = build_tuned(base, SPECS["both"])
    (_, module), *others = iter_token_rows(ours)
    assert not others
    whole = AutoModelForCausalLM.from_pretrained(base)
    whole.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        whole.get_input_embeddings().weight.copy_(module.weight)
    for layer in ours.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.zero_()
    for model in (ours, whole):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    expected = whole.get_input_embeddings().weight.grad[list(module.table.token_ids)]
    assert_close("rows", module.table.rows.grad, expected, dtype=torch.float32, roundings=ROUNDINGS)
