"""The erasure stack: which adapters act, how strongly, and when. Plain data."""

from dataclasses import dataclass

from .adapter import ErasureAdapter
from .errors import ErasureError


@dataclass(frozen=True)
class Entry:
    """One adapter of a stack.

    strength: factor of its deltas, any finite number; start_percent, end_percent: the part of the
    sampling it acts in, as the host's conditioning time ranges (0 is the first step, 1 the last).
    """

    adapter: ErasureAdapter
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise ErasureError(
                f"The adapter {self.adapter.describe()} is to act from {self.start_percent:g} to {self.end_percent:g} "
                "of the sampling; expected 0 <= start <= end <= 1, set start_percent and end_percent accordingly."
            )
        if self.strength != self.strength or abs(self.strength) == float("inf"):
            raise ErasureError(
                f"The adapter {self.adapter.describe()} has the strength {self.strength}; expected a finite number."
            )

    @property
    def acts(self):
        """False when the entry changes nothing."""
        return self.strength != 0 and self.start_percent < 1.0 and self.end_percent > 0.0

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
