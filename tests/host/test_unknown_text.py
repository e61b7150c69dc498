"""Gates beside encoders of other packs: what is in use is never forgotten, and what is not known opens and says so."""

import pytest
import torch
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.host.patches.stack import applied, apply_stack
from membrane.core.host.text import known_tokens
from membrane.core.host.text.encode import encode
from membrane.core.host.text.known_tokens import PROMPTS, Prompts, watch
from membrane.core.text.similarity import matches

STAR, HEART = "a red star on snow", "a blue heart on sand"
SHAPES, COLOURS, GROUNDS = ("star", "heart", "moon", "ring"), ("red", "blue", "green"), ("snow", "sand", "coal")


@pytest.fixture(scope="module")
def erased(demo, random_adapter):
    """A MODEL with an erasure of the star that follows the text."""
    entry = Entry(random_adapter(1, "star"), permeability=Permeability("facilitated transport"))
    return apply_stack(demo[0], ErasureStack((entry,)), demo[1])


@pytest.fixture
def gate(erased):
    """gate(vectors) -> the value that the sampler gets for one conditioning."""
    return lambda vectors: applied(erased).gates(vectors, "positive", None).item()


@pytest.fixture
def previewed(erased, demo):
    """previewed(prompt) -> the same as Preview Permeability computes it."""
    return lambda prompt: matches(applied(erased).plan.concepts, encode(demo[1], [prompt])).item()


FOREIGN = {
    "scaled": lambda star, heart: star * 1.05,
    "averaged": lambda star, heart: 0.6 * star + 0.4 * heart,
    "a weighted token": lambda star, heart: torch.cat([star[:, :3] * 1.3, star[:, 3:]], dim=1),
    "a part of it averaged": lambda star, heart: torch.cat([heart, (star + heart) / 2], dim=1),
    "cut": lambda star, heart: star[:, :20],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_known_opens_and_says_so_once(kind, gate, text, caplog):
    vectors = FOREIGN[kind](text(STAR)[0][0], text(HEART)[0][0])
    PROMPTS.told = False
    with caplog.at_level("WARNING", logger="membrane"):
        assert gate(vectors) == 1.0
        assert gate(vectors * 1.01) == 1.0
    assert caplog.text.count("the words of a conditioning are not known") == 1
    assert "open for it" in caplog.text


def test_what_is_known_keeps_its_own_value(gate, text, caplog):
    """Half precision, and conditionings that are joined or repeated."""
    star, heart = text(STAR)[0][0], text(HEART)[0][0]
    PROMPTS.told = False
    with caplog.at_level("WARNING", logger="membrane"):
        closed = gate(heart)
        assert closed < 0.5 and gate(star) == 1.0
        for kind in (torch.float16, torch.bfloat16):
            assert gate(star.to(kind)) == 1.0 and gate(heart.to(kind)) == pytest.approx(closed, abs=0.01)
        assert gate(torch.cat([heart, star], dim=1)) == 1.0
        assert gate(torch.cat([heart, heart], dim=1)) == pytest.approx(closed, abs=1e-5)
        assert gate(torch.zeros_like(star)) == 0.0
    assert not caplog.text


def test_a_switched_off_memory_goes_by_the_cosine(gate, text, monkeypatch):
    monkeypatch.setenv(known_tokens.SWITCH, "off")
    assert 0 < gate(text(STAR)[0][0] * 1.05) < 0.9


@pytest.mark.parametrize(
    "tokens",
    [{"l": [([49406, 320, 49407], [1.0, 1.0, 1.0])]}, {"l": [[([5, 6], 1.0), ([7], 1.0)]]}, 
     {"input_ids": torch.ones(1, 3)}, {"l": [[1, 2, 3]]}, {"l": [[]]}, {}, {"lm_metadata": {"a": 1}}],
)  # fmt: skip
def test_tokens_of_other_forms_are_not_known_and_nothing_fails(tokens):
    """As other packs' tokenizers make them; an empty set of tokens would be a text that has no concept."""

    class Clip:
        def encode_from_tokens(self, tokens):
            return torch.ones(1, 3, 4)

    prompts = Prompts()
    prompts.want()
    watch(Clip, prompts)
    found = Clip().encode_from_tokens(tokens)
    assert prompts.recall(found) == [None]


def test_a_word_for_the_second_encoder_counts():
    """SDXL's two encoders may be told different texts; both have the vocabulary of CLIP."""
    prompts, vectors = Prompts(), torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
    contexts = {"g": [[(1, 1.0), (5, 1.0), (2, 1.0), (0, 1.0)]], "l": [[(1, 1.0), (7, 1.0), (2, 1.0), (2, 1.0)]]}
    prompts.remember(contexts, vectors)
    assert prompts.recall(vectors) == [frozenset({0, 1, 2, 5, 7})]
    prompts.wanted = True
    assert prompts.ends(vectors) == [[(4, 2)]]


def test_embeddings_are_told_from_each_other(demo):
    """A concept that is an embedding matches the prompts that have it, in the preview and while sampling."""
    from membrane.core.host.text.tokens import ids_of

    g = torch.Generator().manual_seed(2)
    mine, other = torch.randn(8, generator=g), torch.randn(8, generator=g)
    ids = ids_of([[(1, 1.0), (mine, 1.0), (mine.clone(), 1.2), (mine.half().float(), 1.0), (other, 1.0)]])
    assert ids[0] == 1 and len(set(ids[1:4])) == 1 and ids[4] != ids[1] and max(ids[1:]) < -1
    prompts, vectors = Prompts(), torch.randn(1, 3, 6, generator=g)
    prompts.want()
    prompts.remember({"l": [[(1, 1.0), (mine, 1.0), (2, 1.0)]]}, vectors)
    assert prompts.recall(vectors) == [frozenset({1, ids[1], 2})]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_prompts_of_several_contexts_beside_another_encoder_are_known(count):
    """Flux and Stable Diffusion 3: the rows of T5 need be no multiple of CLIP's contexts."""
    prompts, vectors = Prompts(), torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(4))
    prompts.want()
    words = [5 + i for i in range(count)]
    prompts.remember({"l": [[(1, 1.0), (word, 1.0), (2, 1.0)] for word in words], "t5xxl": [[(9, 1.0)] * 8]}, vectors)
    assert {*words} <= prompts.recall(vectors)[0]


