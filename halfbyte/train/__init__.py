"""Training: the trainer and its arguments, held-out loss, and a whole run from its config."""

from halfbyte.train.arguments import HalfbyteArguments
from halfbyte.train.bad_steps import DivergedError
from halfbyte.train.batches import BatchOptions, iter_batches, pad_id_of
from halfbyte.train.evaluate import HeldOut, evaluate_loss
from halfbyte.train.run import RunResult, run_training
from halfbyte.train.summary import Summary
from halfbyte.train.trainer import HalfbyteTrainer, TrainerOptions

__all__ = [
    "BatchOptions",
    "DivergedError",
    "HalfbyteArguments",
    "HalfbyteTrainer",
    "HeldOut",
    "RunResult",
    "Summary",
    "TrainerOptions",
    "evaluate_loss",
    "iter_batches",
    "pad_id_of",
    "run_training",
]
