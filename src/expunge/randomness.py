"""Random states: all that is drawn comes from a seed, and the caller's state is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from expunge.errors import InputError


def check_seed(seed: int) -> None:
    """Check that all that draws here takes a seed.

    Raises:
        InputError: it is negative.
    """
    if seed < 0:
        raise InputError(f"expected a seed of at least 0, got {seed}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a random state of `seed`, and put the caller's back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # of all devices, so all are forked
        yield


def seed_of(*parts: int) -> int:
    """Return a seed that numbers give together."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
