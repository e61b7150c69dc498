"""From a stack to what the model gets: the cheapest exact realisation, never a different result."""

from dataclasses import dataclass, replace

import torch

from .errors import ErasureError


@dataclass(frozen=True, eq=False)
class TextPart:
    """Terms of one time range, strengths folded in: c -> c + A (B c) while start <= progress <= end."""

    a: torch.Tensor  # (d, n)
    b: torch.Tensor  # (n, d)
    start_percent: float
    end_percent: float

    def to(self, device):
        """The same part with its factors on a device."""
        return replace(self, a=self.a.to(device), b=self.b.to(device))

    def delta(self, context):
        """A (B c) for text vectors (..., d), computed in float32."""
        c = context.float()
        return (c @ self.b.to(c.device).T) @ self.a.to(c.device).T


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model gets: either `constant`, which acts once per conditioning, or `timed` parts, which act
    in the steps of their range."""

    constant: TextPart | None
    timed: tuple[TextPart, ...]

    def __bool__(self):
        return self.constant is not None or bool(self.timed)


def make_plan(stack, width):
    """Plan of a stack for text vectors of a width.

    Raises ErasureError when an adapter was made for another width. Terms of one time range are joined.
    """
    ranges = {}
    for entry in stack.entries:
        require_width(entry.adapter, width)
        if entry.acts:
            ranges.setdefault((entry.start_percent, entry.end_percent), []).append(entry)
    parts = [
        TextPart(
            torch.cat([e.adapter.text_map.a * e.strength for e in entries], dim=1),
            torch.cat([e.adapter.text_map.b for e in entries]),
            start,
            end,
        )
        for (start, end), entries in sorted(ranges.items())
    ]
    if list(ranges) == [(0.0, 1.0)]:
        return Plan(parts[0], ())
    return Plan(None, tuple(parts))  # every delta must see the unedited text, so all act in the same place


def require_width(adapter, width):
    """Raises ErasureError when an adapter was made for text vectors of another width."""
    found = adapter.text_map.width
    if found != width:
        made_for = f" ({adapter.card.family})" if adapter.card.family else ""
        raise ErasureError(
            f"The adapter {adapter.describe()} maps text vectors of width {found}{made_for}, "
            f"but this model reads vectors of width {width}; use an adapter made for this family."
        )
