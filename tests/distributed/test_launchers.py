"""The files in examples/launchers are what their programs read; none of those programs is run."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
import yaml

from halfbyte.cli.arguments import make_parser, parse_words
from halfbyte.cli.train import SECTIONS, add_arguments
from tests.distributed.torchrun import REPOSITORY

FOLDER = REPOSITORY / "examples" / "launchers"


def check_command(words: list[str]) -> None:
    """Fail unless these start ranks of a run."""
    assert "halfbyte" in words
    start = words.index("halfbyte")
    assert words[start - 1 : start + 2] == ["-m", "halfbyte", "train"]
    parser = make_parser("train", "train", SECTIONS)
    add_arguments(parser)
    assert parse_words(parser, words[start + 2 :]).source.endswith("run.yaml")


def words_of(script: str) -> list[str]:
    return script.replace("\\\n", " ").replace('"$1"', "run.yaml").split()


def check_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_slurm() -> None:
    script = (FOLDER / "slurm.sh").read_text()
    check_shell(script)
    check_command(words_of(script[script.index("srun torchrun") :]))
    assert "#SBATCH --ntasks-per-node=1" in script


def test_kubernetes() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    check_command(container["command"])
    assert container["command"][0] == "torchrun"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}


def test_skypilot() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    check_shell(task["run"])
    check_shell(task["setup"])
    script = task["run"][task["run"].index("torchrun") :]
    check_command(words_of(script))


def test_ray() -> None:
    tree = ast.parse((FOLDER / "ray_train.py").read_text())
    lists = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.List)]
    assert "[sys.executable, '-m', 'halfbyte', 'train', options['run']]" in lists


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_launcher_is_known(path: Path) -> None:
    assert path.name in {"slurm.sh", "kubernetes.yaml", "skypilot.yaml", "ray_train.py"}
