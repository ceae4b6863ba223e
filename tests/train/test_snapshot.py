"""A snapshot is the state at its step, whatever the run does next."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from halfbyte.train import HalfbyteTrainer
from halfbyte.train.checkpoint import adapter_parameters, load_tensors
from halfbyte.train.snapshot import TokenizerFiles, take_snapshot
from tests.faults.processes import assert_same_tree
from tests.train.runs import SPEC, build_model, build_trainer

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
OPTIMIZERS = pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_torch_fused"])
MIXED = dataclasses.replace(SPEC, dora=True, modules_to_save=("lm_head",))


def build_trained(folder: Path, optim: str, device: str) -> HalfbyteTrainer:
    module: torch.nn.Module = build_model(spec=MIXED).to(device)
    assert isinstance(module, PreTrainedModel)
    options = {"optim": optim, "max_steps": 2, "lr_scheduler_type": "constant", "use_cpu": device == "cpu"}
    trainer = build_trainer(folder, model=module, spec=MIXED, **options)
    trainer.train()
    return trainer


def own_state(trainer: HalfbyteTrainer) -> list[dict[str, torch.Tensor]]:
    """Return the optimizer's own tensors, in the order of the parameters."""
    optimizer = trainer.optimizer.optimizer
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


def queued_copy(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.detach().to(device, copy=True, non_blocking=True)


@DEVICES
@OPTIMIZERS
def test_snapshot_holds_no_bit_of_the_step_after(tmp_path: Path, optim: str, device: str) -> None:
    trainer = build_trained(tmp_path, optim, device)
    parameters = adapter_parameters(trainer.model)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    if device == "cuda":
        # The step before is still to run, and so are both of the copies to compare with, when the snapshot is taken.
        torch.cuda._sleep(100_000_000)
    trainer.optimizer.step()
    adapter = {key: queued_copy(parameter, device) for key, parameter in parameters.items()}
    state = [{name: queued_copy(tensor, device) for name, tensor in own.items()} for own in own_state(trainer)]
    snapshot = take_snapshot(trainer, run_state={}, config_text=None)
    trainer.optimizer.step()
    trainer.state.log_history.append({"loss": 0.0, "step": 3})
    assert snapshot.adapter.tensors.keys() == adapter.keys()
    for key, tensor in snapshot.adapter.tensors.items():
        assert torch.equal(tensor, adapter[key].cpu()), key
        assert not torch.equal(tensor, parameters[key].cpu()), key
    found = snapshot.states["optimizer.pt"]["state"]
    for index, own in enumerate(state):
        for name, tensor in own.items():
            assert torch.equal(found[index][name], tensor.cpu()), (index, name)
    assert {"loss": 0.0, "step": 3} not in snapshot.documents["trainer_state.json"]["log_history"]


@DEVICES
@OPTIMIZERS
def test_snapshot_is_written_with_each_tensor_once(tmp_path: Path, optim: str, device: str) -> None:
    trainer = build_trained(tmp_path / "run", optim, device)
    snapshot = take_snapshot(trainer, run_state={"seed": 1}, config_text=None)
    (tmp_path / "written").mkdir()
    snapshot.write(tmp_path / "written", TokenizerFiles(None))
    assert_same_tree(load_file(tmp_path / "written/adapter_model.safetensors"), dict(snapshot.adapter.tensors))
    assert_same_tree(load_tensors(tmp_path / "written/optimizer.pt"), snapshot.states["optimizer.pt"])
    assert json.loads((tmp_path / "written/run_state.json").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "written/trainer_state.json").read_text()) == dataclasses.asdict(trainer.state)
    tensors = [tensor for state in own_state(trainer) for tensor in state.values()]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    # The file says in up to 512 bytes where a tensor lies, and a moment's last block may be unused.
    assert (tmp_path / "written/optimizer.pt").stat().st_size <= num_bytes + len(tensors) * (512 + 4 * 256) + 16384
