"""Text encoders that are not CLIP alone: the host's own classes at toy size, with their real tokenizers and templates.

Each prompt is encoded as it is alone, its rows are told apart, and its gates compare words: prompts of different
length, of several encoders side by side, with templates around them.
"""

import functools
import importlib
import tempfile
from itertools import groupby
from pathlib import Path

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.errors import ErasureError
from membrane.core.host.patches.stack import concepts_for
from membrane.core.host.text import known_tokens as memory
from membrane.core.host.text.encode import encode
from membrane.core.host.text.tokens import Tokenizer
from membrane.core.text.encoded import END, PADDING, START, TEMPLATE, WORD
from membrane.core.text.rows import after_start, counted, first_row, subject
from membrane.tools.tiny import encoders
from membrane.tools.tiny.networks import NotInThisHost

PROMPTS = ("a star", "moon", "a small green heart beside a ring", "")
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
T5 = {"d_model": 32, "d_ff": 32, "num_heads": 2, "d_kv": 16, "num_layers": 2}
LANGUAGE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1}  # fmt: skip
# one that is not named here is built in its full size, of gigabytes
SMALL = {
    **{f"clip_{name}_model_config": CLIP for name in "lgh"},
    **{f"{name}_model_config": T5 for name in ("t5xxl", "umt5xxl")},
    **{f"{name}_model_config": LANGUAGE for name in ("qwen25_7b", "qwen3_4b", "llama", "gemma2_2b", "gemma3_12b", "")},
    "_model_config": LANGUAGE, "llama_model_config": {**LANGUAGE, "num_hidden_layers": 4},
}  # fmt: skip
PREFIX, PLAIN = {"add_dummy_prefix": True}, {"add_dummy_prefix": False}
# module, its tokenizer, its function that makes the encoder's class, what that takes, and how a vocabulary is made that
# the host reads from a checkpoint
ENCODERS = {
    "SD3": ("sd3_clip", "SD3Tokenizer", "sd3_clip", {}, None),
    "Flux": ("flux", "FluxTokenizer", "flux_clip", {}, None),
    "Chroma": ("pixart_t5", "PixArtTokenizer", "pixart_te", {}, None),
    "Qwen-Image": ("qwen_image", "QwenImageTokenizer", "te", {}, None),
    "Z-Image": ("z_image", "ZImageTokenizer", "te", {}, None),
    "Klein": ("flux", "KleinTokenizer", "klein_te", {"model_type": "qwen3_4b"}, None),
    "Lumina2": ("lumina2", "LuminaTokenizer", "te", {}, PLAIN),
    "HunyuanVideo": ("hunyuan_video", "HunyuanVideoTokenizer", "hunyuan_video_clip", {}, None),
    "Wan": ("wan", "WanT5Tokenizer", "te", {}, PREFIX),
}
LEFT = {  # padded in front, to 1024 tokens
    "LTX-2": ("lt", "LTXAVGemmaTokenizer", "ltxav_te", {"dtype_llama": torch.float32}, PLAIN),
}
LANGUAGE_MODELS = ("Qwen-Image", "Z-Image", "Klein")  # with a template of several tokens around the words
WORDS = "a an the star stars moon house small green heart beside ring red here blue cow on snow and photo of Star STAR"


