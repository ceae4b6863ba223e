"""RunConfig: what it accepts, what it refuses and how it says so, and that YAML and command line read alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.config import (
    DataSection,
    LoraSection,
    ModelSection,
    QuantSection,
    RunConfig,
    TrainSection,
    load_config,
    save_run_config,
    to_yaml,
)
from halfbyte.config.describe import REQUIRED, find_option, list_options, nearest_option
from halfbyte.config.load import read_yaml
from halfbyte.config.schema import make_schema
from halfbyte.errors import ConfigError
from halfbyte.quant.tensor import BLOCK_SIZES, CODEBOOKS, QuantSpec

REPOSITORY = Path(__file__).parent.parent
MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\n"
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
WORDS = st.sampled_from(["none", "null", "~", "", "yes", "no", "1e5", "010", "1:30", "2024-01-01", " x ", "a: b", "#c"])


def config(**sections: Any) -> RunConfig:
    return RunConfig(**{"model": ModelSection(path="m"), "data": DataSection(train="d.jsonl"), **sections})


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a ConfigError that says `message`."""
    with pytest.raises(ConfigError) as error:
        yield
    assert message in str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSection(rank=0), "lora.rank is 0; allowed: a whole number, at least 1"),
        (lambda: LoraSection(rank=True), "lora.rank is True; allowed: a whole number, at least 1"),
        (lambda: LoraSection(dropout=1.0), "lora.dropout is 1.0; allowed: a number, at least 0, below 1"),
        (lambda: LoraSection(alpha=float("nan")), "lora.alpha is nan; allowed: a number, above 0"),
        (lambda: LoraSection(targets=()), "lora.targets is empty"),
        (lambda: LoraSection(targets="a(b"), "lora.targets is 'a(b', no regular expression"),
        (lambda: LoraSection(init="pisa"), "lora.init is 'pisa'; allowed: zero, pissa, pissa_niter_N"),
        (lambda: LoraSection(init="pissa_niter_0"), "lora.init is 'pissa_niter_0'; allowed"),
        (lambda: LoraSection(loftq_iterations=2), "lora.loftq_iterations is 2, and lora.init is zero"),
        (lambda: LoraSection(init="pissa", dora=True), "lora.dora trains the lengths of the base's rows"),
        (lambda: LoraSection(init="pissa", adapter="x"), "lora.adapter goes on from trained adapters"),
        (lambda: LoraSection(rank_pattern={"q": 0}), "lora.rank_pattern[q] is 0; allowed: above 0"),
        (lambda: LoraSection(layers_pattern=("h",)), "set both or neither"),
        (lambda: QuantSection(block_size=63), "quant.block_size is 63; allowed: 32, 64, 128"),
        (lambda: QuantSection(codebook="nf5"), "quant.codebook is 'nf5'; allowed: nf4, fp4"),
        (lambda: QuantSection(double_quant="yes"), "quant.double_quant is 'yes'; allowed: true or false"),
        (lambda: DataSection(train="x", max_length=1), "data.max_length is 1; allowed: a whole number, at least 2"),
        (lambda: DataSection(train="x", overlong="split"), "data.overlong is 'split'; allowed: cut, drop, error"),
        (lambda: TrainSection(max_steps=0), "train.max_steps is 0"),
        (lambda: TrainSection(bf16=True, fp16=True), "choose one"),
        (lambda: TrainSection(resume=True, overwrite=True), "choose one"),
        (
            lambda: TrainSection(gradient_checkpointing=1),
            "train.gradient_checkpointing is 1; allowed: auto, offload, or true or false",
        ),
        (lambda: config(train=TrainSection(group_by_length=True)), "set data.packing=false"),
        (
            lambda: config(model=ModelSection(path="m", dtype="float16"), train=TrainSection(bf16=True)),
            "train.bf16 is true but model.dtype is float16",
        ),
        (lambda: config(lora={"rank": 3}), "lora is {'rank': 3}; allowed: LoraSection"),
    ],
)
def test_run_config_refuses_with_field_value_and_allowed_values(make: Any, message: str) -> None:
    with refused(message):
        make()


