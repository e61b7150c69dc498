"""The watch on the host's CLIP: what it keeps, when, and how it is switched off."""

import torch
from membrane.core.host.text import known_tokens
from membrane.core.host.text.encode import encode
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


def test_what_is_in_use_is_not_forgotten():
    """A fixed prompt among thousands of others."""
    prompts = Prompts(limit=20)
    prompts.want()
    fixed = vectors(0)
    prompts.note(TOKENS, fixed)
    for seed in range(1, 200):
        prompts.note(TOKENS, vectors(seed))
    assert prompts.recall(fixed) == [frozenset({1, 5, 6, 2})] and prompts.recall(vectors(1)) == [None]
    assert len(prompts.known) <= 2 * 21  # one of each rounding


def test_what_is_asked_for_is_kept_longest():
    """Nobody holds the vectors any more, but the same ones come back, as from another cache."""
    prompts = Prompts(limit=20)
    prompts.want()
    for seed in range(200):
        prompts.note(TOKENS, vectors(seed))
        assert prompts.recall(vectors(0)) != [None]


def test_what_the_pack_encodes_for_itself_is_not_noted(demo):
    memory = known_tokens.PROMPTS
    memory.want()
    before = len(memory.known)
    encode(demo[1], [f"a star and {i} hearts" for i in range(40)])
    assert len(memory.known) == before and not memory.noted
    with memory.aside():
        memory.note(TOKENS, vectors(1))
    assert len(memory.known) == before


def test_parts_that_are_known_make_a_whole():
    prompts, long = Prompts(), torch.cat([vectors(1), vectors(2)], dim=1)
    prompts.want()
    other = {"l": [[(1, 1.0), (7, 1.0), (2, 1.0)]]}
    short = vectors(3)[:, :3]
    prompts.remember({"l": TOKENS["l"] * 2}, long)
    prompts.remember(other, short)
    for order in ((long, short), (short, long), (short, short, long)):
        whole = torch.cat(order, dim=1)
        assert prompts.recall(whole) == [frozenset({1, 5, 6, 7, 2})]
        assert sum(length for length, _ in prompts.ends(whole)[0]) == whole.shape[1]
    assert prompts.recall(torch.cat([long, short[:, :2]], dim=1)) == [None]


def test_a_method_that_calls_the_other_is_noted_once():
    class Clip:
        def encode_from_tokens(self, tokens):
            return {"cond": vectors(1)}

        def encode_from_tokens_scheduled(self, tokens):
            return [[self.encode_from_tokens(tokens)["cond"], {}]]

    prompts = Prompts()
    watch(Clip, prompts)
    (given, _), *_ = Clip().encode_from_tokens_scheduled(TOKENS)
    assert len(prompts.noted) == 1 and prompts.recall(given) == [frozenset({1, 5, 6, 2})]
