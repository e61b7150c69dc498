"""The records: what an erasure adapter is. Plain data, never touches a model."""

from dataclasses import dataclass, field

from .deltas import low_rank, mask, neurons, text_map, text_rows  # noqa: F401  they register the kinds
from .deltas.delta import KINDS, Delta
from .probe import Probe


@dataclass(frozen=True)
class Card:
    """What an adapter says about itself; goes into the file's metadata."""

    method: str
    concepts: tuple[str, ...]
    surrogates: tuple[str, ...] = ()
    family: str = ""
    text_encoder: str = ""  # fingerprint of the encoder the map was computed with, "" when unknown
    settings: dict = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True, eq=False)
class ErasureAdapter:
    """One erasure: its card and its deltas.

    deltas: {kind: {place: delta}}, kinds that hold nothing left out. The place of a text map is the name of a text
    entry, "text" for the main one; that of all others is a site in the spelling of core/families/sites.py, whatever
    the file's was. name: of the file it was loaded from, "" when it was computed in the graph. layer_probes: {text
    entry: Probes} of one that changes layers; those of text maps are with the maps.
    """

    card: Card
    deltas: dict[str, dict[str, Delta]] = field(default_factory=dict)
    name: str = ""
    layer_probes: dict[str, tuple[Probe, ...]] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "deltas", {kind: places for kind, places in self.deltas.items() if places})

    @property
    def maps(self):
        """{entry: TextMap}."""
        return self.deltas.get("map", {})

    @property
    def probes(self):
        """{text entry: Probes}, those of its text maps and its own, entries without any left out."""
        found = dict(self.layer_probes)
        for entry, mapped in self.maps.items():
            found[entry] = (*found.get(entry, ()), *mapped.probes)
        return {entry: probes for entry, probes in found.items() if probes}

    @property
    def probed(self):
        """Whether its probes tell the texts of every concept from others, so that it can follow their meaning."""
        own = {probe.concept for found in self.probes.values() for probe in found}
        return bool(own) and own == set(range(len(self.card.concepts)))

    @property
    def low_rank(self):
        """{site: LowRank}."""
        return self.deltas.get("low_rank", {})

    @property
    def masks(self):
        """{site: Mask}."""
        return self.deltas.get("mask", {})

    @property
    def of_layers(self):
        """(kind, site, delta) of everything that changes layers."""
        return tuple(
            (kind, site, delta)
            for kind, places in self.deltas.items()
            if not KINDS[kind].of_text
            for site, delta in places.items()
        )

    @property
    def sites(self):
        """The layers it changes, each once, in order."""
        return tuple(dict.fromkeys(site for _, site, _ in self.of_layers))

    def describe(self):
        """One line for messages: the file, the concepts or the method."""
        return self.name or ", ".join(self.card.concepts) or self.card.method
