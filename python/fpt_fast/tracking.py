"""Progress of a run for TensorBoard (``pip install fpt-fast[tensorboard]``)."""

import math
from pathlib import Path

from fpt_fast.records import EpochRecord, TrainingHistory


class TensorBoardCallback:
    """Writes loss, learning rate and validation metrics of each epoch to ``log_dir``.

    Pass it to ``fit(..., callbacks=[TensorBoardCallback(run_dir / "tensorboard")])``.  Steps are
    epochs, counted from 0.  Raises ``ImportError`` saying what to install.
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard files need the tensorboard package: pip install fpt-fast[tensorboard]"
            ) from error
        self._writer = SummaryWriter(str(log_dir))

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Write one epoch; a metric that is not a number has no point."""
        values = {"train/loss": record.loss, "train/learning_rate": record.learning_rate}
        values |= {f"val/{name}": value for name, value in record.val.items()}
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, record.epoch)
        self._writer.flush()

    def on_end(self, history: TrainingHistory) -> None:
        """Close the files."""
        self._writer.close()
