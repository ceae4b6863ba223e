"""Every command, script and configuration in docs/ works: it is run on a tiny model, or at least read."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import qlora_figures
from halfbyte.cli.arguments import parse_words
from halfbyte.cli.main import COMMANDS, load_command, main
from halfbyte.config.load import load_config, parse_overrides
from halfbyte.errors import ConfigError
from tests.docs.fences import Fence, commands_of, inline_commands, read_fences
from tests.train.tiny import CHAT_TEMPLATE, SPECIAL
from tools import options_page

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Pages name this model. In a test's folder a tiny one lies under its name, and a folder comes before the hub.
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BIG_MODEL = "meta-llama/Llama-2-7b-hf"
HARMLESS = {"ls", "cat", "head", "mkdir"}

pytestmark = [
    # Libraries that pages use warn about each other: transformers 5.23 renames what trl 1.16 and peft 0.21.2 name.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # What a script prints on a machine without a GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny chat model and a large one's configuration under the names that pages use."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4}
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / MODEL)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder / MODEL)
    qlora_figures.MODELS["Llama-7B"].save_pretrained(folder / BIG_MODEL)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a few merges, as GGUF files want, that knows every character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the question and the answer are in the other column"] * 4, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **names)


@pytest.fixture
def here(model_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new folder that is the current one, with the models in it."""
    for name in (MODEL, BIG_MODEL):
        link = tmp_path / name
        link.parent.mkdir()
        link.symlink_to(model_folders / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_everything_in_a_page_works(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for fence in read_fences(page):
        if fence.not_run is not None:
            check_unrun(fence)
        elif fence.file is not None:
            (here / fence.file).write_text(fence.text, encoding="utf-8")
        elif fence.language == "bash":
            for words in commands_of(fence.text):
                run_command(words, fence.where, monkeypatch)
        elif fence.language == "python":
            exec(compile(fence.text, fence.where, "exec"), names)
        elif fence.language == "yaml":
            (here / "block.yaml").write_text(fence.text, encoding="utf-8")
            load_config(here / "block.yaml")


@pytest.mark.parametrize("page", [*PAGES, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_commands_in_sentences_are_spelt_right(page: Path) -> None:
    for words in inline_commands(page):
        # A sentence may leave out what a command is told to work on.
        with ignoring_absent_arguments():
            check_words(words, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_command_hides_from_the_test(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("    halfbyte ")], "indented blocks are not run; use ```bash"


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, DOCS.parent / "README.md"):
        for target in links_in(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        if page.stem == "log":  # Of what was, too.
            continue
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8")):
            places = (DOCS.parent / name, DOCS.parent / "halfbyte" / name)
            assert name.endswith("x.py") or any(place.exists() for place in places), f"{page.name}: {name}"


def test_readme_names_every_page() -> None:
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"docs/{page.name}" not in text] == []


def test_options_page_is_up_to_date() -> None:
    assert options_page.PAGE.read_text(encoding="utf-8") == options_page.render_page(), "python -m tools.options_page"


def test_figures_of_qlora_are_up_to_date() -> None:
    page = DOCS / "how-qlora-works.md"
    text = page.read_text(encoding="utf-8")
    assert text == qlora_figures.render_page(text), "python -m benchmarks.qlora_figures"


def run_command(words: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command in this process, a person's typing for chat included."""
    if words[0] == "halfbyte":
        check_words(words, where)
        monkeypatch.setattr("sys.stdin", io.StringIO("Where is my order?\n/quit\n"))
        assert main(words[1:]) == 0, f"{where}: {' '.join(words)}"
    elif words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
    elif words[0] in HARMLESS:
        subprocess.run(words, check=True, env=os.environ)
    else:
        raise AssertionError(f"{where}: {words[0]} is not run by this test; say `not run: why` on the first line")


def check_unrun(fence: Fence) -> None:
    """Read a block that is not run."""
    if fence.language == "bash":
        for words in commands_of(fence.text):
            if words[0] == "halfbyte":
                check_words(words, fence.where)
    elif fence.language == "python":
        ast.parse(fence.text, fence.where)
    elif fence.language == "yaml":
        assert isinstance(yaml.safe_load(fence.text), dict), fence.where


def check_words(words: list[str], where: str) -> None:
    """Hold a command line of ours against its command's parser and the options' types."""
    name = words[1]
    if name in ("--version", "--help"):
        return
    assert name in COMMANDS, f"{where}: there is no command {name}"
    _, parser = load_command(name)
    if "--help" not in words:
        parse_overrides(parse_words(parser, words[2:]).overrides)


@contextlib.contextmanager
def ignoring_absent_arguments() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if "arguments are required" not in str(error):
            raise


def links_in(text: str) -> list[str]:
    """Return the files that a page links to."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if "://" not in target]
