"""Audits: attacks that use a model to find what it still knows, and the runner that lays models side by side."""

from expunge.audits.attacks import ATTACKS
from expunge.audits.core import Audit, AuditData, Context, Found, Subject
from expunge.audits.feature_map import FEATURE_MAP
from expunge.audits.inside import Features, features_of, linear_probe, nearest_class_mean
from expunge.audits.recovery import INSIDE_AUDITS
from expunge.audits.relearn import relearn_steps
from expunge.audits.runner import run_audits

AUDITS: dict[str, Audit] = {audit.name: audit for audit in (*INSIDE_AUDITS, *ATTACKS, FEATURE_MAP)}
"""Every audit of the default budget, by name, in the order in which they run."""

__all__ = [
    "AUDITS",
    "Audit",
    "AuditData",
    "Context",
    "Features",
    "Found",
    "Subject",
    "features_of",
    "linear_probe",
    "nearest_class_mean",
    "relearn_steps",
    "run_audits",
]
