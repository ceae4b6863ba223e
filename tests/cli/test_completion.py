"""Completion in real shells: keys are typed on a terminal, and the command is shown the words that came of them."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.cli.main import COMMANDS
from halfbyte.cli.shells import SHELLS, list_words
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
# What is typed, with tabs within, and the words that the command must get; a tab follows at the end.
TYPED = {
    "tra": ["train"],
    "import-c": ["import-config"],
    "train --train.optim=paged_adamw_3": ["train", "--train.optim=paged_adamw_32bit"],
    "train --train.opti\tpaged_adamw_3": ["train", "--train.optim=paged_adamw_32bit"],
    "plan --js": ["plan", "--json"],
    "runs --sort lo": ["runs", "--sort", "loss"],
    "runs --sort=lo": ["runs", "--sort=loss"],
    "completion fi": ["completion", "fish"],
    "train model tick": ["train", "model", "tickets.jsonl"],
    "train --output fold": ["train", "--output", "folder/"],
    "eval --quant.double_quant=f": ["eval", "--quant.double_quant=false"],
}
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
# The command shows the words that it gets.
SHOW = "halfbyte() { printf 'GOT'; printf '<%s>' \"$@\"; printf 'END\\n'; }\n"


@pytest.mark.parametrize("shell", START)
def test_tab_completes(halfbyte: Run, shell: str, tmp_path: Path) -> None:
    skip_without(shell)
    make_files(tmp_path)
    # A slash that was completed belongs to the next word, or goes.
    start = "autoload -U compinit; compinit -D; unsetopt auto_remove_slash\n" if shell == "zsh" else ""
    (tmp_path / "setup").write_text(start + SHOW + halfbyte("completion", shell).out + "halfbyte ready\n")
    shown = type_lines(shell, ["source ./setup", *(f"halfbyte {typed}\t" for typed in TYPED)], tmp_path)
    expected = ["<ready>", *("".join(f"<{word}>" for word in words) for words in TYPED.values())]
    assert re.findall(r"GOT(.*?)END", shown) == expected, shown


def test_fish_completes(halfbyte: Run, tmp_path: Path) -> None:
    skip_without("fish")
    make_files(tmp_path)
    (tmp_path / "setup").write_text(halfbyte("completion", "fish").out)
    for typed, words in TYPED.items():
        line = f"source ./setup; complete -C 'halfbyte {typed.partition(chr(9))[0]}'"
        done = subprocess.run(["fish", "--no-config", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        found = [candidate.partition("\t")[0] for candidate in done.stdout.splitlines()]
        wanted = words[-1] if "\t" not in typed else words[-1].partition("=")[0] + "="
        assert wanted in found or wanted.removesuffix("=") in found, (typed, found)


def skip_without(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")


def make_files(folder: Path) -> None:
    (folder / "tickets.jsonl").touch()
    (folder / "folder").mkdir()


def type_lines(shell: str, lines: list[str], folder: Path) -> str:
    """Return what a shell on a terminal shows for lines that are typed, each when the last one's command has run."""
    master, slave = pty.openpty()
    environment = {**os.environ, "HOME": str(folder), "TERM": "dumb", "HISTFILE": ""}
    process = subprocess.Popen(
        START[shell], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment, start_new_session=True
    )
    os.close(slave)
    shown = ""
    try:
        for number, line in enumerate(lines, start=1):
            os.write(master, f"{line}\n".encode())
            end = time.monotonic() + 20
            while shown.count("END") < number and time.monotonic() < end:
                if select.select([master], [], [], 0.1)[0]:
                    shown += os.read(master, 65536).decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return shown


def test_words_are_those_of_the_parsers() -> None:
    words = {command.name: command for command in list_words()}
    assert list(words) == list(COMMANDS)
    options = {option.name: option for option in words["train"].options}
    assert options["--output"].takes_value
    assert not options["--resume"].takes_value
    assert options["--train.gradient_checkpointing="].values == ("auto", "offload", "true", "false")
    assert options["--lora.rank="].values == ()
    assert options["--output_dir="].takes_value
    assert words["completion"].argument_values == tuple(SHELLS)
    assert {option.name for option in words["runs"].options} == {"-h", "--help", "--sort", "--json"}


def test_completion_names_its_shells(halfbyte: Run) -> None:
    done = halfbyte("completion", "tcsh")
    assert (done.code, done.out) == (2, "")
    assert "invalid choice: 'tcsh'" in done.err