def test_run_config_brings_values_into_their_declared_form() -> None:
    section = LoraSection(alpha=64, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, exclude=["lm_head"])
    assert (section.alpha, type(section.alpha)) == (64.0, float)
    assert section.targets == ("q_proj", "v_proj")
    assert section.exclude == ("lm_head",)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("layers.0.q_proj", ("layers.0.q_proj",)),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r".*layers\.\d{1,2}\..*", r".*layers\.\d{1,2}\..*"),
    ],
)
def test_lora_targets_tell_names_from_expressions(text: str, targets: object) -> None:
    assert LoraSection(targets=text).targets == targets
    assert load_config(None, {"model.path": "m", "data.train": "d", "lora.targets": text}).lora.targets == targets


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({}, "auto"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16"), ({"bf16": False}, "auto")],
)
def test_compute_dtype_takes_the_usual_names_in(fields: dict[str, bool], dtype: str) -> None:
    assert config(train=TrainSection(**fields)).compute_dtype == dtype


def test_quant_section_agrees_with_quant_spec() -> None:
    spec, section = QuantSpec(), QuantSection()
    for name in ("codebook", "block_size", "double_quant"):
        assert getattr(spec, name) == getattr(section, name)
    for name, values in (("codebook", CODEBOOKS), ("block_size", BLOCK_SIZES)):
        option = find_option(f"quant.{name}")
        assert option is not None
        assert option.allowed == ", ".join(map(str, values))


def test_load_config_merges_defaults_file_and_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora: {rank: 8, alpha: 16}\n")
    loaded = load_config(path, {"lora.rank": "64"})
    assert (loaded.lora.rank, loaded.lora.alpha, loaded.lora.dropout) == (64, 16.0, LoraSection().dropout)


