from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from halfbyte.errors import ConfigError, FormatError
from halfbyte.export import export_bnb4bit
from halfbyte.models.load import load_model
from halfbyte.nn import Linear4bit
from halfbyte.quant import QuantSpec
from tests.models.measure_peak import LARGEST_TENSOR_BYTES, peak_bytes, save_wide
from tests.models.tiny import DENSE, MIXTURES, edit_config, logits_of, save_tiny
from tests.oracles import assert_close

NF4 = QuantSpec()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tied"), "llama-tied")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_load_model_unquantised_equals_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = load_model(tmp_path, quant=None, compute_dtype=dtype, device="cpu").model
    assert type(ours) is type(theirs)
    assert torch.equal(logits_of(ours), logits_of(theirs))
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", DENSE)
def test_load_model_quantised_equals_bitsandbytes(family: str, double_quant: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    theirs = load_by_bitsandbytes(tmp_path, compute_dtype=torch.float32, double_quant=double_quant)
    loaded = load_model(tmp_path, quant=QuantSpec(double_quant=double_quant), compute_dtype="float32", device="cpu")
    layers = {path for path, module in theirs.named_modules() if type(module).__name__ == "Linear4bit"}
    assert {path for path, module in loaded.model.named_modules() if isinstance(module, Linear4bit)} == layers
    assert_close(family, logits_of(theirs), logits_of(loaded.model), dtype=torch.float32, roundings=64)


def test_load_model_holds_the_bytes_of_bitsandbytes(llama: Path) -> None:
    theirs = load_by_bitsandbytes(llama, compute_dtype=torch.bfloat16).state_dict()
    ours = load_model(llama, quant=NF4, compute_dtype="bfloat16", device="cpu").model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].view_as(tensor), tensor), name


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_load_model_takes_bitsandbytes_checkpoints_as_they_are(
    llama: Path, tmp_path: Path, double_quant: bool, storage_dtype: torch.dtype
) -> None:
    theirs = load_by_bitsandbytes(
        llama, compute_dtype=torch.bfloat16, double_quant=double_quant, storage_dtype=storage_dtype
    )
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    stored = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    loaded = load_model(tmp_path, quant=NF4, compute_dtype="bfloat16", device="cpu")
    state = loaded.model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert_close("logits", logits_of(theirs), logits_of(loaded.model), dtype=torch.bfloat16, roundings=8)
    assert "taken as they are" in str(loaded.report)


def test_load_model_keeps_embedding_and_head_in_16_bits(tied: Path, llama: Path) -> None:
    for path in (tied, llama):
        loaded = load_model(path, quant=NF4, compute_dtype="float32", device="cpu")
        embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        assert embedding.weight.dtype == head.weight.dtype == torch.bfloat16
        assert (embedding.weight is head.weight) == (path is tied)
        norms = [p for name, p in loaded.model.named_parameters() if "norm" in name]
        assert norms
        assert all(p.dtype == torch.float32 for p in norms)
        assert not any(p.requires_grad for p in loaded.model.parameters())
        assert logits_of(loaded.model).dtype == torch.float32


@pytest.mark.parametrize("shard_size", ["30KB", "1GB"])
def test_load_model_does_not_depend_on_sharding(tmp_path: Path, shard_size: str, llama: Path) -> None:
    save_tiny(tmp_path, shard_size=shard_size)
    once, again = (load_model(p, quant=NF4, compute_dtype="float32", device="cpu").model for p in (llama, tmp_path))
    assert torch.equal(logits_of(once), logits_of(again))


def test_load_model_reads_a_pickle_that_is_named(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = load_model(folder, quant=NF4, compute_dtype="float32", device="cpu").model
    (folder / "model.safetensors").unlink()
    loaded = load_model(folder / "pytorch_model.bin", quant=NF4, compute_dtype="float32", device="cpu").model
    assert torch.equal(logits_of(loaded), logits_of(expected))


def test_load_model_unties_weights_that_differ(tied: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, quant=None, compute_dtype="float32", device="cpu").model
    assert torch.equal(logits_of(ours), logits_of(theirs))


def test_load_model_adds_the_prefix_that_a_bare_decoder_lacks(folder: Path) -> None:
    expected = load_model(folder, quant=None, compute_dtype="float32", device="cpu").model
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder, quant=None, compute_dtype="float32", device="cpu").model
    assert torch.equal(logits_of(loaded), logits_of(expected))


