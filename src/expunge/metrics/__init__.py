"""Measures: pure functions from tensors to numbers, and the intervals around those numbers.

Where the figure is a mean over samples and shall be compared in pairs, the function returns the samples' values, for
`of_values`.
"""

from expunge.metrics.accuracy import accuracy, confusion_counts, masked_accuracy, per_class_accuracy
from expunge.metrics.confidence import calibration_error
from expunge.metrics.distance import layer_distances
from expunge.metrics.distribution import entropy_bits, prediction_distribution
from expunge.metrics.similarity import activation_distances, divergence_bits, tug_of_war, zero_retrain_forgetting
from expunge.metrics.uncertainty import (
    Interval,
    Measurement,
    differs,
    gap_interval,
    mean_interval,
    of_hits,
    of_ranks,
    of_seeds,
    of_values,
    wilson_interval,
)

__all__ = [
    "Interval",
    "Measurement",
    "accuracy",
    "activation_distances",
    "calibration_error",
    "confusion_counts",
    "differs",
    "divergence_bits",
    "entropy_bits",
    "gap_interval",
    "layer_distances",
    "masked_accuracy",
    "mean_interval",
    "of_hits",
    "of_ranks",
    "of_seeds",
    "of_values",
    "per_class_accuracy",
    "prediction_distribution",
    "tug_of_war",
    "wilson_interval",
    "zero_retrain_forgetting",
]
