"""Text encoders that are not CLIP alone: the host's own classes at toy size, with their real tokenizers and templates.

Each prompt is encoded as it is alone, its rows are told apart, and its gates compare words: prompts of different
length, of several encoders side by side, with templates around them.
"""

from itertools import groupby

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.errors import ErasureError
from membrane.core.host.patches.stack import concepts_for
from membrane.core.host.text.encode import encode
from membrane.core.text.encoded import END, PADDING, START, TEMPLATE, WORD
from membrane.core.text.rows import after_start, counted, first_row, subject
from membrane.tools.tiny import encoders, networks
from membrane.tools.tiny.networks import NotInThisHost

PROMPTS = ("a star", "moon", "a small green heart beside a ring", "")
ENCODERS = {
    "SD3": "sd3", "Flux": "flux", "Chroma": "chroma", "Qwen-Image": "qwen_image", "Z-Image": "z_image",
    "Klein": "flux2_klein", "HunyuanVideo": "hunyuan_video", "Wan": "wan",
}  # fmt: skip
LANGUAGE_MODELS = ("Qwen-Image", "Z-Image", "Klein")  # with a template of several tokens around the words


def made(kind, name):
    """CLIP of one of tools/tiny/encoders.py; kind: its name here."""
    try:
        found = encoders.encoder(name)
    except NotInThisHost as error:
        pytest.skip(str(error))
    found.kind = kind
    return found


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    """CLIP of one of ENCODERS, small and with random weights."""
    return made(request.param, ENCODERS[request.param])


TWO_LINES = 271  # Llama's token for an empty line, which the template of HunyuanVideo has before the words


def require_spaces(clip):
    """Skips a test of words where they are cut at the wrong places."""
    tokens = clip.tokenize("").get("llama")
    if "hunyuan" in clip.kind.lower() and tokens and TWO_LINES not in [token for token, *_ in tokens[0]]:
        pytest.skip("transformers reads this host's tokenizer of Llama without its spaces")


def alone(clip, prompt):
    """What the host gives a prompt by itself, (T, d)."""
    return clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[0][0].float()


def words_of(clip, prompt):
    found = next(iter(encode(clip, [prompt])))
    return found.words


def test_each_prompt_gets_what_it_gets_alone(clip):
    found = encode(clip, PROMPTS)
    assert found.prompts == PROMPTS and not found.contexts
    for prompt in PROMPTS:
        assert torch.equal(found[prompt].rows, alone(clip, prompt))
        assert len(found[prompt].ids) == len(found[prompt].roles) == len(found[prompt].rows)


def test_words_are_told_from_what_stands_around_them(clip):
    require_spaces(clip)
    found = encode(clip, PROMPTS)
    assert found[""].words == ()
    counts = [len(found[prompt].words) for prompt in ("moon", "a star", PROMPTS[2])]
    assert 1 <= counts[0] < counts[1] < counts[2]
    roles = found["moon"].roles.tolist()
    if clip.kind in LANGUAGE_MODELS:  # a template around every prompt, cut off in front where the encoder does so
        padded = clip.kind == "Klein"
        assert TEMPLATE in roles and START not in roles and roles[-1] == (PADDING if padded else TEMPLATE)
        assert (PADDING in roles) == padded
    elif clip.kind == "SD3":  # CLIP's context, then T5's
        assert roles[0] == START and roles[77] == WORD and roles.count(END) == 2
    else:  # T5 has no start token
        assert roles[0] == WORD and roles[counts[0]] == END


def test_the_subject_is_the_last_row_of_the_word(clip):
    require_spaces(clip)
    found = encode(clip, ("a star", "star", "a red star here", "here", ""))
    place = subject(found["a red star here"], found["star"])
    assert found["a red star here"].roles[place] == WORD
    after = subject(found["a red star here"], found["here"])
    assert place < after and after - place == len(found["here"].inside)
    if clip.kind == "Chroma":
        assert subject(found["star"], found["star"]) == len(found["star"].words) - 1
        assert subject(found[""], found[""]) == 0