@functools.cache
def vocabulary(add_dummy_prefix):
    """A SentencePiece model as a tensor of bytes, as checkpoints hold it."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join([WORDS] * 20 + [f"a {word} of a {word}" for word in WORDS.split()] * 20))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(Path(folder) / "m"), vocab_size=160, model_type="bpe",
            add_dummy_prefix=add_dummy_prefix, remove_extra_whitespaces=add_dummy_prefix, pad_id=0, eos_id=1, bos_id=2,
            unk_id=3, minloglevel=2,
        )  # fmt: skip
        return torch.frombuffer(bytearray((Path(folder) / "m.model").read_bytes()), dtype=torch.uint8)


def made(kind):
    """comfy.sd.CLIP of one of ENCODERS, small and with random weights; skips where the host has none."""
    import comfy.sd
    import comfy.supported_models_base

    module, tokenizer, maker, arguments, pieces = {**ENCODERS, **LEFT}[kind]
    try:
        module = importlib.import_module(f"comfy.text_encoders.{module}")
        target = comfy.supported_models_base.ClipTarget(getattr(module, tokenizer), getattr(module, maker)(**arguments))
    except (ImportError, AttributeError):
        pytest.skip(f"this host has no encoder of {kind}")
    wide = {"t5xxl_model_config": {**T5, "d_model": 4096}} if kind == "SD3" else {}  # joined with CLIP's rows
    deep = {"qwen3_4b_model_config": {**LANGUAGE, "num_hidden_layers": 28}} if kind == "Klein" else {}  # reads 3 layers
    cpu = torch.device("cpu")
    found = comfy.sd.CLIP(
        target, embedding_directory=None, tokenizer_data={"spiece_model": vocabulary(**pieces)} if pieces else {},
        model_options={**SMALL, **wide, **deep, "dtype": torch.float32, "load_device": cpu, "offload_device": cpu},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.cond_stage_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() < 2 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else noise * max(1, *parameter.shape, 1) ** -0.5)
    found.kind = kind
    return found


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    """made() of each of ENCODERS."""
    return made(request.param)


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
    found = encode(clip, PROMPTS)
    assert found[""].words == ()
    counts = [len(found[prompt].words) for prompt in ("moon", "a star", PROMPTS[2])]
    assert 1 <= counts[0] < counts[1] < counts[2]
    roles = found["moon"].roles.tolist()
    if clip.kind in LANGUAGE_MODELS:  # a template around every prompt, cut off in front where the encoder does so
        assert TEMPLATE in roles and START not in roles
        assert roles[-1] == (PADDING if clip.kind == "Klein" else TEMPLATE) and (clip.kind == "Klein") == (
            PADDING in roles
        )
    elif clip.kind == "Lumina2":  # a start token, and nothing behind the words
        assert roles == [START] + [WORD] * counts[0]
    elif clip.kind == "SD3":  # CLIP's context, then T5's
        assert roles[0] == START and roles[77] == WORD and roles.count(END) == 2
    else:  # T5 has no start token
        assert roles[0] == WORD and roles[counts[0]] == END


def test_the_subject_is_the_last_row_of_the_word(clip):
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


# ---------------------------------------------------------------- what reaches the sampler


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


@pytest.mark.parametrize("text", ["a STAR", "Two red stars on snow", "the (star:1.3)", "star", LONG])
def test_a_word_opens_however_it_is_written(node, clip, text):
    assert gates(clip, encoded(node, clip, text), "star") == [1.0]
    stack = node("MembraneStack", adapter=follows(("star",), "star.safetensors"), strength=1.0)[0]
    report = node("MembranePreview", clip=clip, stack=stack, prompts=text)[1]
    assert next(line for line in report.splitlines() if "star.safetensors" in line).endswith(" 1.000")


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
    star = encoded(node, clip, "a photo of a star")
    other = encoded(node, clip, "a photo of a moon")
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
    clip = made("Flux")
    for clip_l, t5xxl in (("", "a photo of a star"), ("a photo of a star", "")):
        given = node("CLIPTextEncodeFlux", clip=clip, clip_l=clip_l, t5xxl=t5xxl, guidance=3.5)[0]
        assert gates(clip, given, "star") == [1.0]
        assert gates(clip, given, "van gogh")[0] < 1.0


def test_each_context_of_a_long_prompt_has_its_own_start_and_end():
    """Stable Diffusion 3: several contexts of CLIP, then T5's rows."""
    clip = made("SD3")
    found = next(iter(encode(clip, [LONG])))
    roles, contexts = found.roles.tolist(), len(clip.tokenize(LONG)["g"])
    assert contexts > 3 and len(found.rows) > 77 * contexts
    for start in range(0, 77 * contexts, 77):
        assert roles[start] == START and END in roles[start : start + 77]
    assert roles[77 * contexts] == WORD and min(found.heard.places) == 77 * contexts


def test_padding_in_front_is_padding(node):
    """LTX-2: Gemma 3 reads 1024 tokens, padded in front; the rows of padding are cut off."""
    clip = made("LTX-2")
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
    clip = made("Qwen-Image")
    template = "<|im_start|>system\nDescribe the star of this picture.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    tokens = clip.tokenize("a big house", llama_template=template)
    vectors = clip.encode_from_tokens(tokens)
    assert memory.PROMPTS.recall(vectors)[0].words == ("a", "big", "hous")
    assert Tokenizer(clip.tokenizer).layout(tokens, vectors.shape[1]).places is None


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
TWO_LINES = 271  # Llama's token for an empty line, which its template has before the words
# a word reaches all rows behind it and none before it
CAUSAL = ("sd15", "sdxl", "flux2", "flux2_klein", "z_image", "omnigen2", "lumina2", "ernie", "ovis")


@pytest.fixture(scope="module", params=encoders.ENCODERS)
def each(request):
    """CLIP of every encoder."""
    try:
        found = encoders.encoder(request.param)
    except NotInThisHost as error:
        pytest.skip(str(error))
    found.kind = request.param
    return found


def told(prompt):
    """The roles of a prompt's rows as ROLES spells them."""
    return " ".join(f"{'SWEPT'[role]}{len(list(rows))}" for role, rows in groupby(prompt.roles.tolist()))


def test_rows_are_what_the_host_makes_of_the_prompt(each):
    prompts = ("", "moon", "a red star on a house")
    if each.kind == "hunyuan_video" and TWO_LINES not in [token for token, _ in each.tokenize("")["llama"][0]]:
        pytest.skip("transformers reads this host's tokenizer of Llama without its spaces")
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
