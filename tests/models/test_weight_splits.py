"""Models whose adapters begin from the weights: loaded, saved, loaded again by us and by PEFT, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export import export_bnb4bit, merge_adapter, merge_in_place
from halfbyte.models.adapter_files import load_adapter, save_adapter
from halfbyte.models.fused_layers import fuse_layers_, unfuse_layers_
from halfbyte.models.load import load_model
from halfbyte.models.run_folder import load_run
from halfbyte.models.weight_splits import NewSplits, stored_splits
from halfbyte.nn import Linear4bit, LoraSpec, adapters_disabled, attach_adapters, iter_lora
from halfbyte.quant import QuantSpec
from tests.models.test_adapter_files import dequantized
from tests.models.test_expanded_decoder import check_logits
from tests.models.test_static_decoder import PROMPTS
from tests.models.tiny import logits_of, save_tiny
from tests.oracles import assert_close, relative_rms

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROUNDINGS = 128
NF4 = QuantSpec()
SPECS = {
    "pissa": LoraSpec(rank=4, alpha=8, init="pissa", seed=1),
    "pissa on a subspace": LoraSpec(rank=4, alpha=8, init="pissa_niter_4", seed=1, targets=("q_proj", "down_proj")),
    "pissa, rslora, patterns": LoraSpec(
        rank=4, alpha=6, rslora=True, init="pissa", rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}
    ),
    "loftq of 1 round": LoraSpec(rank=4, alpha=8, init="loftq"),
    "loftq of 3 rounds": LoraSpec(rank=4, alpha=8, init="loftq", loftq_iterations=3),
}
ALTERING = sorted(SPECS.keys() - {"loftq of 1 round"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), dtype=torch.float32)


def begin(base: Path, spec: LoraSpec, *, quant: QuantSpec | None = NF4) -> PreTrainedModel:
    """Return a model as training begins."""
    loaded = load_model(base, quant=quant, compute_dtype="float32", device="cpu", splits=NewSplits(spec))
    attach_adapters(loaded.model, spec, loaded.splits)
    return loaded.model


def tune(base: Path, spec: LoraSpec, folder: Path, *, quant: QuantSpec | None = NF4) -> PreTrainedModel:
    """Return a model whose adapters have moved, written to a folder."""
    model = begin(base, spec, quant=quant)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in iter_lora(model):
            for parameter in layer.adapter().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, base_model=str(base), spec=spec)
    return model.eval()


def plain_model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_a_base_without_what_was_taken_is_quantised_better(llama: Path) -> None:
    exact = logits_of(plain_model(llama))
    plain = load_model(llama, quant=NF4, compute_dtype="float32", device="cpu").model
    errors = {"nf4": relative_rms(exact, logits_of(plain))}
    for name in ("pissa", "loftq of 1 round", "loftq of 3 rounds"):
        model = begin(llama, SPECS[name])
        assert all(isinstance(layer.base, Linear4bit) for _, layer in iter_lora(model))
        errors[name] = relative_rms(exact, logits_of(model))
    assert max(errors[name] for name in errors if name != "nf4") < errors["nf4"]


@pytest.mark.parametrize("name", SPECS)
def test_load_run_has_the_base_of_the_training_bit_for_bit(name: str, llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS[name], tmp_path)
    again = load_run(tmp_path, compute_dtype="float32", device="cpu").model
    ours, theirs = dict(iter_lora(tuned)), dict(iter_lora(again))
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        other = theirs[path]
        assert (layer.rank, layer.scaling) == (other.rank, pytest.approx(other.scaling))
        assert all(layer.adapter()[key].equal(value) for key, value in other.adapter().items())
        assert layer.weight.equal(other.weight)
    assert_close("logits", logits_of(tuned), logits_of(again), dtype=torch.float32, roundings=4)


@pytest.mark.parametrize("name", SPECS)
def test_saved_adapter_is_an_ordinary_one_for_peft(name: str, llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS[name], tmp_path)
    has_halves = name in ALTERING
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert ("halfbyte.ranks" in file.metadata()) == has_halves
    # On the weights that the training had, less what was taken out: the same, to the last roundings.
    full = dequantized(tuned, llama)
    with torch.no_grad():
        for path, layer in iter_lora(tuned):
            if layer.taken_A is not None and layer.taken_B is not None:
                full.get_submodule(path).weight += layer.scaling * layer.taken_B @ layer.taken_A
    theirs = PeftModel.from_pretrained(full, tmp_path).eval()
    assert_close("tuned", logits_of(theirs), logits_of(tuned), dtype=torch.float32, roundings=ROUNDINGS)


@pytest.mark.parametrize("quantises", [True, False], ids=["4bit", "16bit"])
def test_on_the_plain_base_pissa_is_near_what_was_trained(quantises: bool, llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS["pissa"], tmp_path)
    plain = load_model(llama, quant=NF4 if quantises else None, compute_dtype="float32", device="cpu").model
    untuned = relative_rms(logits_of(tuned), logits_of(plain))
    load_adapter(plain, tmp_path)
    error = relative_rms(logits_of(tuned), logits_of(plain))
    # Off by quantisation errors, on the order of what NF4 itself is off by.
    assert 0 < error < 0.5 * untuned


def test_pissa_without_quantisation_is_exact_on_the_plain_base(llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS["pissa"], tmp_path, quant=None)
    theirs = PeftModel.from_pretrained(plain_model(llama), tmp_path).eval()
    assert_close("tuned", logits_of(theirs), logits_of(tuned), dtype=torch.float32, roundings=ROUNDINGS)


def test_loftq_of_one_round_is_exact_on_the_plain_4bit_base(llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS["loftq of 1 round"], tmp_path)
    plain = load_model(llama, quant=NF4, compute_dtype="float32", device="cpu").model
    load_adapter(plain, tmp_path)
    assert logits_of(plain).equal(logits_of(tuned))
    assert load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == (4, 64)


@pytest.mark.parametrize("name", ["pissa", "loftq of 3 rounds"])
def test_adapters_disabled_gives_back_what_was_taken(name: str, llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS[name], tmp_path)
    exact = logits_of(plain_model(llama))
    for fused in (False, True):
        if fused:
            assert fuse_layers_(tuned).num_fused == 2
        with adapters_disabled(tuned):
            base = logits_of(tuned)
            if fused:
                check_logits(tuned, PROMPTS[:1])
        # As near to the model as one in 4 bits is.
        assert relative_rms(exact, base) < 0.3 < relative_rms(exact, logits_of(tuned))
    unfuse_layers_(tuned)


def test_fused_blocks_give_the_logits_of_a_split_model_by_base_and_by_adapter(llama: Path) -> None:
    model = begin(llama, SPECS["pissa"]).eval()
    generic, again = logits_of(model), None
    with adapters_disabled(model):
        base = logits_of(model)
    fuse_layers_(model)
    again = logits_of(model)
    with adapters_disabled(model):
        fused_base = logits_of(model)
    assert_close("adapter", generic, again, dtype=torch.float32, roundings=ROUNDINGS)
    assert_close("base", base, fused_base, dtype=torch.float32, roundings=ROUNDINGS)
    # Nothing has moved yet.
    assert_close("begun", base, generic, dtype=torch.float32, roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ALTERING)
def test_merging_onto_the_dequantised_base_is_what_was_trained(name: str, llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, SPECS[name], tmp_path / "run")
    merge_adapter(llama, tmp_path / "run", tmp_path / "merged", onto="dequantized", dtype="float32")
    merged = plain_model(tmp_path / "merged")
    assert_close("merged", logits_of(tuned), logits_of(merged), dtype=torch.float32, roundings=ROUNDINGS)
    in_place = merge_in_place(tuned, dtype=torch.float32)
    assert_close("in place", logits_of(merged), logits_of(in_place), dtype=torch.float32, roundings=ROUNDINGS)


def test_merging_onto_the_original_adds_what_peft_adds(llama: Path, tmp_path: Path) -> None:
    tune(llama, SPECS["pissa"], tmp_path / "run")
    merge_adapter(llama, tmp_path / "run", tmp_path / "merged", onto="original", dtype="float32")
    theirs = PeftModel.from_pretrained(plain_model(llama), tmp_path / "run").eval()
    merged = plain_model(tmp_path / "merged")
    assert_close("merged", logits_of(theirs), logits_of(merged), dtype=torch.float32, roundings=ROUNDINGS)


def test_a_base_in_4_bits_is_refused(llama: Path, tmp_path: Path) -> None:
    export_bnb4bit(llama, tmp_path / "nf4", NF4)
    with pytest.raises(ConfigError, match="in 4 bits already"):
        load_model(tmp_path / "nf4", quant=NF4, device="cpu", splits=NewSplits(SPECS["pissa"]))
    model = load_model(llama, quant=NF4, device="cpu").model
    with pytest.raises(ConfigError, match="before they are quantised"):
        attach_adapters(model, SPECS["pissa"])


def test_a_rank_above_the_weights_names_the_layer(llama: Path) -> None:
    spec = LoraSpec(rank=40, init="pissa")
    with pytest.raises(ConfigError, match=r"k_proj: lora.rank is 40.*32"):
        begin(llama, spec)


def test_ranks_that_are_no_halves_are_refused(llama: Path, tmp_path: Path) -> None:
    tune(llama, LoraSpec(rank=3, alpha=6), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "halfbyte.ranks": "trained, begun from"})
    splits = stored_splits(tmp_path, NF4)
    with pytest.raises(FormatError, match="rank 3"):
        load_model(llama, quant=NF4, device="cpu", splits=splits)
