"""From a stack to what a model gets: the cheapest exact realisation, never a different result."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from ..errors import ErasureError
from ..families.family import ALL
from ..families.table import FAMILIES
from ..text.similarity import Concepts
from .deltas import low_rank, mask, text_map
from .deltas.delta import OPEN, Term
from .gates import columns, gated, gates_of, require_probes
from .permeability import MEANING, REFERENCE
from .written import require_computed


class LayerPlan:
    """What one layer of a model gets of the Terms of its site; put together when it is asked for.

    key: the host's, for messages. text_rows: TextRows of the layer, needed for changes of the text's rows alone; of
    such a layer that sees the text alone these are changes like any other.
    """

    def __init__(self, terms, key, text_rows=None):
        self.key, self.text_rows = key, text_rows
        found = [(term, term.delta.low_rank()) for term in terms]
        changes = [
            term if change is term.delta else replace(term, delta=change)
            for term, change in found
            if change is not None
        ]
        shared = text_rows is not None and text_rows.place != ALL
        self._on_text = [term for term in changes if term.delta.on_text and shared]
        whole = [term for term in changes if not (term.delta.on_text and shared)]
        self._static = [term for term in whole if term.gate == OPEN]
        self._gated = [term for term in whole if term.gate != OPEN]
        others = [term for term, change in found if change is None]
        self.on_weight = mask.joined(sorted(others, key=lambda term: term.delta.last))

    @cached_property
    def static(self):
        """LowRank for the host's own patch list, the same for every text and step; or None."""
        return low_rank.join(self._static)

    @cached_property
    def beside(self):
        """Factors that run beside the layer, with gates; or None."""
        return low_rank.beside(self._gated, self.key)

    @cached_property
    def beside_text(self):
        """Factors that run beside the layer for the text's rows alone, with gates or open; or None."""
        return low_rank.beside(self._on_text, self.key)

    @property
    def tells_rows(self):
        """True when it needs to know which rows are the text's."""
        return bool(self._on_text)

    @property
    def runs(self):
        """True when something runs beside the layer or changes its weight while it runs."""
        return bool(self._gated) or bool(self._on_text) or bool(self.on_weight)

    @property
    def follows(self):
        """True when it needs gates."""
        return bool(self._gated) or any(term.gate != OPEN for term in (*self._on_text, *self.on_weight))


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model gets of a stack.

    gates: of everything that acts, () when nothing is gated; concepts: what they compare texts with, or None. maps:
    {text entry: TextPart}. layers: {key of the host: LayerPlan}.
    """

    gates: tuple = ()
    concepts: Concepts | None = None
    maps: dict = field(default_factory=dict)
    layers: dict = field(default_factory=dict)

    def __bool__(self):
        return bool(self.maps) or bool(self.layers)

    @property
    def static(self):
        """{key: LowRank} for the host's own patch list."""
        return {key: layer.static for key, layer in self.layers.items() if layer.static is not None}

    @property
    def running(self):
        """{key: LayerPlan} of the layers that something runs beside or inside of."""
        return {key: layer for key, layer in self.layers.items() if layer.runs}

    def timed(self, entry):
        """True when the text of an entry changes from step to step; every delta must see the unedited text, so all of
        the entry's act there."""
        part = self.maps.get(entry)
        return part is not None and any(not self.gates[k].always for k in part.gate.tolist() if k != OPEN)

    @property
    def follows(self):
        """True when some layer needs gates."""
        return any(layer.follows for layer in self.layers.values())

    @property
    def tells_rows(self):
        """True when some layer needs to know which rows are the text's."""
        return any(layer.tells_rows for layer in self.layers.values())