def test_rows_that_count(clip):
    found = encode(clip, ("moon", ""))
    moon, empty = found["moon"], found[""]
    assert len(counted(moon)) >= 1 and len(counted(empty)) <= len(empty.rows)
    same = len(moon.rows) - len(after_start(moon))
    assert torch.allclose(moon.rows[:same], empty.rows[:same], atol=1e-5)  # what stands before every prompt


def follows(concepts, name=""):
    change = LowRank(torch.ones(4, 1), torch.ones(1, 4), 1.0)
    return ErasureAdapter(Card("SPM", concepts), {"low_rank": {"mid": change}}, name)


def test_preview_shows_what_each_prompt_has(node, clip):
    stack = node("MembraneStack", adapter=follows(("star",), "star.safetensors"), strength=1.0)[0]
    report = node("MembranePreview", clip=clip, stack=stack, prompts="a star\nmoon\na small green heart beside a ring")[
        1
    ]
    values = [float(line.split()[-1]) for line in report.splitlines() if "star.safetensors" in line]
    assert values[0] == 1.0 and values[1] < 1.0 and values[2] < 1.0


def test_gates_of_a_conditioning_go_by_its_words(node, clip):
    """As while sampling: the vectors of a conditioning are all there is, and its words are remembered."""
    from membrane.core.host.text.known_tokens import PROMPTS as known

    stack = node("MembraneStack", adapter=follows(("star", "moon")), strength=1.0)[0]
    concepts = concepts_for(stack, clip)
    for prompt, expected in (("a star", (True, False)), ("moon", (False, True)), ("a heart", (False, False))):
        vectors = node("CLIPTextEncode", clip=clip, text=prompt)[0][0][0]
        score = concepts.match(vectors, known.recall(vectors))
        assert tuple(value == 1.0 for value in score[0].tolist()) == expected


def test_erasures_of_two_encoders_do_not_mix(node, demo, clip):
    stack = node("MembraneStack", adapter=follows(("star",)), strength=1.0)[0]
    other = node("MembraneStack", adapter=follows(("moon",)), strength=1.0)[0]
    with pytest.raises(ErasureError, match="compare texts of shape"):
        concepts_for(other + stack, clip, concepts_for(stack, demo[1]))


def test_the_search_for_words_says_what_it_needs(clip):
    found = encode(clip, ("a star", PROMPTS[2]))
    if len({len(prompt.rows) for prompt in found}) > 1:
        with pytest.raises(ErasureError, match="expected the same number for each"):
            found.vectors  # noqa: B018  the property raises
    else:
        for prompt, rows in zip(found.prompts, found.vectors):
            assert torch.equal(rows, alone(clip, prompt))


# ---------------------------------------------------------------- every encoder that the host knows


# What the rows stand for of no prompt, of "moon" and of six words, as the host cuts them: start, word, template, end,
# padding; and how many follow one another; "" where it only matters that none is a word.
CONTEXT = ("S1 E1 P75", "S1 W1 E1 P74", "S1 W6 E1 P69")
ROLES = {
    **dict.fromkeys(("sd15", "sd2", "sdxl", "sdxl_refiner", "cascade", "sd3_no_t5", "hunyuan_dit"), CONTEXT),
    "sd3": ("S1 E1 P75 E1 P76", "S1 W1 E1 P74 W1 E1 P75", "S1 W6 E1 P69 W8 E1 P68"),
    **{name: ("E1 P255", "W1 E1 P254", f"W{words} E1 P{255 - words}")
       for name, words in (("auraflow", 6), ("flux", 8), ("mochi", 8))},
    "chroma": ("E1", "W1 E1", "W8 E1"),
    **{name: (f"E1 P{rows - 1}", f"W1 E1 P{rows - 2}", f"W8 E1 P{rows - 9}")
       for name, rows in (("ltxv", 128), ("hidream", 128), ("cosmos", 512), ("cogvideox", 226))},
    "wan": ("E1 P511", "W1 E1 P510", "W6 E1 P505"),
    "lumina2": ("S1", "S1 W4", "S1 W6"),
    "ernie": ("S1", "S1 W1", "S1 W6"),
    "flux2": ("T95 E1", "T95 W1 E1", "T95 W6 E1"),
    "flux2_klein": ("T12 P500", "T3 W1 T9 P499", "T3 W6 T9 P494"),
    **dict.fromkeys(("hunyuan_video", "hunyuan_image", "kandinsky5"), ("E1", "W1 E1", "W6 E1")),
    "z_image": ("T8", "T3 W1 T5", "T3 W6 T5"),
    **dict.fromkeys(("qwen_image", "krea2"), ("T5", "W1 T5", "W6 T5")),
    "omnigen2": ("T25", "T23 W1 T2", "T23 W6 T2"),
    "anima": ("", "W1", "W6"),
    "longcat": ("", "W1 P511", "W6 P506"),
    "ovis": ("", "T1 W1 T9 P245", "T1 W6 T9 P240"),
}  # fmt: skip
# a word reaches all rows behind it and none before it
CAUSAL = ("sd15", "sdxl", "flux2", "flux2_klein", "z_image", "omnigen2", "lumina2", "ernie", "ovis")


