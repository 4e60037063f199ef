"""What a method says about itself: how it is called, configured, what samples it reads, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from expunge.errors import InputError
from expunge.journal import Journal
from expunge.processes import alike
from expunge.randomness import check_seed
from expunge.schema import Split

READS = ("retain", "forget", "nothing")
"""What samples may change a method's weights: of retained classes, of classes to forget, or none at all."""


@dataclass(frozen=True)
class Method:
    """An unlearning method, called as `method(model, split, config, *, seed, journal)`.

    Each method file ends with its own: `METHOD = Method(...)`.
    """

    name: str  # as on the command line and in records
    run: Callable[..., nn.Module]  # (model, split, config, *, seed, journal) -> a new model in eval mode
    config: type[Any]  # frozen dataclass of its hyper-parameters; `config()` is the default
    presets: Mapping[str, Callable[[], Any]]  # makers of a config by name; "default" among them
    reads: frozenset[str]  # of READS; "nothing" stands alone
    source: str  # paper, with arXiv number
    # what tuning may try: values of settings, named as `--set` names them; the source stands beside. Empty: nothing
    space: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.reads or not self.reads <= set(READS) or ("nothing" in self.reads and len(self.reads) > 1):
            raise InputError(f"method {self.name}: expected reads of {READS}, nothing alone, got {sorted(self.reads)}")
        if "default" not in self.presets:
            raise InputError(f"method {self.name}: expected a preset called default, got {sorted(self.presets)}")

    @property
    def zero_glance(self) -> bool:
        """Whether the method never sees a sample of the classes to forget."""
        return "forget" not in self.reads

    def view(self, split: Split) -> Split:
        """Return the part of a split that this method may see: never its test samples."""
        return split.zero_glance() if self.zero_glance else replace(split, test=None)

    def __call__(
        self, model: nn.Module, split: Split, config: Any = None, *, seed: int, journal: Journal | None = None
    ) -> nn.Module:
        """Return an unlearned copy of `model`, in eval mode; see the function itself, `run`."""
        check_seed(seed)
        return alike(self.run(model, split, config, seed=seed, journal=journal))
