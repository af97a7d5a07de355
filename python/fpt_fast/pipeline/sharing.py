"""``fpt-fast share``: a run's best model as a folder that others can use, or on the hub."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fpt_fast import __version__
from fpt_fast.config import ConfigError
from fpt_fast.files import output_folder, require_free_folder, write_atomically
from fpt_fast.hub import push_folder
from fpt_fast.model import FptModel
from fpt_fast.pipeline.peers import is_peer_folder
from fpt_fast.pipeline.run_folder import BEST, CONFIG_FILE
from fpt_fast.pipeline.temperatures import TEMPERATURES, find_temperatures
from fpt_fast.report import CardFacts, model_card
from fpt_fast.setting_values import build_settings
from fpt_fast.settings import ShareSettings

CARD_FILE, METRICS_FILE = "README.md", "metrics.json"


@dataclass(frozen=True, slots=True)
class ShareResult:
    """Where the model went: a folder (None: it was only pushed), and its address on the hub."""

    folder: Path | None
    address: str | None


def share(settings: ShareSettings | None = None, **values: Any) -> ShareResult:
    """Write model, metrics and card of a run for others; see ``ShareSettings``.

    Paths of this machine are left out of the files.  Raises ``ConfigError`` where the run is
    unfinished or nothing is asked for, ``FileExistsError`` where ``output`` is not empty and not to
    be replaced, ``HubError`` where the hub refuses.
    """
    settings = settings or build_settings(ShareSettings, values)
    if settings.output is None and settings.repo is None:
        raise ConfigError("say where to: --output FOLDER, --repo OWNER/NAME, or both")
    if settings.output is not None:
        require_free_folder(settings.output, CARD_FILE, overwrite=settings.overwrite)
    model, metrics, run = _read_run(settings.run)
    # Before the model is saved, which leaves it without the paths of this machine.
    facts = _facts(settings, model, metrics, run)
    with _place(settings.output) as target:
        extra = _without_paths(model.extra)
        temperatures = find_temperatures(settings.run, model.extra)
        if temperatures is not None:
            extra[TEMPERATURES] = list(temperatures)
        model.save_pretrained(target, extra=extra)
        _write_json(target / METRICS_FILE, metrics)
        with write_atomically(target / CARD_FILE) as file:
            file.write(model_card(facts))
        address = None
        if settings.repo is not None:
            address = push_folder(
                target,
                settings.repo,
                private=settings.private,
                message=f"{settings.run.name}, by fpt-fast {__version__}",
            )
    return ShareResult(settings.output, address)


@contextmanager
def _place(output: Path | None) -> Iterator[Path]:
    """An empty folder for the files: ``output``, or one for the length of the ``with`` block.

    What is complete stays in ``output`` where the hub refuses it.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="fpt-fast-share-") as folder:
            yield Path(folder)
    else:
        with output_folder(output, keep=(output / CARD_FILE).is_file):
            yield output


def _read_run(run: Path) -> tuple[FptModel, dict[str, Any], dict[str, Any]]:
    try:
        metrics = json.loads((run / METRICS_FILE).read_text(encoding="utf-8"))
        config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{run} is not a finished run of fpt-fast ({error}); train it to its end first"
        ) from error
    if is_peer_folder(run / BEST):
        raise ConfigError(
            f"{run} was trained by --method {config['method']['method']}; only models of FPT and "
            "FPT+ are shared"
        )
    return FptModel.from_pretrained(run / BEST), metrics, config


def _without_paths(extra: dict[str, Any]) -> dict[str, Any]:
    """``extra`` as strangers may see it: the frozen model by its name, not by where it lies."""
    features = dict(extra.get("features", {}))
    if "features_version" in features:
        features["checkpoint_path"] = None
        features["source"] = _shared_source(features)
    return {**extra, "features": features}


def _shared_source(features: dict[str, Any]) -> str:
    source = str(features.get("source", ""))
    return features["backbone.name"] if Path(source).is_absolute() else source


def _base_model(features: dict[str, Any]) -> str:
    """The repository of the frozen model on the hub; empty where it came from a folder."""
    source = str(features.get("source", ""))
    if not source or Path(source).is_absolute() or not features.get("pretrained", False):
        return ""
    source = source.removeprefix("hf-hub:")
    return source if "/" in source else f"timm/{source}"


def _facts(
    settings: ShareSettings,
    model: FptModel,
    metrics: dict[str, Any],
    run: dict[str, Any],
) -> CardFacts:
    features = _without_paths(model.extra)["features"]
    trained, _ = model.trainable_parameters()
    return CardFacts(
        name=settings.name or settings.run.resolve().name,
        classes=model.extra["classes"],
        method=model.config.to_json(),
        training=run["training"],
        features=features,
        metrics=metrics,
        parameters=trained,
        version=__version__,
        several=model.extra.get("task") == "multilabel",
        target=model.extra.get("target"),
        temperatures=find_temperatures(settings.run, model.extra),
        graded=bool(model.extra.get("regression")) and model.extra.get("target") is None,
        base_model=_base_model(model.extra.get("features", {})),
        frozen_folder=Path(str(model.extra.get("features", {}).get("source", ""))).is_absolute(),
        repository=settings.repo or "",
        **{
            field: getattr(settings, field)
            for field in ("data_set", "license", "intended_use", "contact")
        },
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
