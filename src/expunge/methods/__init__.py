"""Unlearning methods: one file each, all called as `method(model, split, config, *, seed) -> model`."""

from collections.abc import Callable, Mapping
from typing import Any

from expunge.methods.bad_teacher import METHOD as BAD_TEACHER
from expunge.methods.boundary import EXPAND as BOUNDARY_EXPAND
from expunge.methods.boundary import SHRINK as BOUNDARY_SHRINK
from expunge.methods.delete import METHOD as DELETE
from expunge.methods.fine_tune import METHOD as FINE_TUNE
from expunge.methods.fisher import METHOD as FISHER
from expunge.methods.head_mask import METHOD as HEAD_MASK
from expunge.methods.jit import METHOD as JIT
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
from expunge.methods.ssd import METHOD as SSD
from expunge.methods.svd_class import METHOD as SVD_CLASS
from expunge.methods.unsir import UnsirConfig, unsir
from expunge.methods.zero_shot import GKT as ZERO_SHOT_GKT
from expunge.methods.zero_shot import NOISE as ERROR_MIN_MAX

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
    # rates that the calibration starts from, a grid of our own around the default's; 0.02, and 0.01 of repair, are the
    # notebook's
    space={"impair.lr": (0.002, 0.005, 0.01, 0.02), "repair.lr": (0.0015, 0.01)},
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
        FISHER,
        SSD,
        BOUNDARY_SHRINK,
        BOUNDARY_EXPAND,
        ZERO_SHOT_GKT,
        ERROR_MIN_MAX,
        JIT,
        DELETE,
        SVD_CLASS,
        NONE,
        HEAD_MASK,
        RANDOM_INIT,
    )
}
"""Every method, by name. A new one is a file with a `METHOD`, and two lines here."""

PRESETS: dict[str, Mapping[str, Callable[[], Any]]] = {name: method.presets for name, method in METHODS.items()}

__all__ = ["METHODS", "PRESETS", "Method", "UnsirConfig", "unsir"]
