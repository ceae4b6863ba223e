"""Several adapters on one base: each answers as if it had been loaded alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel as TheirPeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.hf import PeftModel
from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.models.generate import GenerationOptions, generate_text, inference_state
from halfbyte.models.load import load_model
from halfbyte.nn import (
    LoraSpec,
    active_adapter,
    adapter_names,
    adapters_disabled,
    attach_adapters,
    delete_adapter,
    iter_lora,
    set_adapter,
)
from halfbyte.quant import QuantSpec
from tests.models.test_adapter_tokens import OLD_IDS, SPECS, logits_of, randomise_
from tests.models.tiny import VOCABULARY, build_tokenizer, save_tiny
from tests.oracles import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter all was active which is now deleted:UserWarning"),
]
KINDS = {
    "all": LoraSpec(rank=4, alpha=8),
    "few": LoraSpec(rank=2, alpha=8, targets=("q_proj", "down_proj")),
    "norm": LoraSpec(rank=2, alpha=8, targets=("q_proj",), modules_to_save=("norm",)),
    "new": SPECS["new"],
    "whole": SPECS["whole"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for seed, (name, spec) in enumerate(KINDS.items()):
        model = load(base)
        attach_adapters(model, spec)
        randomise_(model, seed=seed)
        folders[name] = tmp_path_factory.mktemp("adapter") / name
        save_adapter(model, folders[name], base_model=str(base), spec=spec)
    return folders


def load(base: Path) -> PreTrainedModel:
    return load_model(base, quant=QuantSpec(), compute_dtype="float32", device="cpu").model


def alone(base: Path, adapter: Path) -> PreTrainedModel:
    model = load(base)
    load_adapter(model, adapter)
    return model


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("fused", [False, True])
def test_each_adapter_answers_as_alone(base: Path, adapters: dict[str, Path], fused: bool) -> None:
    model = load(base)
    plain = logits_of(model, OLD_IDS)
    expected = {}
    for name, folder in adapters.items():
        single = alone(base, folder)
        if fused:
            fuse_layers_(single)
        expected[name] = logits_of(single, OLD_IDS)
        load_adapter(model, folder, name=name)
    assert adapter_names(model) == list(adapters)
    assert active_adapter(model) == next(iter(adapters))
    if fused:
        fuse_layers_(model)
    for name in (*adapters, *reversed(adapters)):
        set_adapter(model, name)
        assert same(logits_of(model, OLD_IDS), expected[name]), name
        assert model.config.vocab_size == expected[name].shape[-1]
    with adapters_disabled(model):
        assert same(logits_of(model, OLD_IDS), plain)
    set_adapter(model, None)
    assert same(logits_of(model, OLD_IDS), plain)
    assert active_adapter(model) is None


def test_decoders_notice_a_switch(base: Path, adapters: dict[str, Path]) -> None:
    options, tokenizer = GenerationOptions(max_new_tokens=8), build_tokenizer()
    prompts = ["w5 w6 w7", "w8 w9"]
    expected = {
        name: generate_text(alone(base, f), tokenizer, prompts, options=options) for name, f in adapters.items()
    }
    assert len({tuple(answers) for answers in expected.values()}) > 2
    model = load(base)
    load_adapter(model, adapters["all"], name="all")
    with inference_state(model):
        for name in ("all", "few", "norm", "all", "new", "whole", "all"):
            if name not in adapter_names(model):
                load_adapter(model, adapters[name], name=name)
            set_adapter(model, name)
            assert generate_text(model, tokenizer, prompts, options=options) == expected[name], name
            if name != "all":
                # The next one may be given the same memory.
                delete_adapter(model, name)


def test_a_deleted_adapter_takes_no_memory(base: Path, adapters: dict[str, Path]) -> None:
    model = load(base)
    load_adapter(model, adapters["all"], name="all")
    load_adapter(model, adapters["few"], name="few")
    layers = [weakref.ref(layer) for _, layer in iter_lora(model)]
    bases = {path: layer.base for path, layer in iter_lora(model)}
    delete_adapter(model, "all")
    gc.collect()
    assert not any(layer() for layer in layers)
    assert active_adapter(model) == "few"
    assert all(layer.base is bases[path] for path, layer in iter_lora(model))
    delete_adapter(model, "few")
    assert adapter_names(model) == []
    assert not list(iter_lora(model))


def test_names_that_are_taken_or_unknown_are_errors(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = alone(base, adapters["few"])
    before = logits_of(model, OLD_IDS)
    with pytest.raises(ConfigError, match="has adapters already, one of them named 'default'"):
        load_adapter(model, adapters["all"])
    with pytest.raises(ConfigError, match="no adapter named 'other'; it has default"):
        set_adapter(model, "other")
    with pytest.raises(FormatError):
        load_adapter(model, tmp_path, name="nothing")
    assert adapter_names(model) == ["default"]
    assert same(logits_of(model, OLD_IDS), before)


def test_pefts_names_switch_and_delete(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    plain: Any = load_model(base, quant=None, compute_dtype="float32", device="cpu").model
    ours = PeftModel.from_pretrained(plain, adapters["all"], adapter_name="all")
    theirs = TheirPeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters["all"], "all").eval()
    for model in (ours, theirs):
        model.load_adapter(str(adapters["few"]), adapter_name="few")
        assert model.active_adapter == "all"
    for name in ("few", "all"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert ours.active_adapter == theirs.active_adapter == name
        assert_close(name, logits_of(theirs, OLD_IDS), logits_of(ours, OLD_IDS), dtype=torch.float32, roundings=64)
    ours.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"all", "few"}
    for model in (ours, theirs):
        model.delete_adapter("all")
        assert list(model.peft_config) == ["few"]
        assert model.active_adapters in (["few"], "few")
    with ours.disable_adapter(), theirs.disable_adapter():
        assert_close("base", logits_of(theirs, OLD_IDS), logits_of(ours, OLD_IDS), dtype=torch.float32, roundings=64)
    assert logits_of(ours, OLD_IDS).shape[-1] == VOCABULARY
