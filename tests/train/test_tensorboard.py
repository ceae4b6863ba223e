from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from halfbyte.train.tensorboard import PatientTensorBoard
from tests.train.full_disk import files_up_to
from tests.train.runs import build_trainer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_cannot_write_does_not_end_a_run(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, max_steps=30, report_to="tensorboard")
    logger = next(c for c in trainer.callback_handler.callbacks if isinstance(c, PatientTensorBoard))
    assert logger.logging_dir == str(tmp_path / "logs")
    told: list[str] = []
    logger.tell = told.append
    trainer.saver.tokenizer.prepare()
    trainer.save_model = lambda *args: None
    with files_up_to(3_000):  # room for the first steps, then for nothing
        trainer.train()
    assert trainer.state.global_step == 30
    assert told
    assert "TensorBoard's logs could not be written: File too large; training goes on" in told[0]
    logs = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert logs.Tags()["scalars"]