def test_load_model_reports_what_stays_in_16_bits(llama: Path) -> None:
    loaded = load_model(llama, quant=NF4, compute_dtype="float32", device="cpu")
    report = loaded.report
    theirs = AutoModelForCausalLM.from_pretrained(llama)
    assert report.num_parameters == theirs.num_parameters()
    assert report.num_layers_4bit == 14
    assert set(report.kept) == {"embedding", "output head", "norms"}
    assert report.bytes_4bit < report.parameters_4bit * 0.56
    text = str(report)
    assert "left in 16 bits" in text
    assert "output head" in text


def test_load_model_needs_one_tensor_of_memory_above_what_it_keeps(tmp_path: Path) -> None:
    measured = peak_bytes("load", save_wide(tmp_path))
    # One tensor in fp32, and what freed memory the allocator keeps.
    assert measured["peak"] <= measured["held"] + 2 * LARGEST_TENSOR_BYTES + (8 << 20)


def test_load_model_tells_progress(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(
        llama,
        quant=NF4,
        compute_dtype="float32",
        device="cpu",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_load_model_offers_the_tokenizer_and_generation_config(llama: Path) -> None:
    loaded = load_model(llama, quant=NF4, compute_dtype="float32", device="cpu")
    assert loaded.tokenizer("w5 w6").input_ids == [5, 6]
    assert loaded.model.generation_config.eos_token_id == 2
    assert loaded.model.name_or_path == str(llama)


@pytest.mark.parametrize("family", MIXTURES)
def test_load_model_refuses_experts_that_would_stay_in_16_bits(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    with pytest.raises(ConfigError, match=r"stacked expert tensors.*allow_16bit_experts"):
        load_model(tmp_path, quant=NF4, compute_dtype="float32", device="cpu")
    loaded = load_model(tmp_path, quant=NF4, compute_dtype="float32", device="cpu", allow_16bit_experts=True)
    assert "experts" in loaded.report.kept
    assert torch.isfinite(logits_of(loaded.model)).all()


def test_load_model_refuses_a_model_without_linear_layers(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Conv1D"):
        load_model(tmp_path, quant=NF4, compute_dtype="float32", device="cpu")


def test_load_model_refuses_code_of_the_model(folder: Path) -> None:
    edit_config(folder, model_type="mystery", auto_map={"AutoConfig": "configuration_mystery.MysteryConfig"})
    with pytest.raises(FormatError, match="brings its own code"):
        load_model(folder, quant=None, device="cpu")


def test_load_model_refuses_an_unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="mystery")
    with pytest.raises(FormatError, match="'mystery' is unknown"):
        load_model(folder, quant=None, device="cpu")


def test_load_model_refuses_a_model_that_writes_no_text(folder: Path) -> None:
    edit_config(folder, model_type="vit")
    with pytest.raises(FormatError, match="no causal language models"):
        load_model(folder, quant=None, device="cpu")


def test_load_model_names_missing_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"lack 1 of the tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, quant=NF4, device="cpu")


def test_load_model_names_unexpected_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.side_proj.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"hold 1 tensors.*side_proj"):
        load_model(folder, quant=NF4, device="cpu")


def test_load_model_names_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)
    with pytest.raises(FormatError, match=r"down_proj\.weight has shape \[64, 96\].*\[64, 128\]"):
        load_model(folder, quant=NF4, device="cpu")


def load_by_bitsandbytes(
    folder: Path,
    *,
    compute_dtype: torch.dtype,
    double_quant: bool = True,
    storage_dtype: torch.dtype = torch.uint8,
) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=storage_dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=compute_dtype, device_map="cpu"
    )
    # Without gradients bitsandbytes repacks weights for inference on some CPUs; in train mode it does not.
    return model.train()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_a_prepared_checkpoint_is_mapped_on_a_cpu_not_copied(tmp_path: Path) -> None:
    source, folder = save_tiny(tmp_path / "plain"), tmp_path / "nf4"
    plain = load_model(source, quant=NF4, device="cpu", compute_dtype="float32")
    export_bnb4bit(source, folder, NF4)
    loaded = load_model(folder, quant=NF4, device="cpu", compute_dtype="float32")
    assert "mapped from the checkpoint, not copied" in str(loaded.report)
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, _, end = line.split()[0].partition("-")
            places.append((int(start, 16), int(end, 16)))
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    for layer in layers:
        assert any(start <= layer.packed.data_ptr() < end for start, end in places)
    assert torch.equal(logits_of(loaded.model), logits_of(plain.model))
