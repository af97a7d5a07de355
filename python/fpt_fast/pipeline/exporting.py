"""Export of a trained run, frozen model included, as one file that other programs run."""

import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.config import ConfigError
from fpt_fast.files import require_free_file
from fpt_fast.pipeline.features import load_recorded_backbone
from fpt_fast.pipeline.recorded import RecordedRun, read_recorded_run
from fpt_fast.pipeline.temperatures import find_temperatures, require_temperatures
from fpt_fast.portable import PortableClassifier
from fpt_fast.setting_values import build_settings
from fpt_fast.settings import ExportSettings

_NAMES = ("frozen_pixels", "side_pixels")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The file, its bytes, the largest difference of its probabilities from PyTorch's on random
    pixels, and the seconds of one image with each."""

    output: Path
    bytes: int
    difference: float
    seconds: float
    eager_seconds: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.output}: {self.bytes / 1e6:.0f} MB, largest difference "
            f"{self.difference:.1e}, {self.seconds:.3f} s an image (PyTorch, as plainly: "
            f"{self.eager_seconds:.3f} s)"
        )


def export(settings: ExportSettings | None = None, **values: Any) -> ExportResult:
    """Export a run as ONNX or as a torch.export program; see ``ExportSettings``.

    The graph takes ``frozen_pixels`` [B, 3, H, W] and ``side_pixels`` [B, 3, h, w] f32, resized
    and normalised as the metadata under ``fpt_fast`` says, and gives probabilities [B, classes]
    (a regression's grades, or numbers in their own unit, [B, 1]).  With ``calibrated`` the
    temperatures are part of it; the metadata has them in any case.  It is run once and compared
    before it is reported.
    """
    settings = settings or build_settings(ExportSettings, values)
    require_free_file(settings.output, overwrite=settings.overwrite)
    run = read_recorded_run(settings.run)
    module = portable(run, settings)
    size, side = run.plan.preprocessing.size, run.model.config.side_size
    # Two images: a graph made with one may take it for granted.
    example = (torch.randn(2, 3, *size), torch.randn(2, 3, *side))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    write = _write_onnx if settings.format == "onnx" else _write_program
    with torch.no_grad():
        apply = write(module, example, settings.output, _metadata(run, settings))
        one = (example[0][:1], example[1][:1])
        difference = max(
            float((apply(*inputs) - module(*inputs)).abs().max()) for inputs in (example, one)
        )
        seconds = _seconds(lambda: apply(*one))
        eager = _seconds(lambda: module(*one))
    return ExportResult(settings.output, settings.output.stat().st_size, difference, seconds, eager)


def portable(run: RecordedRun, settings: ExportSettings) -> PortableClassifier:
    """The run's classifier in torch's own operations, in f32 on the CPU."""
    temperature: Tensor | float = 1.0
    if settings.calibrated:
        temperature = require_temperatures(settings.run, run.model.extra)
    backbone = load_recorded_backbone(
        run.plan,
        backbone=settings.backbone,
        checkpoint_path=settings.checkpoint_path,
        dtype="float32",
        device="cpu",
        attention="auto",
    )
    run.plan.frozen_pass(backbone)  # refuses other weights
    return PortableClassifier(
        run.model.float().cpu().eval(),
        backbone,
        layers=run.plan.layers,
        token_ratio=run.plan.token_ratio,
        importance=run.plan.importance,
        input_size=run.plan.preprocessing.size,
        target=run.target,
        temperature=temperature,
        output="none" if run.regression else "sigmoid" if run.several else "softmax",
    ).eval()


def _metadata(run: RecordedRun, settings: ExportSettings) -> str:
    """What whoever feeds the graph must know, as JSON."""
    preprocessing = run.plan.preprocessing
    values: dict[str, Any] = {
        "classes": run.classes,
        "output": _meaning(run),
        "frozen_size": preprocessing.size,
        "side_size": run.model.config.side_size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "fit": preprocessing.fit,
        "window": run.plan.reading.window,
        "dicom_frame": run.plan.reading.frame,
        "resize": "bilinear, antialiased, levels of 8 bits rounded; then (x / full scale - mean) "
        "/ std, full scale 255, or 65535 of 16 bits",
    }
    if run.cuts is not None:
        # A grade is the number of cuts that the output reaches.
        values["grade_cuts"] = run.cuts
    temperatures = find_temperatures(settings.run, run.model.extra)
    if temperatures is not None:
        # One for all classes, or one for each finding.
        values["temperatures"] = temperatures
        values["calibrated"] = settings.calibrated
    return json.dumps(values)


def _meaning(run: RecordedRun) -> str:
    """What the graph gives: probabilities of ``classes`` or of ``findings``, a ``grade``, or a
    ``value`` in the unit of the labels."""
    if run.target is not None:
        return "value"
    if run.regression:
        return "grade"
    return "findings" if run.several else "classes"


def _dynamic() -> dict[str, dict[int, Any]]:
    batch = torch.export.Dim("batch", min=1, max=1024)
    return {name: {0: batch} for name in _NAMES}


def _write_program(
    module: PortableClassifier, example: tuple[Tensor, Tensor], path: Path, metadata: str
) -> Callable[[Tensor, Tensor], Tensor]:
    program = torch.export.export(module, example, dynamic_shapes=_dynamic())
    torch.export.save(program, path, extra_files={"fpt_fast": metadata})
    loaded = torch.export.load(path).module()
    return lambda *inputs: loaded(*inputs)


def _write_onnx(
    module: PortableClassifier, example: tuple[Tensor, Tensor], path: Path, metadata: str
) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs {error.name}, which is not installed: "
            "pip install 'fpt-fast[export]'"
        ) from error
    with warnings.catch_warnings():
        # Both inputs have as many images: one name of that is dropped, and the exporter says so.
        warnings.filterwarnings("ignore", message="# The axis name")
        program = torch.onnx.export(
            module,
            example,
            input_names=list(_NAMES),
            output_names=["output"],
            dynamic_shapes=_dynamic(),
            dynamo=True,
            verbose=False,
            external_data=False,
        )
    assert program is not None
    described = program.model_proto
    onnx.helper.set_model_props(described, {"fpt_fast": metadata})
    onnx.save(described, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def apply(*inputs: Tensor) -> Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(_NAMES, inputs, strict=True)}
        return torch.from_numpy(session.run(None, named)[0])

    return apply


def _seconds(run: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
