"""Words into arguments: section options in every spelling, and one line for each mistake."""

from __future__ import annotations

import argparse

import pytest

from halfbyte.cli.arguments import CommandParser, add_override, make_parser, parse_words
from halfbyte.config.describe import list_options
from halfbyte.errors import ConfigError

ALL_SECTIONS = ("model", "quant", "lora", "data", "train", "memory", "output_dir")


@pytest.fixture
def parser() -> CommandParser:
    parser = make_parser("train", "fine-tune", ALL_SECTIONS)
    parser.add_argument("source")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--output")
    return parser


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--lora.rank=64"], {"lora.rank": "64"}),
        (["--lora.rank", "64"], {"lora.rank": "64"}),
        (["--lora.r=64"], {"lora.rank": "64"}),
        (["--lora.targets=a=b"], {"lora.targets": "a=b"}),
        (["--data.system="], {"data.system": ""}),
        (["--data.system", "-1"], {"data.system": "-1"}),
        (["--train.resume"], {"train.resume": "true"}),
        (["--data.packing", "no"], {"data.packing": "no"}),
        (["--train.bf16", "--lora.rank=1"], {"train.bf16": "true", "lora.rank": "1"}),
        (["--output_dir=x"], {"output_dir": "x"}),
    ],
)
def test_parse_words_takes_section_options(parser: CommandParser, words: list[str], overrides: dict[str, str]) -> None:
    args = parse_words(parser, ["m", *words, "d"])
    assert (args.source, args.data, args.overrides) == ("m", "d", overrides)
    assert parse_words(parser, [*words, "m"]).overrides == overrides


def test_parse_words_leaves_everything_after_two_dashes(parser: CommandParser) -> None:
    args = parse_words(parser, ["--", "m", "--lora.rank=64"])
    assert (args.source, args.data, args.overrides) == ("m", "--lora.rank=64", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--lora.rnk=3"], "unknown option --lora.rnk; did you mean --lora.rank?"),
        (["m", "--lroa.rank=3"], "unknown option --lroa.rank; did you mean --lora.rank?"),
        (["m", "--rank=3"], "unknown option --rank; did you mean --lora.rank?"),
        (["m", "--learning-rate=3"], "unknown option --learning-rate; did you mean --train.learning_rate?"),
        (["m", "--epochs=3"], "unknown option --epochs; did you mean --train.num_train_epochs?"),
        (["m", "--outptu", "x"], "unknown option --outptu; did you mean --output?"),
        (["m", "--zzzz"], "unknown option --zzzz; see halfbyte train --help"),
        (["m", "--lora.rank"], "--lora.rank needs a value: a whole number, at least 1"),
        (["m", "--lora.rank", "--train.resume"], "--lora.rank needs a value"),
        (["m", "--lora.rank=1", "--lora.r=2"], "--lora.rank is given twice"),
        (["m", "d", "x"], "unexpected argument 'x'; see halfbyte train --help"),
        (["m", "--output"], "argument --output: expected one argument; see halfbyte train --help"),
        ([], "the following arguments are required: source; see halfbyte train --help"),
    ],
)
def test_parse_words_refuses_in_one_line(parser: CommandParser, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_words(parser, words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_parse_words_refuses_sections_of_other_commands() -> None:
    parser = make_parser("quantize", "write", ("quant", "model.path"))
    assert parse_words(parser, ["--quant.codebook=fp4"]).overrides == {"quant.codebook": "fp4"}
    assert parse_words(parser, ["--model.path=m"]).overrides == {"model.path": "m"}
    for word in ("--lora.rank=3", "--model.device=cpu"):
        with pytest.raises(ConfigError, match=r"halfbyte quantize takes no --\w+\.\w+; see halfbyte quantize --help"):
            parse_words(parser, [word])


def test_add_override_refuses_an_option_given_twice() -> None:
    args = argparse.Namespace(overrides={"output_dir": "a"})
    add_override(args, "data.train", None)
    with pytest.raises(ConfigError, match="output_dir is given twice"):
        add_override(args, "output_dir", "b")
    assert args.overrides == {"output_dir": "a"}


def test_format_help_documents_every_option(parser: CommandParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text = parser.format_help()
    words = " ".join(text.split())
    for option in list_options():
        assert f"--{option.full_name}=" in words
        assert option.doc in words
    assert "[0.0002]" in words
    assert "(also: r) [16]" in words
    assert "[all-linear]" in words
    assert all(len(line) <= 110 for line in text.splitlines())
    assert "--lora" not in make_parser("quantize", "write", ("quant",)).format_help()
