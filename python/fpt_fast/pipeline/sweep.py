"""A sweep: many models from one stream of features, each saved as if trained alone."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpt_fast.config import ConfigError, FptConfig, TrainConfig
from fpt_fast.distributed import refuse_several
from fpt_fast.loader import SweepLoader
from fpt_fast.metrics import LOWER_IS_BETTER
from fpt_fast.model import FptModel
from fpt_fast.pipeline.data import list_image_set, patients_of
from fpt_fast.pipeline.grades import GRADE_CUTS, learn_cuts, with_cuts
from fpt_fast.pipeline.inputs import RunInputs, make_loader, open_inputs
from fpt_fast.pipeline.pooling import pool_folds
from fpt_fast.pipeline.recipe import make_recipe
from fpt_fast.pipeline.run_folder import (
    BEST,
    check_run_folder,
    class_counts,
    model_extra,
    open_run_folder,
    run_identity,
    write_config,
    write_results,
)
from fpt_fast.pipeline.settled import refuse_ignored
from fpt_fast.records import Predictions, Split
from fpt_fast.report.pooled import PooledRow
from fpt_fast.report.sweep import SweepRow, summarise, sweep_markdown, write_sweep_files
from fpt_fast.run_settings import RunSettings, SweepSettings, TrainSettings
from fpt_fast.setting_values import build_settings
from fpt_fast.sweep import (
    Trial,
    TrialOutcome,
    distinct_seeds,
    fit_sweep,
    make_trials,
    parse_numbers,
    predict_sweep,
)
from fpt_fast.trainer import deterministic_algorithms
from fpt_fast.trust import Assessment, assess

log = logging.getLogger("fpt_fast")

CHECKPOINT_FILE = "sweep.safetensors"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: its folder, one row a model in the order of the trials, and the name of
    the best by the monitored validation metric (None where no model has a value); of folds also
    the ``pooled`` out-of-fold predictions of each setting in each division."""

    folder: Path
    rows: tuple[SweepRow, ...]
    best: str | None
    monitor: str
    split: Split
    pooled: tuple[PooledRow, ...] = ()

    def __str__(self) -> str:
        """Mean and spread over the seeds, the best setting first; of folds, the pooled metrics."""
        return sweep_markdown(summarise(self.rows, self.monitor), self.split, self.pooled)


def sweep(settings: SweepSettings | None = None, **values: Any) -> SweepResult:
    """Train all combinations of what is listed; see ``SweepSettings`` for the arguments.

    ``run/<model>/`` gets what ``train`` leaves of the best epoch, ``run/`` itself ``sweep.csv``
    (a row a model), ``summary.csv`` and ``summary.md`` (mean and spread over the seeds) and
    ``sweep.svg``.  A model is the one that ``train`` makes with its settings and the same
    ``order_seed``, up to rounding.  With ``folds`` there is such a folder for each fold of each of
    ``repeats`` divisions, the tables are over all of them, and ``run/repeat-1-pooled/<model>/`` has
    the predictions of all images, each by the model that had not seen it, with their metrics.
    """
    refuse_several("a sweep")
    settings = settings or build_settings(SweepSettings, values)
    if settings.folds is not None:
        return _cross_validate(settings, settings.folds)
    axes = _axes(settings)
    base = _alone(settings, axes, {})
    refuse_ignored(base)
    if settings.augment_input:
        raise ConfigError(
            "--augment-input makes other features for each seed, and a sweep's models share "
            "theirs; leave it out, or train each model by itself"
        )
    folder = settings.run
    marks = frozenset({CHECKPOINT_FILE})
    check_run_folder(
        folder, resume=settings.resume, overwrite=settings.overwrite, checkpoints=marks
    )
    with ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(settings.deterministic))
        inputs, method = open_inputs(base, stack)
        recipe = make_recipe(base, inputs.images)
        if settings.learning_rate is None:
            axes = {"learning_rate": (recipe.learning_rate,), **axes}
        trials = make_trials(method, recipe, axes)
        log.info("sweep: %d models side by side", len(trials))
        with open_run_folder(folder, resume=settings.resume, checkpoints=marks):
            if not settings.resume:
                write_config(settings, inputs, method, recipe)
            outcomes = _train(settings, base, inputs, recipe, trials, method)
        rows, split = _save(settings, inputs, outcomes)
    write_sweep_files(folder, rows, recipe.monitor, split)
    return SweepResult(folder, rows, _best(outcomes), recipe.monitor, split)


