"""Training and prediction of any module called as ``model(batch: FeatureBatch) -> logits``."""

from fpt_fast.trainer.batches import EpochBatches, resolve_device
from fpt_fast.trainer.capture import Capture, StepChoice, choose_capture
from fpt_fast.trainer.checkpoint import CheckpointError, load_weights
from fpt_fast.trainer.determinism import deterministic_algorithms
from fpt_fast.trainer.epoch import TrainingError
from fpt_fast.trainer.loop import Callback, fit
from fpt_fast.trainer.prediction import predict
from fpt_fast.trainer.progress import open_progress
from fpt_fast.trainer.schedule import learning_rate_at
from fpt_fast.trainer.validation import monitor_names

__all__ = [
    "Callback",
    "Capture",
    "CheckpointError",
    "EpochBatches",
    "StepChoice",
    "TrainingError",
    "choose_capture",
    "deterministic_algorithms",
    "fit",
    "learning_rate_at",
    "load_weights",
    "monitor_names",
    "open_progress",
    "predict",
    "resolve_device",
]
