"""Measures: pure functions from tensors to numbers."""

from expunge.metrics.accuracy import accuracy, masked_accuracy, per_class_accuracy
from expunge.metrics.distance import layer_distances
from expunge.metrics.distribution import entropy_bits, prediction_distribution

__all__ = [
    "accuracy",
    "entropy_bits",
    "layer_distances",
    "masked_accuracy",
    "per_class_accuracy",
    "prediction_distribution",
]