@pytest.fixture(scope="module", params=encoders.ENCODERS)
def each(request):
    """CLIP of every encoder."""
    return made(request.param, request.param)


def told(prompt):
    """The roles of a prompt's rows as ROLES spells them."""
    return " ".join(f"{'SWEPT'[role]}{len(list(rows))}" for role, rows in groupby(prompt.roles.tolist()))


def test_rows_are_what_the_host_makes_of_the_prompt(each):
    prompts = ("", "moon", "a red star on a house")
    require_spaces(each)
    found = encode(each, prompts)
    for prompt, expected in zip(prompts, ROLES[each.kind]):
        assert torch.equal(found[prompt].rows, alone(each, prompt))
        assert told(found[prompt]) == expected if expected else not found[prompt].words


@pytest.mark.parametrize("each", CAUSAL, indirect=True)
def test_a_word_reaches_the_rows_behind_it(each):
    """Two prompts of as many tokens have the same rows up to the first word, and others from there to the template's
    end: so much for which rows are words."""
    moon, star = encode(each, ("red moon", "big star"))
    assert len(moon.rows) == len(star.rows)
    differs = (moon.rows != star.rows).any(dim=1).tolist()
    first = first_row(moon)
    last = max(i for i, role in enumerate(moon.roles.tolist()) if role in (WORD, TEMPLATE, END))
    assert not any(differs[:first]) and all(differs[first : last + 1])


@pytest.mark.parametrize("each", [name for name in encoders.ENCODERS if name != "sdxl_refiner"], indirect=True)
def test_words_open_the_gates_of_every_encoder(node, each):
    stack = node("MembraneStack", adapter=follows(("red star",), "star.safetensors"), strength=1.0)[0]
    report = node("MembranePreview", clip=each, stack=stack, prompts="a red star on a house\nred star\na cat")[1]
    values = [float(line.split()[-1]) for line in report.splitlines() if "star.safetensors" in line]
    assert values[:2] == [1.0, 1.0] and values[2] < 1.0


def test_the_closed_form_of_ernie_needs_captions(node):
    """Its rows are those of a language model without a template around them: the row of a word in a caption has little
    to do with that of the word alone. A map of the word alone takes that to the replacement and leaves the caption as
    it was, which looks as if nothing was erased; a map of captions reaches both."""
    clip = made("ernie", "ernie")
    model = networks.build("ernie", text_in_dim=64)
    house = node("CLIPTextEncode", clip=clip, text="house")[0]

    def seen(net, prompt):
        with torch.inference_mode():
            return networks.predict(net, node("CLIPTextEncode", clip=clip, text=prompt)[0], house, "ernie")[0]

    def left(templates, prompt):
        """Distance of the erased picture of a star to that of a circle, relative to their distance without erasing."""
        erased = node(
            "MembraneErase", model=model, clip=clip, concepts="star -> circle", replace_with="", preserve="",
            method="UCE", strength=1.0, templates=templates,
        )[0]  # fmt: skip
        star, circle = (seen(model, prompt.format(word)) for word in ("star", "circle"))
        return ((seen(erased, prompt.format("star")) - circle).norm() / (star - circle).norm()).item()

    assert left("{}", "{}") < 0.01
    assert left("{}", "a photo of a {}") > 0.9
    captions = "{}\na red {}\na photo of a {}"
    assert all(left(captions, prompt) < 0.03 for prompt in captions.splitlines())
