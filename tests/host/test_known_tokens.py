"""The watch on the host's CLIP: what it keeps, when, and how it is switched off."""

import torch
from membrane.core.host.text import known_tokens
from membrane.core.host.text.known_tokens import Prompts, watch

TOKENS = {"l": [[(1, 1.0), (5, 1.0), (6, 1.0), (2, 1.0), (2, 1.0)]]}


def vectors(seed):
    return torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed))


def clip_class():
    class Clip:
        def encode_from_tokens(self, tokens, return_pooled=False):
            return vectors(0)

    return Clip


def test_nothing_is_looked_at_until_somebody_asks(monkeypatch):
    looked = []
    original = known_tokens._key
    monkeypatch.setattr(known_tokens, "_key", lambda x: looked.append(1) or original(x))
    prompts, cls, used = Prompts(), clip_class(), vectors(1)
    watch(cls, prompts)
    given = cls().encode_from_tokens(TOKENS)
    prompts.note(TOKENS, used)
    assert not looked and not prompts.known
    assert prompts.recall(given) == [frozenset({1, 5, 6, 2})] and prompts.ends(given) == [[(5, 3)]]
    assert prompts.recall(used) == [frozenset({1, 5, 6, 2})] and prompts.recall(vectors(2)) == [None]


def test_what_nobody_uses_any_more_is_not_kept():
    prompts = Prompts()
    for seed in range(50):
        prompts.note(TOKENS, vectors(seed))  # gone at once, as what the pack encodes for itself
    prompts.want()
    assert not prompts.known and not prompts.noted


def test_once_somebody_asks_all_is_looked_at_when_it_is_encoded():
    prompts = Prompts(limit=3)
    prompts.want()
    for seed in range(5):
        prompts.note(TOKENS, vectors(seed))
    assert [found is None for found in prompts.recall(torch.cat([vectors(seed) for seed in range(5)]))] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_gate_that_follows_the_text_asks(node, demo):
    """Prompts that were encoded before the stack was applied are known as well as those after it."""
    early = node("CLIPTextEncode", clip=demo[1], text="a yellow moon")[0]
    adapter = node(
        "MembraneErase", model=demo[0], clip=demo[1], concepts="moon -> circle", replace_with="", preserve="",
        method="UCE", strength=1.0,
    )[1]  # fmt: skip
    stack = node("MembraneStack", adapter=adapter, strength=1.0, permeability="facilitated transport")[0]
    node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)
    late = node("CLIPTextEncode", clip=demo[1], text="a yellow ring")[0]
    for found in (early, late):
        assert known_tokens.PROMPTS.recall(found[0][0]) != [None]
    assert known_tokens.PROMPTS.wanted and not known_tokens.PROMPTS.noted


def test_the_memory_can_be_switched_off(monkeypatch):
    cls = clip_class()
    before = cls.encode_from_tokens
    monkeypatch.setenv(known_tokens.SWITCH, "off")
    watch(cls, Prompts())
    assert cls.encode_from_tokens is before
    monkeypatch.delenv(known_tokens.SWITCH)
    watch(cls, Prompts())
    watched = cls.encode_from_tokens
    assert watched is not before
    watch(cls, Prompts())
    assert cls.encode_from_tokens is watched
