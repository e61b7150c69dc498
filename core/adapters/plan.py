"""From a stack to what the model gets: the cheapest exact realisation, never a different result."""

from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from ..errors import ErasureError
from .adapter import Mask
from .permeability import FIXED, OFF, REFERENCE, Channel, Concepts

OPEN = -1  # channel of what is not gated


@dataclass(frozen=True, eq=False)
class TextPart:
    """Terms of all text maps, fixed strengths folded in: c -> c + A (g * (B c)), g the value of each term's channel."""

    a: torch.Tensor  # (d, n)
    b: torch.Tensor  # (n, d)
    channel: torch.Tensor  # (n,), OPEN or an index into the plan's channels

    def to(self, device):
        """The same part with its tensors on a device."""
        return replace(self, a=self.a.to(device), b=self.b.to(device), channel=self.channel.to(device))

    def delta(self, context, gates=None):
        """A (g * (B c)) for text vectors (rows, T, d), float32; gates: (rows, K) or (1, K), None without channels."""
        part = self.to(context.device)
        inner = context.float() @ part.b.T
        if gates is not None:
            gates = gates.to(inner)
            columns = torch.cat([gates, gates.new_ones(len(gates), 1)], dim=1)  # OPEN is the last one
            inner = inner * columns[:, part.channel].unsqueeze(1)
        return inner @ part.a.T


@dataclass(frozen=True, eq=False)
class GatedLayer:
    """All gated changes of one layer: y -> y + U (g * (D x)), scales folded into U.

    down: (K, in) or (K, in, height, width); up: (out, K); channel: (K,) indices into the plan's channels. The last
    `paired` columns belong to adapters of equal rank combined as the published SPM code does: the factors of all
    are added, scaled by their gates, before they are multiplied. bias: (out, n) with bias_channel (n,), or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    channel: tuple[int, ...]
    paired: int = 0
    rank: int = 1  # of each paired adapter
    bias: torch.Tensor | None = None
    bias_channel: tuple[int, ...] = ()

    def columns(self, active):
        """The same layer with only the columns of some channels, renumbered by their place in `active`; or None."""
        place = {channel: i for i, channel in enumerate(active)}
        keep = [i for i, channel in enumerate(self.channel) if channel in place]
        keep_bias = [i for i, channel in enumerate(self.bias_channel) if channel in place]
        if not keep and not keep_bias:
            return None
        first_paired = len(self.channel) - self.paired
        return replace(
            self,
            up=self.up[:, keep],
            down=self.down[keep],
            channel=tuple(place[self.channel[i]] for i in keep),
            paired=sum(i >= first_paired for i in keep),
            bias=self.bias[:, keep_bias] if keep_bias else None,
            bias_channel=tuple(place[self.bias_channel[i]] for i in keep_bias),
        )


@dataclass(frozen=True, eq=False)
class Joined:
    """All changes of one layer that are the same for every text and step: up (out, K), down as in LowRank, bias."""

    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Damping:
    """A mask of one layer in a plan: its strength is `factor`, or what its channel's gate says."""

    mask: Mask
    factor: float = 1.0
    channel: int = OPEN


@dataclass(frozen=True, eq=False)
class Plan:
    """What a model gets while it runs. channels: its gates; concepts: what they compare texts with, or None;
    text: what acts on the text, or None, in the conditioning or, when timed, in every step; pooled: the same for the
    pooled vector, always in the conditioning; layers: {key: GatedLayer}; masks: {key: Dampings}, after all else.
    """

    channels: tuple[Channel, ...] = ()
    concepts: Concepts | None = None
    text: TextPart | None = None
    layers: dict = field(default_factory=dict)
    pooled: TextPart | None = None
    masks: dict = field(default_factory=dict)

    def __bool__(self):
        return self.text is not None or self.pooled is not None or bool(self.layers) or bool(self.masks)

    @property
    def timed_text(self):
        """True when the text changes from step to step; every delta must see the unedited text, so all act there."""
        return self.text is not None and any(not self.channels[k].always for k in self.text.channel.tolist() if k >= 0)

    @property
    def in_steps(self):
        """True when the gates are needed in every step."""
        return bool(self.layers) or self.timed_text or any(d.channel != OPEN for m in self.masks.values() for d in m)


def _gated(entry):
    """True when an entry's effect depends on the text, the step or the side of the guidance."""
    return entry.mode != FIXED or not entry.always or entry.permeability.negative == OFF


def wanted_concepts(stack):
    """The concepts that gates of a stack compare texts with, each once, in order."""
    acting = (e for e in stack.entries if e.acts and e.mode != FIXED)
    return tuple(dict.fromkeys(concept for entry in acting for concept in entry.adapter.card.concepts))


