"""Adapters alone as GGUF files: read back, and by llama.cpp on top of the base beside the adapter in torch."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.export import export_gguf, export_gguf_adapter
from halfbyte.nn import LoraSpec
from tests.export.llama_cpp import llama_cpp, save_speaking_tiny
from tests.export.test_gguf_model import FP32, PROMPT, assert_same, needs_llama_cpp
from tests.export.test_merge import save_tuned

SPECS = {
    "plain": LoraSpec(rank=4, alpha=8),
    "rslora": LoraSpec(rank=4, alpha=8, rslora=True),
    "patterns": LoraSpec(rank=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3, "k_proj": 24}),
    "both": LoraSpec(rank=4, alpha=8, rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3}),
    "head": LoraSpec(rank=4, alpha=8, targets=("lm_head", "q_proj")),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_adds_the_adapter(family: str, name: str, tmp_path: Path) -> None:
    base = save_speaking_tiny(tmp_path / "model", family)
    tuned = save_tuned(base, tmp_path / "adapter", SPECS[name], quant=None)
    export_gguf(base, tmp_path / "base.gguf", type_name="F32")
    export_gguf(base, tmp_path / "merged.gguf", adapter=tmp_path / "adapter", type_name="F32", onto="original")
    report = export_gguf_adapter(base, tmp_path / "adapter.gguf", adapter=tmp_path / "adapter")
    assert ("lora_b of" in str(report)) == (name not in ("plain", "head"))
    with llama_cpp(tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf") as oracle:
        beside = oracle.log_probabilities(PROMPT)
    assert_same(tuned, beside, **FP32)
    with llama_cpp(tmp_path / "merged.gguf") as oracle:
        assert_same(tuned, oracle.log_probabilities(PROMPT), **FP32)
    with llama_cpp(tmp_path / "base.gguf") as oracle, pytest.raises(AssertionError):
        assert_same(tuned, oracle.log_probabilities(PROMPT), **FP32)


def test_export_gguf_adapter_writes_what_llama_cpp_reads(tmp_path: Path) -> None:
    base = save_speaking_tiny(tmp_path / "model", "qwen2")
    tuned = save_tuned(base, tmp_path / "adapter", SPECS["plain"], quant=None)
    report = export_gguf_adapter(base, tmp_path / "adapter.gguf", adapter=tmp_path / "adapter")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    expected = {"general.type": "adapter", "general.architecture": "qwen2", "adapter.type": "lora"}
    assert {key: reader.fields[key].contents() for key in expected} == expected
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 28
    layer = tuned.model.layers[1].mlp.gate_proj
    assert torch.equal(tensors["blk.1.ffn_gate.weight.lora_a"], layer.lora_A)
    assert torch.equal(tensors["blk.1.ffn_gate.weight.lora_b"], layer.lora_B)
    assert report.num_bytes == (tmp_path / "adapter.gguf").stat().st_size


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("llama", LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",)), "trained whole .lm_head."),
        ("llama-tied", LoraSpec(rank=4, targets=("q_proj", "lm_head")), "lm_head has an adapter and is one tensor"),
    ],
)
def test_export_gguf_adapter_refuses_what_cannot_be_said(
    family: str, spec: LoraSpec, message: str, tmp_path: Path
) -> None:
    base = save_speaking_tiny(tmp_path / "model", family)
    save_tuned(base, tmp_path / "adapter", spec, quant=None)
    with pytest.raises(ConfigError, match=message):
        export_gguf_adapter(base, tmp_path / "adapter.gguf", adapter=tmp_path / "adapter")
    with pytest.raises(ConfigError, match="'Q8_0' of an adapter; allowed: F32, F16, BF16"):
        export_gguf_adapter(base, tmp_path / "adapter.gguf", adapter=tmp_path / "adapter", type_name="Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


def test_export_gguf_adapter_refuses_dora(tmp_path: Path) -> None:
    base = save_speaking_tiny(tmp_path / "model", "llama")
    save_tuned(base, tmp_path / "adapter", LoraSpec(rank=4, dora=True), quant=None)
    with pytest.raises(ConfigError, match=r"no magnitudes.*merged model"):
        export_gguf_adapter(base, tmp_path / "adapter.gguf", adapter=tmp_path / "adapter")
    assert not (tmp_path / "adapter.gguf").exists()
