"""Gates of encoders that are not CLIP alone, from a conditioning that reaches the sampler to its match with concepts.

The encoders are the host's own classes at toy size (tools/tiny/encoders.py): random weights say nothing about how near
two meanings are, so what is tested is which rows and words count, and that Preview and sampling agree.
"""

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.host.patches.stack import concepts_for
from membrane.core.host.text import known_tokens as memory
from membrane.core.host.text.encode import encode
from membrane.core.host.text.tokens import Tokenizer
from membrane.core.host.text.vocabulary import EMBEDDINGS, words_near
from membrane.core.text.encoded import END, PADDING, START, WORD
from membrane.tools.tiny import encoders
from membrane.tools.tiny.networks import NotInThisHost

KINDS = ("sd3", "flux", "chroma", "wan", "qwen_image", "z_image", "flux2_klein", "lumina2", "hunyuan_video")

FEW_PIECES = ("wan", "lumina2")  # whose vocabulary is made for the tests and has no STAR


def made(name):
    """CLIP of one of tools/tiny/encoders.py; skips where the host has none."""
    try:
        return encoders.encoder(name)
    except NotInThisHost as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=KINDS)
def clip(request):
    found = made(request.param)
    found.kind = request.param
    return found


def follows(concepts, name=""):
    change = LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)
    return ErasureAdapter(Card("SPM", concepts), {"low_rank": {"mid": change}}, name)


def gates(clip, conditioning, *names):
    """Matches of a CONDITIONING with concepts, as while sampling."""
    concepts = concepts_for(node_stack(*names), clip)
    vectors = conditioning[0][0]
    return concepts.match(vectors, memory.PROMPTS.recall(vectors))[0].tolist()


def node_stack(*names):
    return ErasureStack((Entry(follows(names), permeability=Permeability("facilitated transport")),))


def encoded(node, clip, text):
    return node("CLIPTextEncode", clip=clip, text=text)[0]


LONG = "a red star on snow" + ", a cow and a house" * 60  # 300 words and more


@pytest.mark.parametrize("text", ["a STAR", "two red stars on the sea", "the (star:1.3)", "star", LONG])
def test_a_word_opens_however_it_is_written(node, clip, text):
    if clip.kind in FEW_PIECES:
        text = text.lower()
    assert gates(clip, encoded(node, clip, text), "star") == [1.0]
    stack = node("MembraneStack", adapter=follows(("star",), "star.safetensors"), strength=1.0)[0]
    report = node("MembranePreview", clip=clip, stack=stack, prompts=text)[1]
    assert next(line for line in report.splitlines() if "star.safetensors" in line).endswith(" 1.000")


def test_capitals_do_not_matter(node, clip):
    assert gates(clip, encoded(node, clip, "a small house by Van Gogh"), "van gogh", "VAN") == [1.0, 1.0]
    assert gates(clip, encoded(node, clip, "a small house by van gogh"), "Van Gogh") == [1.0]


def test_preview_and_sampling_agree_and_preview_shows_the_calibration(node, clip):
    prompts = ("a red moon", "a small green heart beside a ring", LONG)
    stack = node("MembraneStack", adapter=follows(("red star",), "star.safetensors"), strength=1.0)[0]
    report = node("MembranePreview", clip=clip, stack=stack, prompts="\n".join(prompts))[1]
    shown = [float(line.split()[-1]) for line in report.splitlines() if "star.safetensors" in line]
    for prompt, value in zip(prompts, shown):
        assert gates(clip, encoded(node, clip, prompt), "red star") == [pytest.approx(value, abs=6e-4)]
    told = [line for line in report.splitlines() if line.startswith("  red star ")]
    assert len(told) == 3 and all({"words", "s", "lo", "hi", "match"} <= set(line.split()) for line in told)
    shares = [float(line.split("words")[1].split()[0]) for line in told]
    assert shares == [0.5, 0.0, 1.0]


def test_joined_and_timed_conditionings_are_known(node, clip):
    star, house = encoded(node, clip, "a red star"), encoded(node, clip, "a big house " * 40)
    for first, second in ((star, house), (house, star)):
        joined = node("ConditioningConcat", conditioning_to=first, conditioning_from=second)[0]
        timed = node("ConditioningSetTimestepRange", conditioning=joined, start=0.2, end=0.8)[0]
        assert gates(clip, timed, "star", "van gogh")[0] == 1.0
        found = memory.PROMPTS.recall(timed[0][0])[0]
        own = [memory.PROMPTS.recall(c[0][0])[0] for c in (first, second)]
        assert found == own[0] | own[1] and {*found.words} == {*own[0].words, *own[1].words, ""}
        length = first[0][0].shape[1]
        assert found.places == (*own[0].places, *(length + i for i in own[1].places))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conditionings_in_half_precision_are_known(node, clip, dtype):
    (vectors, options), *_ = encoded(node, clip, "a red star")
    assert gates(clip, [[vectors.to(dtype), options]], "star") == [1.0]
    if dtype == torch.float16:
        assert gates(clip, [[vectors.to(dtype).float(), options]], "star") == [1.0]


