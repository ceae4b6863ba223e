"""The entry point: commands, help, exit codes, and one line for what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import halfbyte as package
from halfbyte.cli.console import json_text
from halfbyte.cli.main import COMMANDS, EXIT_CODES, load_command, main
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_main_lists_the_commands(halfbyte: Run, words: list[str]) -> None:
    done = halfbyte(*words)
    assert (done.code, done.err) == (0, "")
    for name, summary in COMMANDS.items():
        assert f"  {name:<13} {summary}\n" in done.out


def test_main_tells_its_version(halfbyte: Run) -> None:
    assert halfbyte("--version") == Outcome(0, f"halfbyte {package.__version__}\n", "")
    assert f'version = "{package.__version__}"' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_main_helps_with_every_command(halfbyte: Run, name: str) -> None:
    done = halfbyte(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: halfbyte {name}")
    assert load_command(name)[0].run is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["zzz"], "unknown command zzz; there are train, plan, data"),
        (["--verbose"], "unknown command --verbose; there are train, plan"),
        (["train"], "the following arguments are required: MODEL|RUN.yaml; see halfbyte train --help"),
        (["train", "m"], "data.train is not set"),
        (["train", "m", "d", "--lora.rnk=3"], "unknown option --lora.rnk; did you mean --lora.rank?"),
        (["train", "m", "d", "--lora.rank=x"], "lora.rank is 'x'; allowed: a whole number, at least 1"),
        (["train", "m", "d", "--output=a", "--output_dir=b"], "output_dir is given twice"),
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "m", "d", "--resume", "--overwrite"], "train.resume and train.overwrite are both true; choose one"),
        (["merge", "out", "merged", "--onto=nothing"], "argument --onto: invalid choice: 'nothing'"),
        (["quantize", "m", "out", "--quant.codebook=nf5"], "quant.codebook is 'nf5'; allowed: nf4, fp4"),
        (["quantize", "m", "out", "--quant.enabled=no"], "halfbyte quantize takes no --quant.enabled"),
        (["merge", "out", "merged", "--model.device=cpu"], "halfbyte merge takes no --model.device"),
        (["data", "d", "--model=m", "--data.packing=no"], "halfbyte data takes no --data.packing"),
        (["eval", "out", "d", "--batch-size=0"], "argument --batch-size: '0' is no whole number of at least 1"),
        (["data", "d", "--model=m", "--show=x"], "argument --show: 'x' is no whole number of at least 0"),
        (["quantize", "m", "out", "--lora.rank=3"], "halfbyte quantize takes no --lora.rank"),
    ],
)
def test_main_answers_a_mistake_with_one_line(
    halfbyte: Run, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = halfbyte(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("halfbyte: error: ")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_main_prints_the_schema(halfbyte: Run) -> None:
    done = halfbyte("schema")
    assert (done.code, done.err) == (0, "")
    assert done.out == (REPOSITORY / "schema" / "run.schema.json").read_text()


def test_main_stops_at_an_interrupt_with_one_line(halfbyte: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def isatty(self) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    done = halfbyte("generate", "any/model")
    assert (done.code, done.out, done.err) == (130, "", "halfbyte: interrupted\n")


def test_main_says_its_exit_codes_and_keeps_to_them(halfbyte: Run) -> None:
    assert list(EXIT_CODES) == [0, 1, 2, 130, 143]
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<13} {meaning}\n" in halfbyte("--help").out
    # A fault of ours: a command whose module is missing.
    broken = "import sys; from halfbyte.cli import main; main.COMMANDS['broken'] = ''; sys.exit(main.main(['broken']))"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    run = [sys.executable, "-m", "halfbyte"]
    assert subprocess.run([*run, "schema"], capture_output=True, cwd=REPOSITORY).returncode == 0
    assert subprocess.run([*run, "trian"], capture_output=True, cwd=REPOSITORY).returncode == 2


def test_json_has_no_words_that_json_does_not_know() -> None:
    text = json_text({"loss": float("nan"), "list": (1.5, float("inf"), "\u00e9"), "inner": {"deep": -float("inf")}})
    assert text == '{"loss": null, "list": [1.5, null, "\u00e9"], "inner": {"deep": null}}'
    assert json.loads(text)["list"] == [1.5, None, "\u00e9"]


def test_main_is_python_m_halfbyte_and_survives_a_closed_pipe() -> None:
    command = f"{sys.executable} -m halfbyte train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "usage: halfbyte train MODEL DATA [options]\n"
    assert done.stderr == ""


def test_main_reads_the_command_line_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["halfbyte", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"halfbyte {package.__version__}\n"