def test_load_config_reads_text_by_the_type_of_its_option(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
model: {path: hub/m, revision: 1e5, device: ~}
data: {train: d.jsonl, system: no, columns: {prompt: question}, packing: off, chat_template: "none"}
train: {learning_rate: 2e-4, adam_epsilon: 1E-6, seed: 010, report_to: none, warmup_steps: null, bf16: yes}
lora:
  target_modules: [q_proj, v_proj]
  rank_pattern: {down_proj: 32}
  layers_to_transform: 0,1
  exclude: lm_head
""".replace("device: ~", "device: cpu"),
    )
    loaded = load_config(path)
    assert loaded.model.revision == "1e5"
    assert (loaded.data.system, loaded.data.packing, loaded.data.chat_template) == ("no", False, "none")
    assert loaded.data.columns == {"prompt": "question"}
    assert (loaded.train.learning_rate, loaded.train.adam_epsilon, loaded.train.seed) == (2e-4, 1e-6, 10)
    assert (loaded.train.report_to, loaded.train.warmup_steps, loaded.train.bf16) == ((), None, True)
    assert loaded.lora == LoraSection(
        targets=("q_proj", "v_proj"), rank_pattern={"down_proj": 32}, layers_to_transform=(0, 1), exclude=("lm_head",)
    )


def test_load_config_takes_peft_names() -> None:
    given_options = {
        "r": "8",
        "lora_alpha": "16",
        "lora_dropout": "0",
        "target_modules": "q_proj",
        "use_rslora": "true",
        "use_dora": "true",
        "init_lora_weights": "true",
    }
    overrides = {f"lora.{name}": text for name, text in given_options.items()}
    loaded = load_config(None, {"model.path": "m", "data.train": "d", **overrides})
    assert loaded.lora == LoraSection(rank=8, alpha=16, dropout=0.0, targets=("q_proj",), rslora=True, dora=True)


def test_lora_section_knows_what_adapters_begin_as() -> None:
    assert LoraSection(init="pissa_niter_16").init == "pissa_niter_16"
    assert LoraSection(init="loftq", loftq_iterations=5, rank=8).loftq_iterations == 5
    assert LoraSection(init="loftq", dora=True).dora


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora:\n  rnk: 3\n", "run.yaml:2: unknown option lora.rnk; did you mean lora.rank?"),
        ("learning_rate: 1\n", "run.yaml:1: unknown option learning_rate; did you mean train.learning_rate?"),
        ("lora: {learning_rate: 1}\n", "unknown option lora.learning_rate; did you mean train.learning_rate?"),
        ("zzzz: 1\n", "run.yaml:1: unknown option zzzz; halfbyte train --help lists them all"),
        ("train:\n  seed: 1\n  seed: 2\n", "run.yaml:3: seed is given twice"),
        ("lora: {r: 1, rank: 2}\n", "lora.rank is given twice, once by another name"),
        ("lora: 3\n", "run.yaml:1: lora is a section; put its options below it"),
        ("lora: {rank: many}\n", "run.yaml:1: lora.rank is 'many'; allowed: a whole number, at least 1"),
        ("lora: {rank: 1.5}\n", "lora.rank is '1.5'; allowed: a whole numbe"),
        ("lora: {rank: [1]}\n", "lora.rank is '[1]'; allowed: a whole numbe"),
        ("lora: {rank: }\n", "lora.rank is ''; allowed: a whole numbe"),
        ("lora: {rank: 0}\n", "run.yaml:1: lora.rank is '0'; allowed: a whole number, at least 1"),
        (
            "lora: {rank_pattern: [1]}\n",
            "lora.rank_pattern is '[1]'; allowed: name=value pairs, each value a whole numbe",
        ),
        ("train: {learning_rate: .inf}\n", "train.learning_rate is '.inf'; allowed: a number, above 0"),
        ("train: {bf16: maybe}\n", "train.bf16 is 'maybe'; allowed: true or false, or none"),
        ("", "no options in it"),
        ("- a\n", "no options in it"),
        ("a: b: c\n", "run.yaml:1: not YAML: mapping values are not allowed here"),
        ("a: *b\n", "run.yaml:1: not YAML: found undefined alias"),
        ("a: \x00\n", "run.yaml: not YAML"),
        ("? [a, b]\n: 1\n", "an option's name must be one word"),
    ],
)
def test_read_yaml_refuses_with_file_line_and_option(tmp_path: Path, text: str, message: str) -> None:
    with refused(message):
        read_yaml(write(tmp_path, text))


def test_read_yaml_refuses_missing_files_and_other_encodings(tmp_path: Path) -> None:
    with refused("absent.yaml: no such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("data: {system: \xe9}".encode("latin-1"))
    with refused("latin.yaml cannot be read:"):
        read_yaml(tmp_path / "latin.yaml")


def test_load_config_names_what_is_missing(tmp_path: Path) -> None:
    with refused("data.train is not set: File or folder"):
        load_config(write(tmp_path, "model: {path: m}\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lora.rnk", "3", "unknown option lora.rnk; did you mean lora.rank?"),
        ("lora.rank", "x", "lora.rank is 'x'; allowed: a whole number, at least 1"),
        ("train.seed", "-1", "train.seed is '-1'; allowed: a whole number, at least 0"),
        ("lora.rank_pattern", "down_proj", "lora.rank_pattern is 'down_proj'; allowed: name=value pairs"),
        ("lora.layers_to_transform", "0,x", "allowed: a list, each a whole number, or none"),
    ],
)
def test_load_config_refuses_bad_overrides(name: str, text: str, message: str) -> None:
    with refused(message):
        load_config(None, {"model.path": "m", "data.train": "d", name: text})


@settings(deadline=None, max_examples=40)
@given(
    system=st.none() | TEXT | WORDS,
    template=st.none() | WORDS,
    columns=st.dictionaries(TEXT | WORDS, TEXT | WORDS, max_size=3),
    exclude=st.lists(TEXT | WORDS, max_size=3),
    learning_rate=st.floats(1e-12, 1e3),
    alpha_pattern=st.dictionaries(TEXT, st.floats(1e-300, 1e300), max_size=2),
    seed=st.integers(0, 2**80),
    layers=st.none() | st.lists(st.integers(0, 99), max_size=3),
    checkpointing=st.sampled_from(["auto", True, False]),
    steps=st.none() | st.integers(1, 9),
)
def test_to_yaml_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, **drawn: Any) -> None:
    original = config(
        data=DataSection(train="d", system=drawn["system"], chat_template=drawn["template"], columns=drawn["columns"]),
        lora=LoraSection(
            exclude=drawn["exclude"], alpha_pattern=drawn["alpha_pattern"], layers_to_transform=drawn["layers"]
        ),
        train=TrainSection(
            learning_rate=drawn["learning_rate"],
            seed=drawn["seed"],
            gradient_checkpointing=drawn["checkpointing"],
            save_steps=drawn["steps"],
        ),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(to_yaml(original), encoding="utf-8", newline="")
    assert load_config(path) == original


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\r", "\n"])
def test_to_yaml_keeps_every_line_end(end: str, tmp_path: Path) -> None:
    original = config(data=DataSection(train="d", system=f"a{end}b{end}"))
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(original), encoding="utf-8", newline="")
    assert load_config(path) == original


def test_to_yaml_is_yaml_that_others_read_alike() -> None:
    read = yaml.safe_load(to_yaml(config(train=TrainSection(learning_rate=2e-4))))
    assert read["train"]["learning_rate"] == 2e-4
    assert read["train"]["adam_epsilon"] == 1e-8
    assert read["quant"]["double_quant"] is True


def test_save_run_config_forgets_how_the_run_was_started(tmp_path: Path) -> None:
    original = config(train=TrainSection(overwrite=True), output_dir=str(tmp_path))
    loaded = load_config(save_run_config(original, tmp_path))
    assert loaded == dataclasses.replace(original, train=TrainSection())


def test_list_options_documents_every_option() -> None:
    for option in list_options():
        assert option.doc.endswith((".", ")")), f"{option.full_name} has no doc: {option.doc!r}"
        assert option.doc.isascii()
        for alias in option.aliases:
            assert find_option(f"{option.section}.{alias}") is option
    names = [f"{o.section}.{word}" for o in list_options() for word in (o.name, *o.aliases)]
    assert len(names) == len(set(names))
    assert [o.full_name for o in list_options() if o.default is REQUIRED] == ["model.path", "data.train"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rnk", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.batch_size", "train.batch_size"),
        ("lora.device_train_batch_size", "train.per_device_train_batch_size"),
        ("train.epochs", "train.num_train_epochs"),
        ("trian.seed", "train.seed"),
        ("data.max_len", "data.max_length"),
        ("qqqq.wwww", None),
    ],
)
def test_nearest_option_finds_misspelt_and_misplaced_names(wrong: str, right: str | None) -> None:
    assert nearest_option(wrong) == right


def test_make_schema_is_what_the_repository_holds() -> None:
    committed = json.loads((REPOSITORY / "schema" / "run.schema.json").read_text())
    assert committed == json.loads(json.dumps(make_schema())), "run: halfbyte schema > schema/run.schema.json"


def test_make_schema_accepts_defaults_and_knows_every_option() -> None:
    schema = make_schema()
    plain = yaml.safe_load(to_yaml(config()))
    for name, section in plain.items():
        part = schema["properties"][name]
        if isinstance(section, dict):
            assert section.keys() <= part["properties"].keys()
            assert part["additionalProperties"] is False
    rank = schema["properties"]["lora"]["properties"]["rank"]
    assert (rank["type"], rank["minimum"], rank["default"]) == ("integer", 1, 16)
    assert "r" in schema["properties"]["lora"]["properties"]
