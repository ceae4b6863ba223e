"""The shape of the package, kept by test: layers import downward only, files stay small, importing does nothing.

Each check reads the source, so that a lazy import inside a function counts as well. `|` in LAYERS separates siblings
that do not know of each other.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "halfbyte"
FILES = sorted(PACKAGE.rglob("*.py"))
BOTTOM = "config|device|distributed > errors"
LAYERS = f"cli|hf > train > export > models|data > nn > optim > ops|memory > quant|kernels > {BOTTOM}"
RANKS = {layer: rank for rank, siblings in enumerate(reversed(LAYERS.split(" > "))) for layer in siblings.split("|")}
# Which layers may import a library at all.
ALLOWED = {
    "transformers": {"models", "data", "train", "hf", "cli"},
    "accelerate": {"train", "hf"},
    "triton": {"kernels"},
    "rich": {"train", "cli"},
    "datasets": {"data", "hf"},
    "gguf": {"models", "export"},
    "bitsandbytes": set(),
    "peft": {"hf"},
    "trl": set(),
}
# Layers, or files, whose import must not cost a library.
LAZY = {
    "torch": {"", "config", "device", "distributed", "errors", "cli"},
    "transformers": {"", "config", "device", "distributed", "errors", "cli"},
    "triton": set(RANKS) | {""},
    "peft": set(RANKS) | {""},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COMMAND_LINES = 400, 60, 120


def layer_of(path: Path) -> str:
    """Return the layer of a file; empty for the package's own __init__ and __main__."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first in ("__init__", "__main__") else first


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield the full name and line of everything that `nodes` import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def runs(tree: ast.Module, *, at_import: bool = False) -> Iterator[ast.AST]:
    """Yield the nodes that can run, or those that importing runs: never what stands under TYPE_CHECKING."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        queue.extend(ast.iter_child_nodes(node))


@pytest.fixture(params=FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_layers_are_all_known() -> None:
    found = {layer_of(path) for path in FILES} - {""}
    assert found <= RANKS.keys(), f"not in the layer order: {found - RANKS.keys()}"


def test_imports_go_downward_only(path: Path) -> None:
    layer = layer_of(path)
    for name, line in imported(ast.walk(tree_of(path))):
        parts = name.split(".")
        if parts[0] != "halfbyte" or layer == "" or parts[1] == "__version__":
            continue
        target = parts[1]
        assert target in RANKS, f"{path}:{line}: {name} is in no layer"
        assert target == layer or RANKS[target] < RANKS[layer], f"{path}:{line}: {layer} may not import {target}"
        assert layer != "kernels" or target == layer, f"{path}:{line}: kernels import nothing of ours"


def test_libraries_are_imported_where_they_belong(path: Path) -> None:
    for name, line in imported(runs(tree_of(path))):
        library = name.split(".")[0]
        allowed = ALLOWED.get(library, RANKS.keys())
        assert layer_of(path) in (allowed | {""}), f"{path}:{line}: {layer_of(path)} may not import {library}"


def test_costly_libraries_are_imported_lazily(path: Path) -> None:
    for name, line in imported(runs(tree_of(path), at_import=True)):
        layers = LAZY.get(name.split(".")[0], set())
        assert layer_of(path) not in layers, f"{path}:{line}: import {name} inside the function that needs it"


def test_importing_writes_no_environment(path: Path) -> None:
    for node in runs(tree_of(path), at_import=True):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Expr | ast.Delete):
            text = ast.unparse(node)
            assert "environ" not in text, f"{path}:{node.lineno}: touches the environment at import: {text}"
            assert "torch.cuda." not in text, f"{path}:{node.lineno}: probes the device at import: {text}"


def test_files_and_functions_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = MAX_COMMAND_LINES if path.parent.name == "cli" and path.stem in commands() else MAX_FILE_LINES
    assert lines <= limit, f"{path} has {lines} lines; allowed: {limit}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_files_are_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.isascii(), f"{path} is not ASCII"
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), f"{path}: name it after what it holds"
    assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"


def test_errors_are_not_swallowed_and_pickles_not_run(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            names = "" if node.type is None else ast.unparse(node.type)
            broad = node.type is None or {"Exception", "BaseException"} & set(names.strip("()").split(", "))
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert not broad or reraises, f"{where}: broad except"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "pickle.load", "pickle.loads"), f"{where}: {called}"
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            assert called != "torch.load" or safe, f"{where}: torch.load without weights_only=True"


def test_libraries_are_not_patched(path: Path) -> None:
    libraries = {"torch", "transformers", "accelerate", "triton", "safetensors", "numpy", "yaml", "gguf"}
    for node in ast.walk(tree_of(path)):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            root = ast.unparse(target).split(".")[0]
            assert not (isinstance(target, ast.Attribute) and root in libraries), (
                f"{path}:{node.lineno}: patches {root}"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            assert ast.unparse(node.args[0]).split(".")[0] not in libraries, f"{path}:{node.lineno}: patches a library"


def test_every_package_is_complete() -> None:
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_importing_costs_no_torch() -> None:
    modules = ["halfbyte", "halfbyte.config", "halfbyte.device", "halfbyte.errors", "halfbyte.cli.main"]
    modules += [f"halfbyte.cli.{name}" for name in commands()]
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert not loaded & {"torch", "transformers", "triton", "numpy", "rich", "peft", "bitsandbytes", "datasets"}


def test_importing_does_nothing() -> None:
    modules = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    code = (
        "import os, sys, threading, warnings, accelerate, tensorboard, torch, torch.utils.tensorboard, transformers\n"
        # What libraries do when they are imported is theirs.
        "from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer\n"
        "state = lambda: (dict(os.environ), threading.active_count(), torch.get_default_dtype(), "
        "list(warnings.filters), torch.is_grad_enabled(), torch.get_num_threads(), torch.cuda.is_initialized())\n"
        "before, loaded = state(), 'triton' in sys.modules\n"
        f"import {', '.join(names)}\n"
        "assert state() == before, 'importing changed the state of the process'\n"
        "assert loaded or 'triton' not in sys.modules, 'importing costs triton'\n"
        "print('nothing')"
    )
    assert run_python(code).split()[-1] == "nothing"


def run_python(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> list[str]:
    from halfbyte.cli.main import COMMANDS

    return [name.replace("-", "_") for name in COMMANDS]
