"""What is in wheel and sdist, and that what is installed from the wheel works without triton and without any extra."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OPTIONAL = ("triton", "gguf", "pyarrow", "datasets", "peft", "bitsandbytes", "trl", "pytest", "hypothesis")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with wheel and sdist."""
    folder = tmp_path_factory.mktemp("built")
    words = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_beside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "halfbyte").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert package >= {"halfbyte/py.typed", "halfbyte/train/report/page.css", "halfbyte/train/report/page.js"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_says_what_it_is_and_needs(wheel: Path) -> None:
    (info,) = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    read = zipfile.ZipFile(wheel).read
    assert read(f"{info}/entry_points.txt").decode().split("\n")[:2] == [
        "[console_scripts]",
        "halfbyte = halfbyte.cli.main:main",
    ]
    metadata = email.message_from_bytes(read(f"{info}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert not [need for need in needed if need.split(">")[0] in OPTIONAL]
    assert wheel.name.endswith("-py3-none-any.whl")


def test_sdist_holds_what_the_wheel_is_built_from(built: Path, wheel: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO"}
    assert names >= {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


@pytest.mark.slow
def test_installed_wheel_works_without_triton_and_extras(wheel: Path, tmp_path: Path) -> None:
    """Its files in an environment of their own, which sees the dependencies of this one but not this repository.

    All modules are imported without the optional ones; `make wheel` tries an environment that truly lacks them.
    """
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    probe = [str(environment / "bin" / "python"), "-I", str(REPOSITORY / "tools" / "probe_install.py")]
    done = subprocess.run([*probe, "--without", *OPTIONAL], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "modules import, 0 lack a package: none" in done.stdout
    for words in ("halfbyte --version: exit code 0", "halfbyte plan: exit code 0", "halfbyte doctor: exit code 0"):
        assert words in done.stdout
