"""The metrics of many resamples at once, of a number per image.  A row of ones gives what
``fpt_fast.metrics.compute_metrics`` gives."""

import numpy as np
from numpy.typing import NDArray

from fpt_fast.records import Predictions
from fpt_fast.trust.resampled import ResampledMetrics
from fpt_fast.value_metrics import VALUE_METRICS, known_values, value_metrics


class ValueResampler:
    """As ``Resampler``, for labels [images] f64; there are no classes."""

    def __init__(self, predictions: Predictions) -> None:
        self.value_names = VALUE_METRICS
        self.class_names: tuple[str, ...] = ()
        self.labels, self._values = known_values(predictions)

    def __call__(self, counts: NDArray[np.int64]) -> ResampledMetrics:
        """Metrics of the resamples ``counts`` [R, labelled images]."""
        weights = counts.astype(np.float64)
        return ResampledMetrics(value_metrics(self.labels, self._values, weights), {})