def make_plan(
    stack, entries=MappingProxyType({}), concepts=None, keys=MappingProxyType({}), text_rows=lambda key: None
):
    """Plan of what a stack does while a model runs.

    entries: {TextEntry: width or None} of the model, a map of another entry is left out. concepts: Concepts with all
    wanted_concepts(stack). keys: {site: key of the model's layer}; sites without one are left out.
    text_rows(key): TextRows of a layer, None where nothing is known of its rows.

    Raises ErasureError when a text map was made for another width, adapters that are to be combined as the published
    code does differ in rank, or one changes the text's rows of a layer of which they are not known.
    """
    require_computed(stack)
    names = concepts.names if concepts else ()
    gates, own_columns = gates_of(stack, names), columns(stack, names)
    place = {(gate.entry, gate.concepts): k for k, gate in enumerate(gates)}
    known = {entry.name: entry for entry in entries}
    maps, layers = {}, {}
    for number, entry in enumerate(stack.entries):
        adapter = entry.adapter
        require_entries(adapter, entries)
        if not entry.acts:
            continue
        if entry.mode == MEANING:
            require_probes(adapter)
        own = own_columns.get(number, ())
        for name, delta in adapter.maps.items():
            once = name in known and known[name].pooled  # a model reads it once for all steps
            if name in known and (entry.always or not once):
                maps.setdefault(name, []).append(_of_text(entry, number, own, delta, place))
        for _, site, delta in adapter.of_layers:
            if site in keys:
                _require_text_rows(adapter, site, delta, text_rows(keys[site]))
                key, delta = low_rank.turned(keys[site], delta)
                term = _of_layer(entry, place[number, own] if gated(entry) else OPEN, delta)
                layers.setdefault(key, []).append(term)
    return Plan(
        gates if any(gated(entry) for entry in stack.entries if entry.acts) else (),
        concepts,
        {name: text_map.join(terms) for name, terms in maps.items()},
        {key: LayerPlan(terms, key, text_rows(key)) for key, terms in layers.items()},
    )


def _encoders(config, name):
    """The encoders whose rows models of a host's configuration read at an entry, none where that is not known."""
    families = (family for family in FAMILIES if config in family.configs)
    return {entry.encoder for family in families for entry in family.entries if entry.name == name and entry.encoder}


def _require_text_rows(adapter, site, delta, found):
    if getattr(delta, "on_text", False) and found is None:
        raise ErasureError(
            f"The adapter {adapter.describe()} changes the text's rows of {site} alone, but which rows of that layer "
            "are the text's is not known for this model; use it on a model of the family it was made for."
        )


def _of_text(entry, number, own, delta, place):
    """Term of a text map: the fixed strength, or a gate for each column, of the concept it belongs to."""
    if not gated(entry):
        return Term(delta, entry.strength * entry.permeability.factor)
    gates = tuple(place[number, own[i : i + 1] if own else ()] for i in delta.concept)
    return Term(delta, gates=gates)


def _of_layer(entry, gate, delta):
    factor = entry.strength * entry.permeability.factor if gate == OPEN else 1.0
    return Term(delta, factor, gate, paired=entry.mode == REFERENCE)


def first_gated(stack):
    """The first entry whose effect depends on the text, the step or the side of the guidance, or None."""
    return next((entry for entry in stack.entries if entry.acts and gated(entry)), None)


def require_entries(adapter, entries):
    """Raises ErasureError when an adapter's text maps do not fit a model's text entries {TextEntry: width or None}."""
    known = {entry.name: entry for entry in entries}
    made_for = f" ({adapter.card.family})" if adapter.card.family else ""
    if adapter.maps and not known.keys() & adapter.maps.keys():
        raise ErasureError(
            f"The adapter {adapter.describe()} maps the text at {', '.join(adapter.maps)}{made_for}, but this model "
            f"reads it at {', '.join(known) or 'no place that a map can act on'}; use an adapter made for this family."
        )
    for name, found in adapter.maps.items():
        if name not in known:
            continue
        entry, width = known[name], entries[known[name]]
        encoders = _encoders(adapter.card.family, name)
        if encoders and entry.encoder and entry.encoder not in encoders:
            raise ErasureError(
                f"The adapter {adapter.describe()} maps rows of {' or '.join(sorted(encoders))}{made_for}, but this "
                f"model reads those of {entry.encoder}; use an adapter made for this family."
            )
        if width is not None and found.width != width:
            raise ErasureError(
                f"The adapter {adapter.describe()} maps text vectors of width {found.width}{made_for}, "
                f"but this model reads vectors of width {width}; use an adapter made for this family."
            )
        if found.normed != bool(entry.norm):
            where = ("before", "after")
            raise ErasureError(
                f"The adapter {adapter.describe()} maps text vectors {where[found.normed]} the norm of the text entry "
                f"{name}{made_for}, but this model needs maps from {where[bool(entry.norm)]} it; use an adapter made "
                "for this family."
            )
