from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from halfbyte.config import RunConfig
from halfbyte.config.load import load_config, make_config
from halfbyte.errors import ConfigError, DataError, FormatError
from halfbyte.models import load_adapter, load_model, load_run
from halfbyte.nn import iter_lora
from halfbyte.quant import QuantSpec
from halfbyte.train import run_training
from tests.train.tiny import build_tiny, build_tokenizer


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n * n}."},
            ]
        }
        for n in range(20)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config_of(model: Path, data: Path, out: Path, **options: Any) -> RunConfig:
    defaults = {
        "model.path": str(model),
        "model.device": "cpu",
        "data.train": str(data),
        "data.max_length": 128,
        "data.held_out_fraction": 0.2,
        "train.max_steps": 4,
        "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 1,
        "train.max_sample_tokens": 4,
        "train.num_samples": 2,
        "output_dir": str(out),
    }
    return make_config({**defaults, **options})


def test_run_training_leaves_everything_in_its_folder(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", io.StringIO()
    config = config_of(model_folder, data_file, out)
    result = run_training(config, console=Console(file=text))

    names = {path.name for path in out.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert names >= expected | {"run.yaml", "summary.json", "logs", "checkpoint-4"}
    assert load_config(out / "run.yaml") == config

    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_after"]["loss"] < summary["held_out_before"]["loss"]
    assert summary["steps"] == 4
    assert summary["tokens_per_second"] > summary["trained_tokens_per_second"] > 0
    assert len(summary["samples"]) == 2
    sample = summary["samples"][0]
    assert sample["question"].startswith("What is ")
    assert sample["expected"].startswith("It is ")
    assert sample["before"] != sample["after"]
    assert result.summary.held_out_after.loss == summary["held_out_after"]["loss"]

    shown = text.getvalue()
    said = ("20 rows", "in 4 bits", "adapters of rank 16", "run: 4 steps", "plan: ", f"writing to {out}", "tokens/s")
    for words in said:
        assert words in shown
    assert f"halfbyte merge {out}" in shown
    assert "<|im_start|>assistant\n[[It is 0.<|im_end|>" in shown


@pytest.mark.parametrize("variant", [{}, {"lora.dora": True}, {"lora.init": "pissa_niter_2"}], ids=str)
def test_run_training_resumes_what_was_cut(
    model_folder: Path, data_file: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    options = {"train.save_steps": 2, **variant}
    whole = config_of(model_folder, data_file, tmp_path / "whole", **options)
    cut = config_of(model_folder, data_file, tmp_path / "cut", **options)
    quiet = Console(file=io.StringIO())
    first = run_training(whole, console=quiet)
    run_training(cut, console=quiet)
    # What a crash after step 3 leaves behind.
    for name in ("summary.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    for path in (tmp_path / "cut" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "cut" / "checkpoint-4").rmdir()
    text = io.StringIO()
    second = run_training(cut, console=Console(file=text, width=200))
    assert f"going on after step 2, from {tmp_path / 'cut' / 'checkpoint-2'}; --overwrite would" in text.getvalue()
    assert second.summary.steps_now == 2
    assert second.summary.held_out_after == first.summary.held_out_after
    assert [s.after for s in second.summary.samples] == [s.after for s in first.summary.samples]
    for (path, a), (_, b) in zip(iter_lora(first.model), iter_lora(second.model), strict=True):
        assert all(torch.equal(value, b.adapter()[name]) for name, value in a.adapter().items()), path


def test_run_training_refuses_to_resume_from_another_split(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    quiet, options = Console(file=io.StringIO()), {"lora.init": "pissa", "train.save_steps": 2}
    run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=quiet)
    options |= {"train.resume": True, "lora.init": "pissa_niter_1", "train.max_steps": 6}
    with pytest.raises(ConfigError, match=r"lora\.init was pissa, now pissa_niter_1"):
        run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=quiet)
    # As with another release of torch, that finds another part by the same options.
    path = tmp_path / "out" / "run.yaml"
    path.write_text(path.read_text().replace("init: pissa", "init: pissa_niter_1"))
    with pytest.raises(FormatError, match="begun from another part"):
        run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=quiet)


def test_run_with_pissa_answers_as_it_was_trained(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    text, options = io.StringIO(), {"lora.init": "pissa"}
    result = run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=Console(file=text))
    assert "adapters begin from the weights: pissa" in text.getvalue()
    assert result.summary.held_out_after.loss < result.summary.held_out_before.loss
    again = load_run(tmp_path / "out", device="cpu", attn_implementation="halfbyte").model
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, result.model(input_ids=ids).logits)
    # Onto the plain base, as from anywhere else, it is another model, and a near one.
    plain = load_model(model_folder, quant=QuantSpec(), device="cpu", attn_implementation="halfbyte").model
    load_adapter(plain, tmp_path / "out")
    with torch.no_grad():
        assert not torch.allclose(plain(input_ids=ids).logits, result.model(input_ids=ids).logits, atol=1e-4)


def test_run_training_goes_on_from_an_adapter(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    first = run_training(config_of(model_folder, data_file, tmp_path / "a"), console=quiet)
    options = {"lora.adapter": str(tmp_path / "a"), "train.max_steps": 1, "train.learning_rate": 1e-9}
    second = run_training(config_of(model_folder, data_file, tmp_path / "b", **options), console=quiet)
    assert second.summary.held_out_before == first.summary.held_out_before
    assert second.summary.held_out_after.loss == pytest.approx(first.summary.held_out_after.loss, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"data.packing": False, "train.group_by_length": True},
        {"quant.enabled": False, "train.optim": "paged_adamw_32bit"},
        {"model.attention": "eager", "train.gradient_checkpointing": True},
        {"data.held_out_fraction": 0.0, "train.report_to": ()},
        {"train.warmup_steps": 2, "train.eval_steps": 2, "train.gradient_accumulation_steps": 2},
    ],
)
def test_run_training_takes_every_way(
    model_folder: Path, data_file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    config = config_of(model_folder, data_file, tmp_path / "out", **{"train.max_steps": 2, **options})
    result = run_training(config, console=Console(file=io.StringIO()))
    assert result.summary.steps == 2
    assert (result.summary.held_out_after is None) == (config.data.held_out_fraction == 0)
    assert (tmp_path / "out" / "logs").exists() == bool(config.train.report_to)


def test_run_training_trains_on_plain_text(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"line {n} of a text"}) for n in range(12)))
    text = io.StringIO()
    result = run_training(config_of(model_folder, data, tmp_path / "out"), console=Console(file=text))
    assert result.summary.samples == ()
    assert result.summary.held_out_after is not None


