"""Quantise a model so that it answers as before on text that it will see: block by block, on a few real examples.

Each linear layer is quantised with regard to what it multiplies (`ops.quantize_compensated`): its inputs over the
examples are summed up to X' X, and the rounding of each column is made up for by those after it. Blocks follow one
another, each calibrated on what the quantised blocks before it give, so that errors do not add up unseen.

This is also how a trained adapter goes back into 4 bits. Rounded by itself, the merged weight falls on the codes it had
before, since an adapter moves a weight by far less than the distance of two codes. Compensating alone does not help:
the error of falling back is small, but it is the adapter, whole. So the blocks get other scales than they had. On
another grid every weight is rounded one way or the other, by chance as far as the adapter is concerned, and what is
left of it in the products is what was there.

Memory: the model in 16 or 32 bits, the inputs of one block over all examples, and X' X of that block's layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.models import PreTrainedModel
from halfbyte.models.fused_layers import iter_decoder_layers
from halfbyte.models.load import quantizable_layers
from halfbyte.nn import Linear4bit
from halfbyte.nn.convert import replace_module, workspace_of
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.quantize_compensated import quantize_4bit_compensated
from halfbyte.quant import QuantizedTensor, QuantSpec

# B rows, T tokens of a row, D in_features

# Scales of blocks, as shares of absmax, that put weights which lie on a grid already on another one.
OTHER_GRID_SHARE = 0.93

Progress = Callable[[int, int], None]


@dataclasses.dataclass(slots=True)
class _Inputs:
    """What a decoder block is called with, one entry a batch."""

    hidden: list[torch.Tensor] = dataclasses.field(default_factory=list)
    others: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class _SeenError(Exception):
    """The first block has been called: the rest of the model need not run."""


@torch.no_grad()
def quantize_calibrated_(
    model: PreTrainedModel,
    batches_BT: Sequence[torch.Tensor],
    spec: QuantSpec,
    *,
    scale_share: float = 1.0,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Bring the linear layers of a model to 4 bits, calibrated on examples.

    Args:
        model: With plain linear layers, in eval mode. Changed in place; decoder blocks that look like none are
            quantised by absmax.
        batches_BT: Token ids, each (rows, tokens); some ten thousand tokens in all.
        spec: Codebook, block size, double quantisation.
        scale_share: Scales of blocks, as shares of absmax: OTHER_GRID_SHARE where weights come from a 4-bit grid.
        on_progress: Is told how many blocks are done, of how many.

    Raises:
        ConfigError: There are no examples, or layers that cannot be calibrated.
    """
    blocks = list(iter_decoder_layers(model))
    if not batches_BT:
        raise ConfigError("calibration needs examples; give a file of them")
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no decoder blocks that are known, so it cannot be calibrated")
    named = {module: path for path, module in model.named_modules()}
    targets = _check_targets(model, {named[m] for block in blocks for m in block.modules() if m in named})
    inputs = _inputs_of_first_block(model, blocks[0], batches_BT)
    for number, block in enumerate(blocks):
        linears = {path: m for m in block.modules() if isinstance(m, nn.Linear) and (path := named[m]) in targets}
        sums = _sum_inputs(block, linears, inputs)
        for path, linear in linears.items():
            _replace_(model, path, linear, _quantize(linear, sums.get(path), spec, scale_share))
        inputs.hidden = list(_run(block, inputs))
        on_progress(number + 1, len(blocks))


def _check_targets(model: PreTrainedModel, inside: set[str]) -> set[str]:
    """Return the layers to quantise, all of which can be calibrated."""
    targets = quantizable_layers(model, model.config)
    outside = sorted(targets - inside)
    if outside:
        raise ConfigError(f"{outside[0]} lies outside the decoder blocks, so it cannot be calibrated")
    return targets


def _inputs_of_first_block(model: PreTrainedModel, first: nn.Module, batches_BT: Sequence[torch.Tensor]) -> _Inputs:
    inputs = _Inputs()

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.hidden.append(hidden)
        inputs.others.append({name: value for name, value in kwargs.items() if name != "hidden_states"})
        raise _SeenError

    hook = first.register_forward_pre_hook(see, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        for ids_BT in batches_BT:
            try:
                model(input_ids=ids_BT.to(device), use_cache=False)
            except _SeenError:
                continue
    finally:
        hook.remove()
    return inputs


def _sum_inputs(block: nn.Module, linears: dict[str, nn.Linear], inputs: _Inputs) -> dict[str, torch.Tensor]:
    """Return X' X of each linear layer's inputs, fp32 (D, D)."""
    sums: dict[str, torch.Tensor] = {}

    def add_to(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1]).float()
            if path not in sums:
                sums[path] = x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1])
            sums[path].addmm_(x_TD.T, x_TD)

        return add

    hooks = [linear.register_forward_pre_hook(add_to(path)) for path, linear in linears.items()]
    try:
        for _ in _run(block, inputs):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _run(block: nn.Module, inputs: _Inputs) -> Iterator[torch.Tensor]:
    for hidden, others in zip(inputs.hidden, inputs.others, strict=True):
        out = block(hidden, **others)
        yield out[0] if isinstance(out, tuple) else out


def _quantize(linear: nn.Linear, sum_DD: torch.Tensor | None, spec: QuantSpec, scale_share: float) -> QuantizedTensor:
    if sum_DD is None:
        # No example has reached it, an expert that none was sent to: there is nothing to go by.
        return quantize_4bit(linear.weight, spec)
    return quantize_4bit_compensated(linear.weight, sum_DD, spec, scale_share=scale_share)


def _replace_(model: PreTrainedModel, path: str, linear: nn.Linear, q: QuantizedTensor) -> None:
    replace_module(model, path, Linear4bit.from_quantized(q, linear.bias, workspace_of(model)))
