"""GGUF files of tiny models: read back by the gguf package, and run by llama.cpp beside transformers."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export import export_gguf, merge_adapter
from halfbyte.models import load_model
from halfbyte.nn import LoraSpec
from halfbyte.quant import QuantSpec
from tests.export.llama_cpp import VOCABULARY, build_byte_level, llama_cpp, save_speaking_tiny
from tests.export.test_merge import save_tuned
from tests.models.tiny import STRETCHED, save_tiny
from tests.models.tiny_gguf import save_tiny_gguf
from tests.oracles import assert_close, relative_rms

FAMILIES = ["llama", "llama-tied", "llama-stretched", "mistral", "qwen2", "qwen3"]
PROMPT = [11, 45, 310, 7, 199, 340, 28, 61, 5]
ADAPTER = LoraSpec(rank=4, alpha=8)
needs_llama_cpp = pytest.mark.skipif(
    sys.platform != "linux", reason="the test extra brings llama.cpp's binding on Linux only"
)
# Against an F32 file llama.cpp computes in fp32 all through: seven products a layer and the head, sums of at most 96.
FP32 = {"dtype": torch.float32, "roundings": 15, "reduction_length": 96}
# Against an F16 file it rounds what goes into each product to fp16: before q, k and v, before o, before gate and up,
# before down, in each of two layers, and before the head. Nine errors of random sign, each at most a unit roundoff
# relative to what is rounded, add up to three in quadrature. (The weights are fp16 numbers in the model as well.)
FP16 = {"dtype": torch.float16, "roundings": 3, "reduction_length": 96}
# Against a Q8_0 file it rounds them to 8 bits: 127 steps for the largest of 32, which is at most sqrt(32) times their
# RMS. A step d leaves an error of d / sqrt(12), and nine add up to three times one.
Q8_0_LIMIT = 3 * math.sqrt(32) / 127 / math.sqrt(12)
# The largest relative error of a row's values that each type leaves: about half a step of its levels.
PRECISION = {"F32": 0.0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 7e-3, "Q5_1": 0.04, "Q5_0": 0.05, "Q4_1": 0.08, "Q4_0": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking_tiny(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gguf_is_read_back_as_the_model(family: str, tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", family, dtype=torch.float32)
    report = export_gguf(folder, tmp_path / "model.gguf", type_name="F32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    again = load_model(tmp_path / "model.gguf", quant=None, compute_dtype="float32", device="cpu").model
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert again.config.rope_parameters == model.config.rope_parameters
    assert report.num_bytes == (tmp_path / "model.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.gguf"]


@pytest.mark.parametrize("type_name", PRECISION)
def test_export_gguf_stores_each_type(llama: Path, tmp_path: Path, type_name: str) -> None:
    report = export_gguf(llama, tmp_path / "model.gguf", type_name=type_name)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    head_type = type_name if type_name in ("F32", "F16", "BF16") else "Q8_0"
    assert types.pop("output.weight") == head_type
    assert {name for name, found in types.items() if found == "F32" or "norm" in name} == (
        set(types) if type_name == "F32" else {name for name in types if "norm" in name}
    )
    assert {found for name, found in types.items() if "norm" not in name} == {type_name}
    paths = {
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
        "token_embd.weight": "model.embed_tokens",
    }
    for name, path in paths.items():
        stored = next(tensor for tensor in reader.tensors if tensor.name == name)
        values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        error = relative_rms(model.get_parameter(f"{path}.weight").detach(), torch.from_numpy(values.copy()))
        assert error <= PRECISION[type_name], name
    file_type = reader.fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_") == type_name
    assert type_name in str(report)


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    # Weights that are fp16 and fp32 numbers alike, so that both files hold the model itself.
    folder = save_speaking_tiny(tmp_path / "model", family, dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for type_name, roundings in (("F32", FP32), ("F16", FP16)):
        export_gguf(folder, tmp_path / f"{type_name}.gguf", type_name=type_name)
        with llama_cpp(tmp_path / f"{type_name}.gguf") as oracle:
            assert_same(model, oracle.log_probabilities(PROMPT), **roundings)
            if type_name == "F32":
                assert oracle.generate(PROMPT) == generate(model)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": {**STRETCHED, "factor": 32.0, "original_max_position_embeddings": 64}}),
        ("qwen2", {"tie_word_embeddings": True}),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
    ],
    ids=["biases", "wide heads", "linear", "llama3", "tied", "yarn"],
)
def test_llama_cpp_computes_variants(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", family, **changes)
    export_gguf(folder, tmp_path / "model.gguf", type_name="F32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with llama_cpp(tmp_path / "model.gguf") as oracle:
        assert_same(model, oracle.log_probabilities(PROMPT), **FP32)


@needs_llama_cpp
@pytest.mark.parametrize(("onto", "quant"), [("dequantized", QuantSpec()), ("original", None)])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_llama_cpp_computes_the_merged_model(family: str, onto: Any, quant: QuantSpec | None, tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", family)
    tuned = save_tuned(folder, tmp_path / "adapter", ADAPTER, quant=quant)
    options = {"adapter": tmp_path / "adapter", "type_name": "F32", "onto": onto, "spec": QuantSpec()}
    report = export_gguf(folder, tmp_path / "model.gguf", **options)
    assert "merged 14 adapters" in str(report)
    with llama_cpp(tmp_path / "model.gguf") as oracle:
        assert_same(tuned, oracle.log_probabilities(PROMPT), **FP32)


@needs_llama_cpp
def test_llama_cpp_computes_with_quantised_weights(llama: Path, tmp_path: Path) -> None:
    tuned = save_tuned(llama, tmp_path / "adapter", ADAPTER)
    export_gguf(llama, tmp_path / "model.gguf", adapter=tmp_path / "adapter", type_name="Q8_0")
    model = load_model(tmp_path / "model.gguf", quant=None, compute_dtype="float32", device="cpu").model
    with llama_cpp(tmp_path / "model.gguf") as oracle:
        found = oracle.log_probabilities(PROMPT)
    assert relative_rms(centred(exact_logits(model)), centred(found)) <= Q8_0_LIMIT
    # The weights themselves are rounded likewise, independently of the activations.
    assert relative_rms(centred(exact_logits(tuned)), centred(found)) <= math.sqrt(2) * Q8_0_LIMIT


def test_export_gguf_equals_exporting_the_merged_model(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ADAPTER)
    export_gguf(llama, tmp_path / "once.gguf", adapter=tmp_path / "adapter", type_name="Q8_0")
    merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    export_gguf(tmp_path / "merged", tmp_path / "twice.gguf", type_name="Q8_0")
    once, twice = tensors_of(tmp_path / "once.gguf"), tensors_of(tmp_path / "twice.gguf")
    assert once.keys() == twice.keys()
    for name, raw in once.items():
        assert numpy.array_equal(raw, twice[name]), name


def test_export_gguf_takes_modules_trained_whole_and_unties(tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", "llama-tied")
    spec = LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",))
    tuned = save_tuned(folder, tmp_path / "adapter", spec, quant=None)
    export_gguf(folder, tmp_path / "model.gguf", adapter=tmp_path / "adapter", type_name="F32", spec=None)
    again = load_model(tmp_path / "model.gguf", quant=None, compute_dtype="float32", device="cpu").model
    assert torch.equal(again.lm_head.weight, tuned.lm_head.trained.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_export_gguf_takes_a_gguf_base(tmp_path: Path) -> None:
    base = save_tiny_gguf(tmp_path / "tiny.gguf", "llama", quantization="Q8_0")
    save_tuned(base, tmp_path / "adapter", ADAPTER, quant=None)
    tokenizer = build_byte_level()
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"the tokenizer has a token .* the model 96 tokens"):
        export_gguf(base, tmp_path / "out.gguf", adapter=tmp_path / "adapter", spec=None)
    assert not (tmp_path / "out.gguf").exists()


def test_export_gguf_says_where_a_row_is_no_whole_number_of_blocks(tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", intermediate_size=80)
    report = export_gguf(folder, tmp_path / "model.gguf", type_name="Q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {name for name, found in types.items() if found == "F16"} == {f"blk.{i}.ffn_down.weight" for i in (0, 1)}
    assert "2 matrices in F16: their rows are no whole number of blocks" in str(report)
    assert "the output head in Q8_0" in str(report)


def test_export_gguf_ends_the_context_with_a_sliding_window(tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", "mistral", sliding_window=64)
    report = export_gguf(folder, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 64
    assert "the context ends with it, at 64 tokens in place of 128" in str(report)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "models of type 'gemma2' are not written as GGUF; known: llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "silu, not 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_export_gguf_refuses_what_llama_cpp_does_not_compute(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_speaking_tiny(tmp_path / "model", family, **changes)
    with pytest.raises(ConfigError, match=message):
        export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_gguf_refuses_wrong_options(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'Q4_K'; allowed: F32"):
        export_gguf(llama, tmp_path / "model.gguf", type_name="Q4_K")
    (tmp_path / "model.gguf").write_text("precious")
    with pytest.raises(ConfigError, match="exists; name another file"):
        export_gguf(llama, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "precious"
    plain = save_tiny(tmp_path / "plain")
    with pytest.raises(ConfigError, match="the tokenizer is WordLevel"):
        export_gguf(plain, tmp_path / "plain.gguf")


def test_export_gguf_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    folder = save_speaking_tiny(tmp_path / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(FormatError, match="beyond float16"):
        export_gguf(folder, tmp_path / "model.gguf", type_name="F16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_gguf_carries_the_tokenizer_of_the_run(llama: Path, tmp_path: Path) -> None:
    save_tuned(llama, tmp_path / "adapter", ADAPTER)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    export_gguf(llama, tmp_path / "model.gguf", adapter=tmp_path / "adapter")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def assert_same(model: PreTrainedModel, found: torch.Tensor, **roundings: Any) -> None:
    """Compare logits after PROMPT: the logarithms of probabilities tell them but for a constant."""
    assert_close("logits", centred(exact_logits(model)), centred(found), **roundings)


def centred(logits: torch.Tensor) -> torch.Tensor:
    assert logits.shape == (VOCABULARY,)
    return logits.double() - logits.double().mean()


def exact_logits(model: PreTrainedModel) -> torch.Tensor:
    return logits_after(copy.deepcopy(model).double(), PROMPT)


@torch.no_grad()
def logits_after(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def generate(model: PreTrainedModel) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(8):
        logits = logits_after(model, tokens)
        # llama.cpp is kept from stopping, see `LlamaCpp.generate`.
        logits[[2, 4]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


def tensors_of(path: Path) -> dict[str, numpy.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
