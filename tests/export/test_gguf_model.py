"""GGUF files: read back by our own reader, which is held to the gguf package, and run by llama.cpp itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.errors import ConfigError
from halfbyte.export import export_gguf
from halfbyte.export.ollama import QUESTION, STYLES, make_modelfile
from halfbyte.models import load_adapter, load_model
from halfbyte.quant import QuantSpec
from tests.export.test_calibrated import make_adapter
from tests.train.tiny import CONFIGS

VOCABULARY = 104
TEXT = "the quick brown fox jumps over the lazy dog while the other foxes watch the dogs and the birds in the trees"
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
IDS = torch.arange(5, 29)[None]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE tokenizer, as these families have; every token is text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    sizes = CONFIGS[family].to_dict() | {"vocab_size": VOCABULARY, "sliding_window": None}
    model = AutoModelForCausalLM.from_config(type(CONFIGS[family])(**sizes))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def load(source: Path, quant: QuantSpec | None = None) -> PreTrainedModel:
    return load_model(source, quant=quant, device="cpu", compute_dtype="float32").model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_as_it_was(tmp_path: Path, family: str) -> None:
    base = save(tmp_path / "base", family)
    report = export_gguf(base, tmp_path / "model.gguf", type_name="F32", pre_tokenizer="gpt-2")
    assert report.merged is None
    torch.testing.assert_close(logits_of(load(tmp_path / "model.gguf")), logits_of(load(base)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_in_the_file(tmp_path: Path, family: str) -> None:
    base = save(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, size=0.05)
    tuned = load(base, QuantSpec())
    without = logits_of(tuned)
    load_adapter(tuned, adapter)
    expected = logits_of(tuned)
    export_gguf(base, tmp_path / "a.gguf", adapter=adapter, type_name="F32", spec=QuantSpec(), pre_tokenizer="gpt-2")
    torch.testing.assert_close(logits_of(load(tmp_path / "a.gguf")), expected, rtol=1e-4, atol=1e-4)
    export_gguf(base, tmp_path / "b.gguf", adapter=adapter, type_name="Q8_0", spec=QuantSpec(), pre_tokenizer="gpt-2")
    lost = float((logits_of(load(tmp_path / "b.gguf")) - expected).square().sum())
    assert lost < 0.1 * float((without - expected).square().sum())


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama")
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ConfigError):
        export_gguf(base, tmp_path / "model.gguf", pre_tokenizer="gpt-2")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    with pytest.raises(ConfigError, match="GGUF type 'Q4_K_M'; allowed: F32"):
        export_gguf(base, tmp_path / "other.gguf", type_name="Q4_K_M")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model.gguf"]


@pytest.mark.skipif(sys.platform != "linux", reason="the test extra brings llama.cpp's binding on Linux only")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, family: str) -> None:
    import xllamacpp

    base = save(tmp_path / "base", family)
    model = load(base)
    export_gguf(base, tmp_path / "model.gguf", type_name="F32", pre_tokenizer="gpt-2")
    options: Any = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(tmp_path / "model.gguf"), 128, 1
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)
    prompt = [5, 17, 40, 8]
    ids = torch.tensor([prompt])
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    request = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    told = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    assert [one["id"] for one in told] == expected[0, len(prompt) :].tolist()


def test_modelfiles_speak_the_model_s_template() -> None:
    tokenizer = build_tokenizer()
    for style in STYLES:
        before, after = map(json.dumps, style.turn.split(QUESTION))
        tokenizer.chat_template = f"{{{{ {before} + messages[0].content + {after} }}}}"
        text, note = make_modelfile("model.gguf", tokenizer, system='Say "no".')
        assert note is None
        assert text.startswith("FROM ./model.gguf\nTEMPLATE")
        assert style.template in text
        assert all(f'PARAMETER stop "{stop}"' in text for stop in style.stop)
        assert 'SYSTEM """Say "no"."""' in text
    tokenizer.chat_template = "{{ messages[0].content }}"
    text, note = make_modelfile("model.gguf", tokenizer, system=None)
    assert note is not None
    assert "TEMPLATE" not in text
