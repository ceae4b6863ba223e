"""Whole models with DoRA adapters: gradients against PEFT, decoding against the library's forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from halfbyte.models.expanded_decoder import ExpandedDecoder, why_not_expanded
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.models.generate import GenerationOptions, iter_tokens
from halfbyte.models.load import load_model
from halfbyte.models.static_decoder import why_not_static
from halfbyte.nn import LoraSpec, adapters_disabled, attach_adapters, expanded_for_inference, iter_lora
from halfbyte.quant import QuantSpec
from tests.models.test_adapter_files import dequantized
from tests.models.test_expanded_decoder import check_logits
from tests.models.test_static_decoder import PROMPTS, logits_without_cache
from tests.models.tiny import logits_of, save_tiny, token_ids
from tests.oracles import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SPEC = LoraSpec(rank=4, alpha=8, dropout=0.0, dora=True)
# As for LoRA, see test_adapter_files: a few roundings for each product of two layers, forward and backward.
ROUNDINGS = 128


def build_model(base: Path, quant: QuantSpec | None = None, spec: LoraSpec = SPEC) -> PreTrainedModel:
    """Return a model whose adapters turn and scale."""
    model = load_model(base, quant=quant, compute_dtype="float32", device="cpu").model
    attach_adapters(model, spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in iter_lora(model):
            layer.lora_B.normal_(std=0.05, generator=generator)
            assert layer.lora_magnitude_vector is not None
            layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn(layer.out_features, generator=generator))
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("quant", [None, QuantSpec()], ids=["plain", "4bit"])
def test_dora_of_a_model_has_the_logits_and_gradients_of_peft(
    quant: QuantSpec | None, family: str, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path, family, dtype=torch.float32)
    ours = build_model(base, quant).train()
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    theirs = get_peft_model(dequantized(ours, base), config).train()
    layers = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    pairs = {}
    for path, layer in iter_lora(ours):
        other = layers[path]
        magnitude = other.lora_magnitude_vector["default"].weight
        # As each makes it before training, both lengths of rows are those of the weight.
        for name, mine, parameter in (
            ("A", layer.lora_A, other.lora_A["default"].weight),
            ("B", layer.lora_B, other.lora_B["default"].weight),
            ("m", layer.lora_magnitude_vector, magnitude),
        ):
            parameter.data.copy_(mine.detach())
            pairs[f"{path}.{name}"] = mine, parameter
    ids = token_ids()
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert_close("logits", logits_of(theirs), logits_of(ours), dtype=torch.float32, roundings=ROUNDINGS)
    assert len(pairs) == 42
    for name, (mine, parameter) in pairs.items():
        assert_close(name, parameter.grad, mine.grad, dtype=torch.float32, roundings=ROUNDINGS, reduction_length=96)


def test_dora_begins_with_the_lengths_of_the_base(llama: Path) -> None:
    model = load_model(llama, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    before = logits_of(model)
    report = attach_adapters(model, SPEC)
    assert "14 DoRA adapters of rank 4" in str(report)
    assert_close("logits", before, logits_of(model), dtype=torch.float32, roundings=ROUNDINGS)


def test_dora_is_off_inside_adapters_disabled(llama: Path) -> None:
    model = build_model(llama, QuantSpec())
    base = load_model(llama, quant=QuantSpec(), compute_dtype="float32", device="cpu").model
    with adapters_disabled(model):
        assert logits_of(model).equal(logits_of(base))
    assert not torch.allclose(logits_of(model), logits_of(base), rtol=1e-2)


def test_dora_is_not_fused_and_says_so(llama: Path) -> None:
    model = build_model(llama, QuantSpec())
    report = fuse_layers_(model)
    assert report.num_fused == 0
    assert "magnitudes (DoRA)" in str(report)
    assert "not fused" in str(why_not_static(model, 1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_expanded_decoder_takes_dora(family: str, tmp_path: Path) -> None:
    model = build_model(save_tiny(tmp_path, family, dtype=torch.float32), QuantSpec())
    assert why_not_expanded(model) is None
    check_logits(model, PROMPTS)
    with adapters_disabled(model):
        check_logits(model, PROMPTS[:1])
    decoder = ExpandedDecoder(model, num_prompts=1, num_tokens=64)
    with torch.no_grad():
        next(iter_lora(model))[1].adapter()["lora_magnitude_vector"].mul_(2)
    assert not decoder.serves(model, num_prompts=1, num_tokens=64)


def test_expanded_weights_take_dora(tmp_path: Path) -> None:
    model = build_model(save_tiny(tmp_path, "qwen2", dtype=torch.float32), QuantSpec())
    expected = logits_without_cache(model, PROMPTS[0])
    with expanded_for_inference(model, dtype=torch.float32):
        actual = logits_without_cache(model, PROMPTS[0])
    assert_close("logits", expected, actual, dtype=torch.float32, roundings=ROUNDINGS)


def test_dora_answers_as_transformers_generates(llama: Path) -> None:
    model = build_model(llama, QuantSpec())
    ids = torch.tensor([PROMPTS[0]])
    options = GenerationOptions(max_new_tokens=8)
    tokens = [row[0] for row in iter_tokens(model, [PROMPTS[0]], options=options, stop_ids=frozenset())]
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == theirs[0, ids.shape[1] :].tolist()


def test_kept_lengths_follow_the_adapter(llama: Path) -> None:
    model = build_model(llama, QuantSpec())
    logits_of(model)
    with torch.no_grad():
        for _, layer in iter_lora(model):
            layer.lora_B.mul_(3)
    kept = logits_of(model)
    for _, layer in iter_lora(model):
        layer._lengths = None
    assert kept.equal(logits_of(model))