def test_an_averaged_conditioning_opens_by_its_vectors_and_says_so_once(node, clip, caplog, monkeypatch):
    monkeypatch.setattr(memory.PROMPTS, "told", False)
    star = encoded(node, clip, "a photo of star")
    other = encoded(node, clip, "a photo of moon")
    mixed = node("ConditioningAverage", conditioning_to=star, conditioning_from=other, conditioning_to_strength=0.98)[0]
    scaled = [[star[0][0] * 1.1, star[0][1]]]
    assert memory.PROMPTS.recall(mixed[0][0]) == memory.PROMPTS.recall(scaled[0][0]) == [None]
    for conditioning in (mixed, scaled):
        assert gates(clip, conditioning, "star")[0] > 0
    assert caplog.text.count("the words of a conditioning are not known") == 1


def test_a_conditioning_of_zeros_says_nothing(node, clip, caplog, monkeypatch):
    monkeypatch.setattr(memory.PROMPTS, "told", False)
    zeros = node("ConditioningZeroOut", conditioning=encoded(node, clip, "a star"))[0]
    assert gates(clip, zeros, "star") == [0.0] and "not known" not in caplog.text


def test_neutral_texts_are_encoded_once_and_not_noted(node, clip, monkeypatch):
    concepts_for(node_stack("star"), clip)
    counted, original = [], clip.cond_stage_model.encode_token_weights
    monkeypatch.setattr(
        clip.cond_stage_model, "encode_token_weights", lambda tokens: counted.append(1) or original(tokens)
    )
    before = len(memory.PROMPTS.known)
    assert concepts_for(node_stack("star"), clip).names == ("star",) and not counted
    assert concepts_for(node_stack("green cow", "star"), clip).names == ("green cow", "star")
    assert 0 < len(counted) <= 7 and len(memory.PROMPTS.known) == before


# ---------------------------------------------------------------- several encoders


def test_the_words_of_every_encoder_count(node):
    """Flux with its text in T5 only, or in CLIP only."""
    clip = made("flux")
    for clip_l, t5xxl in (("", "a photo of a star"), ("a photo of a star", "")):
        given = node("CLIPTextEncodeFlux", clip=clip, clip_l=clip_l, t5xxl=t5xxl, guidance=3.5)[0]
        assert gates(clip, given, "star") == [1.0]
        assert gates(clip, given, "van gogh")[0] < 1.0


def test_each_context_of_a_long_prompt_has_its_own_start_and_end():
    """Stable Diffusion 3: several contexts of CLIP, then T5's rows."""
    clip = made("sd3")
    found = next(iter(encode(clip, [LONG])))
    roles, contexts = found.roles.tolist(), len(clip.tokenize(LONG)["g"])
    assert contexts > 3 and len(found.rows) > 77 * contexts
    for start in range(0, 77 * contexts, 77):
        assert roles[start] == START and END in roles[start : start + 77]
    assert roles[77 * contexts] == WORD and min(found.heard.places) == 77 * contexts


def test_padding_in_front_is_padding(node):
    """LTX-2: Gemma 3 reads 1024 tokens, padded in front; the rows of padding are cut off."""
    clip = made("ltxav")
    tokens = clip.tokenize("a red star")
    layout = Tokenizer(clip.tokenizer).layout(tokens, 1024)
    words = layout.roles.tolist().count(WORD)
    assert (
        layout.roles.tolist() == [PADDING] * (1023 - words) + [START] + [WORD] * words and layout.head == 1024 - words
    )
    given = encoded(node, clip, "a red star")
    found = memory.PROMPTS.recall(given[0][0])[0]
    assert found.words == ("a", "red", "star") and found.places == tuple(range(1, 1 + words))
    assert gates(clip, given, "star") == [1.0]


def test_a_template_of_another_node_is_told_from_what_the_user_says(node):
    """Qwen-Image's editing template: what stands in it is none of the prompt's words."""
    clip = made("qwen_image")
    template = "<|im_start|>system\nDescribe the star of this picture.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    tokens = clip.tokenize("a big house", llama_template=template)
    vectors = clip.encode_from_tokens(tokens)
    assert memory.PROMPTS.recall(vectors)[0].words == ("a", "big", "hous")
    assert Tokenizer(clip.tokenizer).layout(tokens, vectors.shape[1]).places is None


# ---------------------------------------------------------------- words of a vocabulary


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "qwen_image", "lumina2", "hunyuan_video", "flux2"])
def test_words_near_a_concept_are_those_of_the_nearest_embeddings(name):
    clip = made(name)
    words = words_near(clip, "star", 20)
    assert len(words) == len({word.lower() for word in words}) == 20
    assert all(word.isalpha() and len(word) > 2 and "star" not in word.lower() for word in words)
    stream = list(clip.tokenize(""))[-1]
    table = {k: w for k, w in clip.cond_stage_model.state_dict().items() if k.endswith(EMBEDDINGS)}
    table = next(w for k, w in table.items() if stream in k.replace("clip_l", "l").split(".")).double()

    tokenizer = Tokenizer(clip.tokenizer)
    pieces = {}
    for i, word in tokenizer.vocabulary(stream).words.items():
        pieces.setdefault(word, []).append(i)
    before, both = (tokenizer.word_ids(stream, clip.tokenize(text)[stream]) for text in ("a", "a star"))
    if both[: len(before)] != before:
        pytest.skip("transformers reads this host's tokenizer of Llama without its spaces")
    star = table[list(both[len(before) :])]

    def near(word):
        return torch.nn.functional.cosine_similarity(table[pieces[word]][:, None], star[None], dim=2).max().item()

    found = [near(word) for word in words]
    assert found == pytest.approx(sorted(found, reverse=True), abs=1e-6) and found[0] > near("house")
