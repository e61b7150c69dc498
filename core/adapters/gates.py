"""The gates of a stack, and the one rule for their values: patches, previews, the page and attacks all read it.

A gate's value is strength x factor x match: Facilitated Transport of SPM, Lyu et al. 2024, section 3.3, with the
choices that Permeability holds.
"""

import re
from dataclasses import dataclass

import torch

from ..errors import ErasureError
from .permeability import FIXED, MEANING, OFF, ROUTE, SAME, Permeability

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
    acting = (e for e in stack.entries if e.acts and e.mode not in (FIXED, MEANING))
    return tuple(dict.fromkeys(concept for entry in acting for concept in entry.adapter.card.concepts))


def follow_meaning(stack):
    """(number of an entry, its concept's index) of what in a stack opens by probes, in the order of columns()."""
    return tuple(
        (number, index)
        for number, entry in enumerate(stack.entries)
        if entry.acts and entry.mode == MEANING
        for index in range(len(entry.adapter.card.concepts))
    )


def columns(stack, names):
    """{number of an entry that follows the text: the column of each of its concepts} in the matches of texts.

    One column for each of the names that texts are compared with, then one for each of follow_meaning().
    """
    place = {name: i for i, name in enumerate(names)}
    found = {}
    for number, entry in enumerate(stack.entries):
        if entry.acts and entry.mode not in (FIXED, MEANING):
            found[number] = tuple(place[name] for name in entry.adapter.card.concepts)
    for column, (number, _) in enumerate(follow_meaning(stack), len(names)):
        found[number] = (*found.get(number, ()), column)
    return found


def meanings(stack, texts):
    """(rows, P) matches of texts by the probes of a stack, in the order of follow_meaning(); None where P is 0.

    texts: {text entry: (rows, T, d)} as the model reads them, without those that a conditioning does not have. Of
    probes of several entries the best match counts. Raises ErasureError for an adapter without probes.
    """
    wanted = follow_meaning(stack)
    rows, found = max((len(text) for text in texts.values()), default=1), []
    for number, index in wanted:
        adapter, best = stack.entries[number].adapter, torch.zeros(rows)
        require_probes(adapter)
        for name, probes in adapter.probes.items():
            text = texts.get(name)
            for probe in () if text is None else probes:
                if probe.concept == index and text.shape[-1] == len(probe.vector):
                    best = torch.maximum(best, probe.match(text).cpu())
        found.append(best)
    return torch.stack(found, dim=1) if wanted else None


def side_by_side(score, meaning):
    """(rows, C + P) of matches (rows, C) with names and meanings (rows, P); either may be None, and both."""
    if score is None or meaning is None:
        return meaning if score is None else score
    rows = max(len(score), len(meaning))
    return torch.cat([score.expand(rows, -1), meaning.expand(rows, -1)], dim=1)


def require_probes(adapter):
    """Raises ErasureError for an adapter that cannot follow the meaning of a text."""
    if not adapter.probed:
        remedy = "connect clip (and the model to Preview Permeability), so that they can be computed"
        if adapter.maps:
            remedy = "compute it again with Erase Concepts and captions"
        raise ErasureError(
            f"The adapter {adapter.describe()} has no probe for each of its concepts, by which its permeability could "
            f'follow the meaning of a text; {remedy}, or set the permeability to "facilitated transport".'
        )


def gates_of(stack, names=()):
    """The Gates of everything in a stack that acts, entry by entry: one for each concept of a text map that follows the
    text, and one for the rest of the adapter.

    names: what texts are compared with, at least wanted_concepts(stack).
    """
    places = columns(stack, names)
    gates = []
    for number, entry in enumerate(stack.entries):
        if not entry.acts:
            continue
        for concepts, label in _pieces(entry):
            gates.append(
                Gate(
                    tuple(places[number][i] for i in concepts),
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
    """(indices of concepts, label) of the gates of one entry."""
    adapter, label = entry.adapter, entry.adapter.describe()
    names = adapter.card.concepts
    own = tuple(range(len(names)))
    if entry.mode == FIXED:
        return [((), label)]
    pieces = [((i,), f"{label} ({names[i]})" if len(own) > 1 else label) for i in own] if adapter.maps else []
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


def responses_report(stack, prompts, texts):
    """What the gates that follow meaning are made of, as text; "" where there are none.

    texts: {text entry: (1, T, d)} of each prompt.
    """
    wanted = follow_meaning(stack)
    if not wanted:
        return ""
    lines = [
        "How prompts respond: r is the largest cosine of what the model reads with the probe of the concept; up to low",
        "the gate is closed, from high on it is open. Of several text entries the one that opens further counts.",
    ]
    for prompt, text in zip(prompts, texts):
        lines.append(prompt)
        for number, index in wanted:
            adapter = stack.entries[number].adapter
            for name, probes in adapter.probes.items():
                for probe in probes:
                    if probe.concept == index and name in text:
                        lines.append(_response_line(adapter.card.concepts[index], name, probe, text[name]))
    return "\n".join(lines)


def _response_line(concept, entry, probe, text):
    r, match = probe.response(text)[0], probe.match(text)[0]
    return f"  {concept}, {entry}: r {r:6.3f}  low {probe.low:6.3f}  high {probe.high:6.3f}  match {match:5.3f}"


def openings_by_words(stack, text):
    """{number of an entry: its opening} as far as the words of a prompt tell, without a text encoder."""
    names = wanted_concepts(stack)
    gates = gates_of(stack, names)
    probed = [stack.entries[number].adapter.card.concepts[index] for number, index in follow_meaning(stack)]
    compared = (*names, *probed)
    return by_entry(gates, gate_values(gates, shared_words(compared, text) if compared else None))


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
