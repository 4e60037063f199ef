"""Unlearning methods: one file each, all called as `method(model, split, config, *, seed) -> model`."""

from collections.abc import Callable, Mapping
from typing import Any

from expunge.methods.bad_teacher import METHOD as BAD_TEACHER
from expunge.methods.fine_tune import METHOD as FINE_TUNE
from expunge.methods.head_mask import METHOD as HEAD_MASK
from expunge.methods.l1_sparse import METHOD as L1_SPARSE
from expunge.methods.neg_grad import METHOD as NEG_GRAD
from expunge.methods.neg_grad_plus import METHOD as NEG_GRAD_PLUS
from expunge.methods.none import METHOD as NONE
from expunge.methods.random_init import METHOD as RANDOM_INIT
from expunge.methods.random_labels import METHOD as RANDOM_LABELS
from expunge.methods.registry import Method
from expunge.methods.retrain import METHOD as RETRAIN
from expunge.methods.salun import METHOD as SALUN
from expunge.methods.scrub import METHOD as SCRUB
from expunge.methods.unsir import UnsirConfig, unsir

UNSIR = Method(
    name="unsir",
    run=unsir,
    config=UnsirConfig,
    presets={
        "default": UnsirConfig,
        "fast": UnsirConfig.fast,
        "paper": UnsirConfig.paper,
        "notebook": UnsirConfig.notebook,
    },
    reads=frozenset({"retain"}),
    source="Tarun et al., arXiv:2111.08947",
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        UNSIR,
        RETRAIN,
        FINE_TUNE,
        NEG_GRAD,
        NEG_GRAD_PLUS,
        RANDOM_LABELS,
        BAD_TEACHER,
        SCRUB,
        SALUN,
        L1_SPARSE,
        NONE,
        HEAD_MASK,
        RANDOM_INIT,
    )
}
"""Every method, by name. A new one is a file with a `METHOD`, and two lines here."""

PRESETS: dict[str, Mapping[str, Callable[[], Any]]] = {name: method.presets for name, method in METHODS.items()}

__all__ = ["METHODS", "PRESETS", "Method", "UnsirConfig", "unsir"]
