"""Sixteen GPUs of a Ray cluster: Ray places the ranks and tells them of each other, halfbyte does the rest.

python examples/launchers/ray_train.py run.yaml
"""

import os
import subprocess
import sys
from typing import Any


def train(options: dict[str, Any]) -> None:
    """Run one rank, as torchrun would."""
    # Ray has a group of its own at this port already.
    meeting = {"MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1)}
    command = [sys.executable, "-m", "halfbyte", "train", options["run"]]
    subprocess.run(command, env={**os.environ, **meeting}, check=True)


def main() -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train,
        train_loop_config={"run": os.path.abspath(sys.argv[1])},
        scaling_config=ScalingConfig(num_workers=16, use_gpu=True),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