def _cross_validate(settings: SweepSettings, folds: int) -> SweepResult:
    """The sweep of every fold of every division, and the tables over all of them."""
    if settings.fold is not None or folds < 2 or settings.repeats < 1:
        raise ConfigError(
            "--folds must be at least 2 and --repeats at least 1, without --fold; got "
            f"{folds}, {settings.repeats} and {settings.fold}"
        )
    rows: list[SweepRow] = []
    pooled: list[PooledRow] = []
    for repeat in range(settings.repeats):
        divided: list[SweepResult] = []
        for number in range(1, folds + 1):
            name = f"repeat-{repeat + 1}-fold-{number}"
            log.info("repeat %d of %d, fold %d of %d", repeat + 1, settings.repeats, number, folds)
            run = settings.run / name
            own = dataclasses.replace(
                settings,
                run=run,
                folds=None,
                repeats=1,
                fold=f"{number}/{folds}",
                split_seed=settings.split_seed + repeat,
                resume=settings.resume and (run / CHECKPOINT_FILE).is_file(),
            )
            divided.append(sweep(own))
            rows += [
                dataclasses.replace(row, name=f"{name}/{row.name}") for row in divided[-1].rows
            ]
        pooled += _pool(own, settings.run / f"repeat-{repeat + 1}-pooled", divided)
    found = divided[-1]
    write_sweep_files(settings.run, rows, found.monitor, found.split, pooled)
    known = [row for row in rows if row.best_value is not None]
    sign = -1.0 if found.monitor in LOWER_IS_BETTER else 1.0
    best = max(known, key=lambda row: sign * (row.best_value or 0.0)).name if known else None
    return SweepResult(settings.run, tuple(rows), best, found.monitor, found.split, tuple(pooled))


def _pool(
    settings: SweepSettings, target: Path, divided: Sequence[SweepResult]
) -> Iterator[PooledRow]:
    """Pool each model over the folds of one division, but for those that ended early in one."""
    images = list_image_set(settings, settings.data)
    names = patients_of(images.items)
    keys = [item.key for item in images.items]
    patients = None if names is None else dict(zip(keys, names, strict=True))
    for trials in zip(*(fold.rows for fold in divided), strict=True):
        if all(row.ended is None and row.metrics for row in trials):
            name = trials[0].name
            folders = [fold.folder / name for fold in divided]
            yield pool_folds(folders, target / name, images.classes, patients)


def _axes(settings: SweepSettings) -> dict[str, Sequence[float]]:
    """What varies, by the names of ``sweep.AXES``."""
    listed = {
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "num_prompts": settings.prompts,
        "seed": settings.seed,
    }
    return {name: parse_numbers(name, text) for name, text in listed.items() if text is not None}


def _alone(
    settings: SweepSettings, axes: Mapping[str, Sequence[float]], values: Mapping[str, float]
) -> TrainSettings:
    """The settings that would train one model alone; the first one where ``values`` are silent."""
    shared = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(RunSettings)
    }
    whole = ("seed", "num_prompts")
    own = {
        name: (int if name in whole else float)(values.get(name, numbers[0]))
        for name, numbers in axes.items()
    }
    return TrainSettings(
        **shared,
        **own,  # type: ignore[arg-type]
        method=settings.method,
        order_seed=settings.order_seed,
    )


