"""The whole method as a few calls: ``preload``, ``train`` or ``sweep``, ``evaluate``, ``predict``.

The one part of the library that knows every stage.  Each call takes its settings as a
dataclass or as keyword arguments of the same names, which are also the command line's flags.
"""

from fpt_fast.cache import inspect_cache, verify_cache
from fpt_fast.cache_settings import ConvertSettings, ImportSettings, RepairSettings
from fpt_fast.interrupts import Stopped
from fpt_fast.pipeline.comparing import compare
from fpt_fast.pipeline.comparing_runs import RunsComparison, compare_runs
from fpt_fast.pipeline.converting import ConvertResult, convert
from fpt_fast.pipeline.data import UnreadableImages
from fpt_fast.pipeline.diagnosis import doctor
from fpt_fast.pipeline.evaluation import evaluate
from fpt_fast.pipeline.explaining import ExplainResult, explain, explanation_arrays
from fpt_fast.pipeline.exporting import ExportResult, export
from fpt_fast.pipeline.importing import ImportResult, import_reference
from fpt_fast.pipeline.prediction import PredictResult, predict
from fpt_fast.pipeline.predictor import Predictor
from fpt_fast.pipeline.preloading import PreloadResult, preload
from fpt_fast.pipeline.repairing import repair
from fpt_fast.pipeline.run_folder import RunExists
from fpt_fast.pipeline.sharing import ShareResult, share
from fpt_fast.pipeline.sweep import SweepResult, sweep
from fpt_fast.pipeline.training import TrainResult, train
from fpt_fast.run_settings import SweepSettings, TrainSettings
from fpt_fast.settings import (
    DataSettings,
    DoctorSettings,
    EvaluateSettings,
    ExplainSettings,
    ExportSettings,
    PredictSettings,
    PreloadSettings,
    ShareSettings,
)

__all__ = [
    "ConvertResult",
    "ConvertSettings",
    "DataSettings",
    "DoctorSettings",
    "EvaluateSettings",
    "ExplainResult",
    "ExplainSettings",
    "ExportResult",
    "ExportSettings",
    "ImportResult",
    "ImportSettings",
    "PredictResult",
    "PredictSettings",
    "Predictor",
    "PreloadResult",
    "PreloadSettings",
    "RepairSettings",
    "RunExists",
    "RunsComparison",
    "ShareResult",
    "ShareSettings",
    "Stopped",
    "SweepResult",
    "SweepSettings",
    "TrainResult",
    "TrainSettings",
    "UnreadableImages",
    "compare",
    "compare_runs",
    "convert",
    "doctor",
    "evaluate",
    "explain",
    "explanation_arrays",
    "export",
    "import_reference",
    "inspect_cache",
    "predict",
    "preload",
    "repair",
    "share",
    "sweep",
    "train",
    "verify_cache",
]
