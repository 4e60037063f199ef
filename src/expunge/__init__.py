"""Make a trained classifier forget whole classes, without reading them, and say honestly how well it went."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.audits import AUDITS
    from expunge.data import TensorImages
    from expunge.errors import DivergedError, InputError
    from expunge.evaluation import evaluate
    from expunge.journal import Journal
    from expunge.methods import METHODS
    from expunge.methods.unsir import Calibration, UnsirConfig, impair, learn_noise, repair, unsir
    from expunge.schema import Phase, Predictions, Preprocessing, Record, Signals, Split, TrainConfig
    from expunge.signals import gather_evidence, learn_impressions, read_signals
    from expunge.training import predict, train

__version__ = "0.1.0"

_HOMES = {
    "expunge.audits": ("AUDITS",),
    "expunge.data": ("TensorImages",),
    "expunge.errors": ("DivergedError", "InputError"),
    "expunge.evaluation": ("evaluate",),
    "expunge.journal": ("Journal",),
    "expunge.methods": ("METHODS",),
    "expunge.methods.unsir": ("Calibration", "UnsirConfig", "impair", "learn_noise", "repair", "unsir"),
    "expunge.schema": ("Phase", "Predictions", "Preprocessing", "Record", "Signals", "Split", "TrainConfig"),
    "expunge.signals": ("gather_evidence", "learn_impressions", "read_signals"),
    "expunge.training": ("predict", "train"),
}

__all__ = [
    "AUDITS",
    "METHODS",
    "Calibration",
    "DivergedError",
    "InputError",
    "Journal",
    "Phase",
    "Predictions",
    "Preprocessing",
    "Record",
    "Signals",
    "Split",
    "TensorImages",
    "TrainConfig",
    "UnsirConfig",
    "evaluate",
    "gather_evidence",
    "impair",
    "learn_impressions",
    "learn_noise",
    "predict",
    "read_signals",
    "repair",
    "train",
    "unsir",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")