def make_plan(stack, width=None, concepts=None, keys=MappingProxyType({})):
    """Plan of what a stack does while the model runs.

    width: of the model's text vectors, None when it reads none. concepts: Concepts with all wanted_concepts(stack).
    keys: {site: key of the model's layer}; sites without one are left out, as by joined().

    Raises ErasureError when a text map was made for another width, or adapters that are to be combined as the
    published code does differ in rank.
    """
    channels, terms, pooled, columns, biases, masks = [], [], [], {}, {}, {}
    place = _places(concepts)

    def channel(entry, names):
        channels.append(_channel(entry, names, place))
        return len(channels) - 1

    for entry in stack.entries:
        adapter = entry.adapter
        if adapter.text_map is not None:
            require_width(adapter, width)
        if not entry.acts:
            continue
        gated = _gated(entry)
        if adapter.text_map is not None:
            terms.append(_terms(entry, adapter.text_map, gated, channel))
        if adapter.pooled_map is not None and entry.always:  # a model reads it once for all steps
            pooled.append(_terms(entry, adapter.pooled_map, gated, channel))
        if not (adapter.low_rank or adapter.masks):
            continue
        k = channel(entry, adapter.card.concepts) if gated else OPEN
        factor = 1.0 if gated else entry.strength * entry.permeability.factor
        for site, mask in adapter.masks.items():
            if site in keys:
                masks.setdefault(keys[site], []).append(Damping(mask, factor, k))
        for site, change in adapter.low_rank.items() if gated else ():
            key = keys.get(site)
            if key is not None:
                columns.setdefault(key, []).append((change, k, entry.mode == REFERENCE))
                if change.bias is not None:
                    biases.setdefault(key, []).append((change.bias, k))
    layers = {key: _layer(key, found, biases.get(key, ())) for key, found in columns.items()}
    return Plan(
        tuple(channels), concepts, _part(terms), layers, _part(pooled), {key: tuple(m) for key, m in masks.items()}
    )


def _part(terms):
    if not terms:
        return None
    a, b, owner = zip(*terms)
    return TextPart(torch.cat(a, dim=1), torch.cat(b), torch.cat(owner))


def _places(concepts):
    return {name: i for i, name in enumerate(concepts.names)} if concepts else {}


def _channel(entry, names, place):
    return Channel(
        tuple(place[name] for name in names) if entry.mode != FIXED else (),
        entry.strength,
        entry.mode,
        entry.permeability,
        entry.start_percent,
        entry.end_percent,
    )


def channels_of(stack, concepts):
    """(names, channels) of everything in a stack that acts, gated or not: each concept of a text map, each adapter
    of layers; concepts as for make_plan()."""
    place, names, channels = _places(concepts), [], []
    for entry in stack.entries:
        if not entry.acts:
            continue
        own, label = entry.adapter.card.concepts, entry.adapter.describe()
        if entry.mode == FIXED or entry.adapter.text_map is None:
            pieces = [(label, own)]
        else:
            pieces = [(f"{label} ({c})" if len(own) > 1 else label, (c,)) for c in own]
        for name, concept in pieces:
            names.append(name)
            channels.append(_channel(entry, concept, place))
    return names, channels


def _terms(entry, text_map, gated, channel):
    """(a, b, channel of each term) of one of an entry's maps; each concept has a channel of its own."""
    names = entry.adapter.card.concepts
    if not gated:
        factor = entry.strength * entry.permeability.factor
        return text_map.a * factor, text_map.b, torch.full((len(text_map.b),), OPEN)
    owners = sorted(set(text_map.concept)) if entry.mode != FIXED else [None]
    numbers = {owner: channel(entry, () if owner is None else (names[owner],)) for owner in owners}
    each = [numbers[owner if entry.mode != FIXED else None] for owner in text_map.concept]
    return text_map.a, text_map.b, torch.tensor(each)


def _flat(change):
    """Factors (out, r) and (r, ...) of a change in float32 without its scale."""
    return change.up.float(), change.down.float()


def _layer(key, found, biases):
    plain = [(change, k) for change, k, paired in found if not paired]
    paired = [(change, k) for change, k, is_paired in found if is_paired]
    ranks = {change.rank for change, _ in paired}
    if len(ranks) > 1:
        raise ErasureError(
            f"The adapters to be combined as in the reference have the ranks {', '.join(map(str, sorted(ranks)))} "
            f'at {key}; expected equal ranks, set the permeability to "facilitated transport".'
        )
    scale = paired[0][0].scale if paired else 1.0  # the published code takes the first file's for all
    factors = [(*_flat(change), change.scale) for change, _ in plain] + [
        (*_flat(change), scale) for change, _ in paired
    ]
    return GatedLayer(
        torch.cat([up * s for up, _, s in factors], dim=1),
        torch.cat([down for _, down, _ in factors]),
        tuple(k for change, k in plain + paired for _ in range(change.rank)),
        sum(change.rank for change, _ in paired),
        ranks.pop() if ranks else 1,
        torch.stack([bias.float() for bias, _ in biases], dim=1) if biases else None,
        tuple(k for _, k in biases),
    )


def joined(stack, keys):
    """{key: Joined} of all low-rank changes of a stack that depend on neither text nor step, one a layer."""
    found = {}
    for entry in stack.entries:
        if entry.acts and not _gated(entry):
            factor = entry.strength * entry.permeability.factor
            for site, change in entry.adapter.low_rank.items():
                if site in keys:
                    found.setdefault(keys[site], []).append((change, factor))
    return {key: _join(changes) for key, changes in found.items()}


def _join(changes):
    biases = [change.bias.float() * factor for change, factor in changes if change.bias is not None]
    return Joined(
        torch.cat([change.up.float() * (change.scale * factor) for change, factor in changes], dim=1),
        torch.cat([change.down.float() for change, _ in changes]),
        sum(biases) if biases else None,
    )


def first_gated(stack):
    """The first entry whose effect depends on the text, the step or the side of the guidance, or None."""
    return next((entry for entry in stack.entries if entry.acts and _gated(entry)), None)


def require_width(adapter, width):
    """Raises ErasureError when an adapter's text map was made for text vectors of another width."""
    found = adapter.text_map.width
    if found != width:
        made_for = f" ({adapter.card.family})" if adapter.card.family else ""
        raise ErasureError(
            f"The adapter {adapter.describe()} maps text vectors of width {found}{made_for}, "
            f"but this model reads vectors of width {width}; use an adapter made for this family."
        )
