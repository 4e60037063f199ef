"""The attacks that ask what an attacker can tell, in the order in which they are run."""

from __future__ import annotations

from expunge.audits.attention import WHERE_IT_LOOKS
from expunge.audits.core import Audit
from expunge.audits.inversion import INVERSION
from expunge.audits.leakage import NEIGHBOUR_LEAKAGE
from expunge.audits.membership import POPULATION_MIA, RMIA

ATTACKS: tuple[Audit, ...] = (POPULATION_MIA, RMIA, NEIGHBOUR_LEAKAGE, INVERSION, WHERE_IT_LOOKS)
"""The two of `ensembles`, U-LiRA and forgetting quality, judge many models and not one: they are not among them."""
