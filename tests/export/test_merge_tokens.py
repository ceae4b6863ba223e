"""Adapters with tokens of their own, merged: a larger vocabulary in plain models of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import ConfigError
from halfbyte.export import export_calibrated, merge_adapter, merge_in_place
from halfbyte.export.gguf_adapter import export_gguf_adapter
from halfbyte.export.gguf_model import export_gguf
from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.load import load_model
from halfbyte.nn import LoraSpec
from halfbyte.quant import QuantSpec
from tests.export.llama_cpp import save_speaking_tiny
from tests.models.test_adapter_tokens import IDS, OLD_IDS, SPECS, build_tuned, load_base, logits_of
from tests.models.tiny import VOCABULARY, build_tokenizer, save_tiny
from tests.oracles import assert_close

ROUNDINGS = 64


def save_run(folder: Path, family: str, name: str, *, multiple: int = 1) -> tuple[Path, Path]:
    """Leave a base and, as a run does, an adapter with a tokenizer."""
    base, adapter = save_tiny(folder / "base", family, dtype=torch.float32), folder / "adapter"
    save_adapter(build_tuned(base, SPECS[name]), adapter, base_model=str(base), spec=SPECS[name])
    tokenizer = build_tokenizer()
    if name != "old":
        tokenizer.add_tokens(["<|a|>", "<|b|>"], special_tokens=True)
    tokenizer.save_pretrained(adapter)
    options = {"model": {"path": str(base), "pad_vocabulary_to": multiple}, "quant": {"enabled": False}}
    (adapter / "run.yaml").write_text(json.dumps(options))
    return base, adapter


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("multiple", [1, 64])
def test_merge_adapter_writes_the_larger_vocabulary(name: str, family: str, multiple: int, tmp_path: Path) -> None:
    base, adapter = save_run(tmp_path, family, name, multiple=multiple)
    tuned = load_base(base)
    load_adapter(tuned, adapter)
    report = merge_adapter(base, adapter, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    size = VOCABULARY if name == "old" else 128 if multiple == 64 else VOCABULARY + 2
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == size
    assert ("words now" in str(report)) == (name != "old")
    ids = OLD_IDS if name == "old" else IDS
    words = VOCABULARY if name == "old" else VOCABULARY + 2
    assert_close(
        "merged", logits_of(tuned, ids), logits_of(merged, ids)[..., :words], dtype=torch.float32, roundings=64
    )


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
@pytest.mark.parametrize("name", SPECS)
def test_merge_in_place_takes_rows(name: str, family: str, tmp_path: Path) -> None:
    base, adapter = save_run(tmp_path, family, name)
    tuned = load_base(base)
    load_adapter(tuned, adapter)
    ids = OLD_IDS if name == "old" else IDS
    expected = logits_of(tuned, ids)
    merged = merge_in_place(tuned, dtype=torch.float32)
    assert_close("merged", expected, logits_of(merged, ids), dtype=torch.float32, roundings=ROUNDINGS)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(again, ids), logits_of(merged, ids), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("name", ["both", "whole"])
def test_export_calibrated_writes_the_larger_vocabulary(name: str, family: str, tmp_path: Path) -> None:
    base, adapter = save_run(tmp_path, family, name, multiple=8)
    batches = list(torch.randint(4, VOCABULARY + 2, (2, 4, 32), generator=torch.Generator().manual_seed(2)))
    export_calibrated(base, tmp_path / "nf4", QuantSpec(), batches, adapter=adapter, device="cpu")
    again = load_model(tmp_path / "nf4", quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    assert again.config.vocab_size == 104
    tuned = load_base(base)
    load_adapter(tuned, adapter)
    rows = tuned.get_input_embeddings().weight[list(range(VOCABULARY + 2))]
    # The embedding stays in bf16.
    assert_close("rows", rows, again.get_input_embeddings().weight[: VOCABULARY + 2], dtype=torch.bfloat16)
    assert logits_of(again).shape[-1] == 104


@pytest.mark.parametrize("name", ["both", "whole"])
def test_export_gguf_writes_the_larger_vocabulary(name: str, tmp_path: Path) -> None:
    base = save_speaking_tiny(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    num_words = load_base(base).config.vocab_size
    ids = tuple(range(num_words, num_words + 4))
    tokenizer.add_tokens([f"<|{number}|>" for number in range(ids[-1] + 1 - len(tokenizer))], special_tokens=True)
    rows = {"embed_tokens": ids, "lm_head": ids}
    spec = {
        "both": LoraSpec(rank=4, alpha=8, trainable_tokens=rows),
        "whole": LoraSpec(rank=4, alpha=8, modules_to_save=("embed_tokens", "lm_head"), vocabulary=ids[-1] + 1),
    }[name]
    tuned = build_tuned(base, spec)
    adapter, file = tmp_path / "adapter", tmp_path / "m.gguf"
    save_adapter(tuned, adapter, base_model=str(base), spec=spec)
    tokenizer.save_pretrained(adapter)
    export_gguf(base, file, adapter=adapter, type_name="F32", spec=None)
    again = load_model(file, quant=None, compute_dtype="float32", device="cpu").model
    tokens = torch.arange(num_words - 8, num_words + 4)[None]
    assert_close("logits", logits_of(tuned, tokens), logits_of(again, tokens), dtype=torch.float32, roundings=ROUNDINGS)
    assert GgufFile(file).fields["tokenizer.ggml.tokens"][ids[-1]] == tokenizer.convert_ids_to_tokens(ids[-1])
    with pytest.raises(ConfigError, match="cannot hold"):
        export_gguf_adapter(base, tmp_path / "a.gguf", adapter=adapter)
