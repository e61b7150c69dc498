"""Permeability: the settings of how far an adapter opens for a text. gates.py holds the rule.

SPM, Lyu et al. 2024 (arXiv 2312.16145), section 3.3.
"""

from dataclasses import dataclass

from ..errors import ErasureError

AUTOMATIC, FIXED, TRANSPORT, REFERENCE, ROUTE, MEANING = MODES = (
    "automatic",
    "fixed",
    "facilitated transport",
    "reference",
    "route",
    "meaning",
)
SAME, OWN, OFF = NEGATIVES = ("same as positive", "own", "off")


@dataclass(frozen=True)
class Permeability:
    """How an adapter opens.

    mode: "fixed", always by `factor`; "facilitated transport", by factor * (how well the text matches the
    adapter's concepts), the paper's linear rule; "reference", as the published code combines adapters: squared
    and with cross terms; "route", like facilitated transport but only the top_k best matches of the stack open;
    "meaning", by what the adapter's probes say of the vectors that the model reads, see probe.py;
    "automatic", facilitated transport for SPM adapters and fixed for all others, as each was published.
    threshold: matches below it leave the adapter closed. negative: what the negative prompt gets, the positive
    prompt's value (as published), a value of its own, or none.
    """

    mode: str = AUTOMATIC
    factor: float = 1.0
    threshold: float = 0.0
    negative: str = SAME
    top_k: int = 1

    def __post_init__(self):
        for name, value, known in (("mode", self.mode, MODES), ("negative", self.negative, NEGATIVES)):
            if value not in known:
                raise ErasureError(
                    f'The permeability has the {name} "{value}"; expected one of {", ".join(known)}, choose one.'
                )
        for name in ("factor", "threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
                raise ErasureError(f"The permeability has the {name} {value!r}; expected a finite number.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise ErasureError(f"The permeability has top_k {self.top_k!r}; expected a whole number of at least 1.")

    def mode_for(self, adapter):
        """The mode an adapter gets: what "automatic" stands for, else the mode itself."""
        if self.mode != AUTOMATIC:
            return self.mode
        return TRANSPORT if adapter.card.method == "SPM" and adapter.card.concepts else FIXED
