"""Swap modules of one model: the object changes, never the library."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from halfbyte.nn.linear import Linear4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant.tensor import QuantSpec

WORKSPACE_ATTRIBUTE = "halfbyte_workspace"


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def workspace_of(model: nn.Module) -> Workspace:
    """Return the model's workspace, made at the first call."""
    workspace = getattr(model, WORKSPACE_ATTRIBUTE, None)
    if workspace is None:
        workspace = Workspace()
        setattr(model, WORKSPACE_ATTRIBUTE, workspace)
    return workspace


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes the logits, where the model says which that is."""
    get_head = getattr(model, "get_output_embeddings", None)
    return None if get_head is None else get_head()


def quantize_linears_(model: nn.Module, spec: QuantSpec, *, skip: Container[str] = ()) -> list[str]:
    """Quantise the linear layers of a model in memory, all but its output head.

    Args:
        model: Changed in place; each layer's plain weight is freed as soon as it is quantised.
        spec: How to quantise.
        skip: Paths of further layers to leave alone.

    Returns:
        The paths of the layers that were quantised.
    """
    head = output_head(model)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and path not in skip
    ]
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = Linear4bit.from_linear(linear, spec, workspace=workspace_of(model))
        replace_module(model, path, layer.train(linear.training))
    return paths
