"""Audits: attacks that use a model to find what it still knows."""

from expunge.audits.inside import Features, features_of, linear_probe, nearest_class_mean
from expunge.audits.relearn import relearn_steps

__all__ = ["Features", "features_of", "linear_probe", "nearest_class_mean", "relearn_steps"]