def test_run_training_does_not_write_over_a_run(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    config = config_of(model_folder, data_file, tmp_path / "out", **{"train.max_steps": 1})
    run_training(config, console=quiet)
    with pytest.raises(ConfigError, match="already holds a finished run"):
        run_training(config, console=quiet)
    options = {"train.max_steps": 2, "train.overwrite": True}
    result = run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=quiet)
    assert result.summary.steps == 2
    assert not (tmp_path / "out" / "checkpoint-1").exists()


def test_run_training_fails_before_it_writes(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    quiet = Console(file=io.StringIO())
    for options, kind, message in (
        ({"data.max_length": 4096}, ConfigError, "made for 256 tokens"),
        ({"lora.targets": ("no_such",)}, ConfigError, "no_such"),
        ({"data.train": str(tmp_path / "nothing.jsonl")}, DataError, "nothing.jsonl"),
    ):
        with pytest.raises(kind, match=message):
            run_training(config_of(model_folder, data_file, tmp_path / "out", **options), console=quiet)
    assert not (tmp_path / "out").exists()


def test_adapter_of_a_run_loads_on_its_base(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    result = run_training(config_of(model_folder, data_file, tmp_path / "out"), console=Console(file=io.StringIO()))
    fresh = load_model(model_folder, quant=QuantSpec(), device="cpu", attn_implementation="halfbyte").model
    load_adapter(fresh, tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        # The trained model's layers are fused, the fresh one's are not: another order of summation.
        torch.testing.assert_close(fresh(input_ids=ids).logits, result.model(input_ids=ids).logits)


# More than the model has rows to spare.
ADDED = ("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|e|>")


def chat_folder(folder: Path, family: str = "llama", *, is_tied: bool = False) -> Path:
    model = build_tiny(family)
    if is_tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("whole", [(), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("fused", [True, False])
def test_run_training_adds_tokens(
    data_file: Path, tmp_path: Path, is_tied: bool, whole: tuple[str, ...], fused: bool
) -> None:
    base = chat_folder(tmp_path / "base", is_tied=is_tied)
    options = {"model.added_tokens": ADDED, "lora.modules_to_save": whole, "model.pad_vocabulary_to": 8}
    text = io.StringIO()
    config = config_of(base, data_file, tmp_path / "a", **{"train.fused": fused, **options})
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "<|a|>" + row["messages"][1]["content"] + "<|b|>"
    data_file.write_text("\n".join(json.dumps(row) for row in rows))
    result = run_training(config, console=Console(file=text))
    assert f"{', '.join(ADDED)} added" in text.getvalue()
    assert result.summary.held_out_after.loss < result.summary.held_out_before.loss
    loaded = load_run(tmp_path / "a")
    words = len(result.tokenizer)
    assert len(loaded.tokenizer) == words > 104
    size = loaded.model.config.vocab_size
    assert size == (-(-words // 8) * 8 if whole else words)
    ids = torch.arange(3, words)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (result.model, loaded.model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_run_training_adds_the_markers_of_a_template(data_file: Path, tmp_path: Path) -> None:
    base = chat_folder(tmp_path / "base")
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|over|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
    )
    options = {"data.chat_template": str(template), "train.max_steps": 1}
    text = io.StringIO()
    run_training(config_of(base, data_file, tmp_path / "a", **options), console=Console(file=text, width=200))
    assert "<|turn|>, <|over|> of the chat template: several tokens each" in text.getvalue()
    text = io.StringIO()
    options |= {"model.added_tokens": "template"}
    result = run_training(config_of(base, data_file, tmp_path / "b", **options), console=Console(file=text, width=200))
    assert "<|turn|>, <|over|> added" in text.getvalue()
    assert "several tokens each" not in text.getvalue()
    assert len(result.tokenizer("<|turn|>", add_special_tokens=False)["input_ids"]) == 1


def test_run_training_goes_on_with_added_tokens(data_file: Path, tmp_path: Path) -> None:
    base, quiet = chat_folder(tmp_path / "base"), Console(file=io.StringIO())
    options = {"model.added_tokens": ("<|a|>",)}
    first = run_training(config_of(base, data_file, tmp_path / "a", **options), console=quiet)
    options = {"lora.adapter": str(tmp_path / "a"), "train.max_steps": 1, "train.learning_rate": 1e-9}
    second = run_training(config_of(base, data_file, tmp_path / "b", **options), console=quiet)
    assert len(second.tokenizer) == len(first.tokenizer)
    assert second.summary.held_out_after.loss == pytest.approx(first.summary.held_out_after.loss, rel=1e-5)
    with pytest.raises(ConfigError, match="does not have"):
        run_training(
            config_of(base, data_file, tmp_path / "c", **options, **{"model.added_tokens": ("<|c|>",)}), console=quiet
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora.rank": 8}, r"lora\.rank is 8, but the adapter to go on with .* has 16"),
        ({"lora.targets": ("q_proj",)}, r"lora\.targets means other layers .* has model\.layers\.0\.mlp"),
        ({"lora.modules_to_save": ("lm_head",)}, r"lora\.modules_to_save"),
        ({"lora.rslora": True}, r"lora\.rslora"),
    ],
)
def test_options_that_contradict_an_earlier_adapter_are_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    quiet = Console(file=io.StringIO())
    run_training(config_of(model_folder, data_file, tmp_path / "a", **{"train.max_steps": 1}), console=quiet)
    options = {"lora.adapter": str(tmp_path / "a"), **options}
    with pytest.raises(ConfigError, match=message):
        run_training(config_of(model_folder, data_file, tmp_path / "b", **options), console=quiet)


def test_an_adapter_of_another_base_is_refused(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    text = io.StringIO()
    run_training(config_of(model_folder, data_file, tmp_path / "a"), console=Console(file=text))
    one: dict[str, Any] = {"lora.adapter": str(tmp_path / "a")}
    moved, other = tmp_path / model_folder.name, tmp_path / "other"
    for folder in (moved, other):
        shutil.copytree(model_folder, folder)
    with pytest.raises(ConfigError, match=r"was trained on .* not on .*other"):
        run_training(config_of(other, data_file, tmp_path / "b", **one), console=Console(file=text))
    one |= {"quant.double_quant": False, "lora.dropout": 0.3}
    result = run_training(config_of(moved, data_file, tmp_path / "c", **one), console=Console(file=text, width=400))
    assert "is taken for the same" in text.getvalue()
    assert "was trained on a base held otherwise" in text.getvalue()
    assert {layer.dropout for _, layer in iter_lora(result.model)} == {0.3}