def _train(
    settings: SweepSettings,
    base: TrainSettings,
    inputs: RunInputs,
    recipe: TrainConfig,
    trials: Sequence[Trial],
    method: FptConfig,
) -> tuple[TrialOutcome, ...]:
    seeds = tuple(distinct_seeds(trials))
    train_batches = SweepLoader(make_loader(inputs, base, "train", repeated=True), seeds)
    val_batches = None
    if inputs.images.of_split("val"):
        val_batches = SweepLoader(make_loader(inputs, base, "val", repeated=True), seeds[:1])
    return fit_sweep(
        [_new_model(inputs, trial) for trial in trials],
        trials,
        train_batches,
        val_batches,
        path=settings.run / CHECKPOINT_FILE,
        num_classes=len(inputs.images.classes),
        class_counts=class_counts(inputs.images),
        device=settings.device,
        halve_every=settings.halve_every,
        resume=settings.resume,
        inputs={**run_identity(settings, inputs, method), "order_seed": settings.order_seed},
    )


def _new_model(inputs: RunInputs, trial: Trial) -> FptModel:
    """A model with the weights that ``train`` would begin with."""
    outputs = 1 if trial.recipe.is_regression else len(inputs.images.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.recipe.seed)
        return FptModel(trial.method, inputs.plan.spec, outputs)


def _save(
    settings: SweepSettings, inputs: RunInputs, outcomes: Sequence[TrialOutcome]
) -> tuple[tuple[SweepRow, ...], Split]:
    """Test every model that has weights, and write its folder."""
    axes = _axes(settings)
    images = inputs.images
    split: Split = next((s for s in ("test", "val") if images.of_split(s)), "train")
    with_weights = [outcome for outcome in outcomes if outcome.best is not None]
    models = [_best_model(inputs, outcome) for outcome in with_weights]
    target = outcomes[0].trial.recipe.target
    loader = make_loader(inputs, _alone(settings, axes, {}), split)
    predictions = predict_sweep(
        models, SweepLoader(loader, (0,)), device=settings.device, target=target
    )
    validations: Sequence[Predictions | None] = [None] * len(models)
    if split == "test" and images.of_split("val"):
        val_loader = make_loader(inputs, _alone(settings, axes, {}), "val")
        validations = predict_sweep(
            models, SweepLoader(val_loader, (0,)), device=settings.device, target=target
        )
    assessments: dict[str, Assessment] = {}
    for outcome, model, predicted, validation in zip(
        with_weights, models, predictions, validations, strict=True
    ):
        trial = outcome.trial
        own = dataclasses.replace(
            _alone(settings, axes, trial.values),
            run=settings.run / trial.name,
            learning_rate=trial.recipe.learning_rate,
            resume=False,
            overwrite=False,
        )
        chosen_on = predicted if split == "val" else validation
        cuts = learn_cuts(own, trial.recipe, chosen_on, len(images.classes))
        extra = model_extra(inputs, trial.recipe)
        if cuts is not None:
            extra[GRADE_CUTS] = list(cuts)
            predicted = with_cuts(predicted, cuts)
            validation = None if validation is None else with_cuts(validation, cuts)
        assessments[trial.name] = assess(
            predicted,
            len(images.classes),
            groups=patients_of(images.of_split(split)),
            validation=validation,
            cuts_seen=split == "val",
            names=images.classes,
        )
        own.run.mkdir(exist_ok=True)
        write_config(own, inputs, trial.method, trial.recipe)
        model.save_pretrained(own.run / BEST, extra=extra)
        assessment = assessments[trial.name]
        write_results(own, inputs, outcome.history, predicted, assessment, split, validation, model)
    rows = tuple(
        SweepRow(
            outcome.trial.name,
            outcome.trial.values,
            outcome.history.best_epoch,
            outcome.history.best_value,
            dict(assessments[outcome.trial.name].values)
            if outcome.trial.name in assessments
            else {},
            outcome.ended,
        )
        for outcome in outcomes
    )
    return rows, split


def _best_model(inputs: RunInputs, outcome: TrialOutcome) -> FptModel:
    model = _new_model(inputs, outcome.trial)
    assert outcome.best is not None
    model.load_state_dict(outcome.best)
    return model.eval()


def _best(outcomes: Sequence[TrialOutcome]) -> str | None:
    known = [outcome for outcome in outcomes if outcome.history.best_value is not None]
    if not known:
        return None
    sign = -1.0 if known[0].history.monitor in LOWER_IS_BETTER else 1.0
    return max(known, key=lambda o: sign * (o.history.best_value or 0.0)).trial.name
