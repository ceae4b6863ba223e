from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.errors import FormatError
from halfbyte.models.describe import load_config
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_names import iter_gguf_weights
from halfbyte.models.load import load_model
from halfbyte.models.source import resolve_source
from tests.models.tiny import build_tiny, logits_of
from tests.models.tiny_gguf import ARCHITECTURES, save_tiny_gguf


# transformers reads no tensors of a file that calls itself mistral, and ignores stretched rotary frequencies.
@pytest.mark.parametrize("family", sorted(ARCHITECTURES.keys() - {"mistral", "llama-stretched"}))
def test_iter_gguf_weights_gives_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = load_model(path, quant=None, compute_dtype="float32", device="cpu").model
    assert type(ours) is type(theirs)
    assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_iter_gguf_weights_dequantises_as_transformers_does(quantization: str, tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", "llama", quantization=quantization)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    for weight in iter_gguf_weights(GgufFile(path)):
        value = weight.read()
        assert value.shape == weight.shape
        assert value.dtype == weight.dtype
        assert torch.equal(value.float(), theirs[weight.name]), weight.name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_iter_gguf_weights_restores_the_original(family: str, tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", family)
    original = build_tiny(family)
    tensors = original.state_dict()
    assert all(torch.equal(weight.read(), tensors[weight.name]) for weight in iter_gguf_weights(GgufFile(path)))
    ours = load_model(path, quant=None, compute_dtype="float32", device="cpu").model
    assert type(ours) is type(original)
    assert torch.equal(logits_of(ours), logits_of(original))


def test_load_config_recognises_stretched_rotary_frequencies(tmp_path: Path) -> None:
    path = save_tiny_gguf(tmp_path / "tiny.gguf", "llama-stretched")
    original = build_tiny("llama-stretched")
    config = load_config(resolve_source(path))
    assert config.rope_parameters == original.config.rope_parameters
    ours = load_model(path, quant=None, compute_dtype="float32", device="cpu").model
    assert torch.equal(logits_of(ours), logits_of(original))


def test_load_config_refuses_unknown_rotary_frequencies(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", {"rope_freqs.weight": numpy.linspace(1, 3, 8, dtype=numpy.float32)})
    with pytest.raises(FormatError, match="not Llama 3's"):
        load_config(resolve_source(path))


def test_load_config_refuses_an_unproven_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "falcon", {"token_embd.weight": numpy.zeros((4, 4), dtype=numpy.float32)})
    with pytest.raises(FormatError, match="'falcon' architecture are not read"):
        load_model(tmp_path / "tiny.gguf", quant=None, device="cpu")


def test_iter_gguf_weights_refuses_an_unknown_tensor(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", {"blk.0.mystery.weight": numpy.zeros((4, 4), dtype=numpy.float32)})
    with pytest.raises(FormatError, match=r"blk\.0\.mystery\.weight is unknown"):
        list(iter_gguf_weights(GgufFile(tmp_path / "tiny.gguf")))


def write_gguf(path: Path, architecture: str, tensors: dict[str, numpy.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_rope_freq_base(10000.0)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
