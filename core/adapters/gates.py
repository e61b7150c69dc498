"""The gates of a stack, and the one rule for their values: patches, previews, the page and attacks all read it.

A gate's value is strength x factor x match: Facilitated Transport of SPM, Lyu et al. 2024, section 3.3, with the
choices that Permeability holds.
"""

import re
from dataclasses import dataclass

import torch

from ..errors import ErasureError
from .permeability import FIXED, OFF, ROUTE, SAME, Permeability

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Gate:
    """What opens together: an entry of a stack, or one concept of its text maps.

    entry: number of the entry in its stack; label: for people. concepts: places in the names of what texts are compared
    with, of which the best match counts. strength: factor of its value; mode: any but "automatic"; permeability: the
    other settings; start_percent, end_percent: when it acts.
    """

    concepts: tuple[int, ...]
    strength: float
    mode: str
    permeability: Permeability
    start_percent: float = 0.0
    end_percent: float = 1.0
    entry: int = 0
    label: str = ""

    @property
    def always(self):
        """True when it acts in every step."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0

    @property
    def reads_text(self):
        """True when its value depends on the text."""
        return self.mode != FIXED


def gated(entry):
    """True when an entry's effect depends on the text, the step or the side of the guidance."""
    return entry.mode != FIXED or not entry.always or entry.permeability.negative == OFF


def wanted_concepts(stack):
    """The concepts that the gates of a stack compare texts with, each once, in order."""
    acting = (e for e in stack.entries if e.acts and e.mode != FIXED)
    return tuple(dict.fromkeys(concept for entry in acting for concept in entry.adapter.card.concepts))


def gates_of(stack, names=()):
    """The Gates of everything in a stack that acts, entry by entry: one for each concept of a text map that follows the
    text, and one for the rest of the adapter.

    names: what texts are compared with, at least wanted_concepts(stack).
    """
    place = {name: i for i, name in enumerate(names)}
    gates = []
    for number, entry in enumerate(stack.entries):
        if not entry.acts:
            continue
        for concepts, label in _pieces(entry):
            gates.append(
                Gate(
                    tuple(place[name] for name in concepts),
                    entry.strength,
                    entry.mode,
                    entry.permeability,
                    entry.start_percent,
                    entry.end_percent,
                    number,
                    label,
                )
            )
    return tuple(gates)


def _pieces(entry):
    """(concepts, label) of the gates of one entry."""
    adapter, label = entry.adapter, entry.adapter.describe()
    own = adapter.card.concepts
    if entry.mode == FIXED:
        return [((), label)]
    pieces = [((name,), f"{label} ({name})" if len(own) > 1 else label) for name in own] if adapter.maps else []
    if (adapter.of_layers or not pieces) and (own, label) not in pieces:
        pieces.append((own, label))
    return pieces


def gate_values(gates, score):
    """Values (rows, K) of K gates; score: (rows, C) matches of texts with the concepts, or None when none is needed.

    With s the gate's strength, f the factor and m the best match of its concepts: s f when fixed, else s f m
    where m reaches the threshold and, when routed, is among the top_k of all routed gates; else 0.
    """
    rows = 1 if score is None else len(score)
    values = torch.zeros(rows, len(gates))
    best = torch.full((rows, len(gates)), -torch.inf)
    for k, gate in enumerate(gates):
        if gate.reads_text:
            best[:, k] = score[:, list(gate.concepts)].amax(dim=1)
    routed = [k for k, gate in enumerate(gates) if gate.mode == ROUTE]
    place = torch.zeros_like(best, dtype=torch.long)
    if routed:
        order = best[:, routed].argsort(dim=1, descending=True, stable=True)
        place[:, routed] = order.argsort(dim=1)
    for k, gate in enumerate(gates):
        settings = gate.permeability
        value = gate.strength * settings.factor
        if not gate.reads_text:
            values[:, k] = value
            continue
        opens = best[:, k] >= settings.threshold
        if gate.mode == ROUTE:
            opens &= place[:, k] < settings.top_k
        values[:, k] = torch.where(opens, value * best[:, k], 0.0)
    return values


def of_negative(gates, own, positive):
    """Values (rows, K) for a negative prompt: the positive prompt's, its own or none, as each gate says.

    own: what its own text gives; positive: the values of the positive prompts, None while they are not known.
    """
    if positive is not None and len(positive) != len(own):
        rows = max(len(positive), len(own))
        positive, own = (x.repeat(-(-rows // len(x)), 1)[:rows] for x in (positive, own))
    values = own.clone()
    for k, gate in enumerate(gates):
        if gate.permeability.negative == OFF:
            values[:, k] = 0.0
        elif gate.permeability.negative == SAME and positive is not None:
            values[:, k] = positive[:, k]
    return values


def stronger(x, y):
    """The value further from 0 of two (rows, K): of several positive prompts the one that opens most counts."""
    if len(x) != len(y):
        x, y = x[x.abs().argmax(dim=0), range(x.shape[1])][None], y[y.abs().argmax(dim=0), range(y.shape[1])][None]
    return torch.where(x.abs() >= y.abs(), x, y)


def by_entry(gates, values):
    """{number of an entry: the value furthest from 0 of its gates and rows}; values: (rows, K)."""
    found = {}
    for gate, column in zip(gates, values.T.tolist()):
        found[gate.entry] = max([found.get(gate.entry, 0.0), *column], key=abs)
    return found


# ---------------------------------------------------------------- looked at before any sampling


@dataclass(frozen=True)
class Opening:
    """One prompt, one gate's label, and the gate's value, strength included."""

    prompt: str
    adapter: str
    value: float


def openings(stack, prompts, score, names=()):
    """Openings of a stack for prompts, prompt by prompt in the order of the stack.

    score: (prompts, C) matches with the names, None when no gate follows the text. Time ranges do not count. Raises
    ErasureError for a stack in which nothing acts.
    """
    gates = gates_of(stack, names)
    if not gates:
        raise ErasureError("No adapter of the stack acts; switch one on or give it a strength other than 0.")
    values = gate_values(gates, score).expand(len(prompts), -1).tolist()
    return [Opening(prompt, gate.label, v) for prompt, row in zip(prompts, values) for gate, v in zip(gates, row)]


def openings_report(found):
    """The openings as text: each prompt, below it its adapters."""
    width = max(len(opening.adapter) for opening in found)
    lines, before = [], None
    for opening in found:
        if opening.prompt != before:
            lines.append(opening.prompt)
            before = opening.prompt
        lines.append(f"  {opening.adapter:{width}}  {opening.value:6.3f}")
    return "\n".join(lines)


def openings_by_words(stack, text):
    """{number of an entry: its opening} as far as the words of a prompt tell, without a text encoder."""
    names = wanted_concepts(stack)
    gates = gates_of(stack, names)
    return by_entry(gates, gate_values(gates, shared_words(names, text) if names else None))


def shared_words(names, text):
    """The share of each concept's distinct words that a text has, (1, C) float32.

    It stands in for the token overlap of Facilitated Transport (eq. 11) where no text encoder is loaded; the cosine of
    the two texts, which counts when it is larger, is not known then.
    """
    found = _words(text)
    own = [_words(name) for name in names]
    return torch.tensor([[len(words & found) / len(words) if words else 0.0 for words in own]])


def _words(text):
    return set(WORD.findall(text.lower()))