def test_a_prompt_in_use_is_noted_before_anybody_asks():
    """A gate that is put on a model after thousands of prompts still knows the one that was encoded first."""
    prompts, tokens = Prompts(limit=20), {"l": [[(1, 1.0), (5, 1.0), (2, 1.0)]]}
    fixed = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    prompts.note(tokens, fixed)
    for seed in range(1, 300):
        prompts.note(tokens, torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)))
    assert len(prompts.noted) <= 21
    assert prompts.recall(fixed) == [frozenset({1, 5, 2})]


def test_five_thousand_wildcard_prompts(gate, previewed, text, demo, node):
    """The gate of a prompt that is in use is at the end as at the start, and as previewed; the memory stays flat."""
    fixed, before = text(STAR)[0][0], gate(text(STAR)[0][0])
    assert before == previewed(STAR) == 1.0
    assert gate(text(HEART)[0][0]) == pytest.approx(previewed(HEART), abs=1e-5)
    sizes = []
    for i in range(5000):
        words = SHAPES[i % 4], COLOURS[i % 3], GROUNDS[i // 12 % 3]
        # vectors of its own for each prompt, as of a wildcard; the encoder is not asked 5,000 times
        tokens = demo[1].tokenize("a {} {} on {}".format(*words[1::-1], words[2]))
        PROMPTS.note(tokens, fixed + (i + 1) * 1e-2, demo[1].tokenizer)
        if i % 1000 == 999:
            sizes.append(len(PROMPTS.known))
    assert gate(fixed) == before
    encode(demo[1], [f"a star and {i} hearts" for i in range(40)])
    assert gate(fixed) == before == previewed(STAR)
    assert sizes[-1] <= 2 * (PROMPTS.limit + 100) and PROMPTS.noted == []
