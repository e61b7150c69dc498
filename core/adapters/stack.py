"""The erasure stack: which adapters act, how strongly, and when. Plain data."""

from dataclasses import dataclass, replace

from ..errors import ErasureError
from .adapter import ErasureAdapter
from .permeability import FIXED, Permeability

STRONGEST = 1000  # times an erasure as published; beyond it half precision overflows


@dataclass(frozen=True)
class Entry:
    """One adapter of a stack.

    strength: factor of its deltas, at most STRONGEST; start_percent, end_percent: the part of the
    sampling it acts in, as the host's conditioning time ranges (0 is the first step, 1 the last);
    permeability: how far it opens for a text; enabled: False keeps the entry without its effect.
    """

    adapter: ErasureAdapter
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    permeability: Permeability = Permeability()
    enabled: bool = True

    def __post_init__(self):
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise ErasureError(
                f"The adapter {self.adapter.describe()} is to act from {self.start_percent:g} to {self.end_percent:g} "
                "of the sampling; expected 0 <= start <= end <= 1, set start_percent and end_percent accordingly."
            )
        if self.mode != FIXED and not self.adapter.card.concepts:
            raise ErasureError(
                f"The adapter {self.adapter.describe()} does not say which concepts it erases, so its permeability "
                f'cannot follow the text; set the permeability to "{FIXED}".'
            )
        if not abs(self.strength) * max(1.0, abs(self.permeability.factor)) <= STRONGEST:
            raise ErasureError(
                f"The adapter {self.adapter.describe()} has the strength {self.strength} and the factor "
                f"{self.permeability.factor}; expected their product, a finite number, to be at most {STRONGEST}."
            )

    @property
    def mode(self):
        """Mode of its permeability; never "automatic"."""
        return self.permeability.mode_for(self.adapter)

    @property
    def acts(self):
        """False when the entry changes nothing."""
        within = self.start_percent < 1.0 and self.end_percent > 0.0
        return self.enabled and self.strength != 0 and self.permeability.factor != 0 and within

    @property
    def always(self):
        """True when the entry acts in every step."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0


@dataclass(frozen=True)
class ErasureStack:
    """Any number of entries; their order does not matter, additive deltas commute."""

    entries: tuple[Entry, ...] = ()

    def __add__(self, other):
        return ErasureStack(self.entries + other.entries)

    def with_entry(self, entry):
        """A new stack with one more entry."""
        return ErasureStack((*self.entries, entry))

    def with_permeability(self, permeability):
        """A new stack whose entries all open in the given way."""
        return ErasureStack(tuple(replace(entry, permeability=permeability) for entry in self.entries))
