"""Text encoders that are not CLIP alone: the host's own classes at toy size, with their real tokenizers and templates.

Each prompt is encoded as it is alone, its rows are told apart, and its gates compare words: prompts of different
length, of several encoders side by side, with templates around them.
"""

import importlib

import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.errors import ErasureError
from membrane.core.host.patches.stack import concepts_for
from membrane.core.host.text.encode import encode
from membrane.core.text.encoded import END, PADDING, START, TEMPLATE, WORD
from membrane.core.text.rows import after_start, counted, subject

PROMPTS = ("a star", "moon", "a small green heart beside a ring", "")
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
T5 = {"d_model": 32, "d_ff": 32, "num_heads": 2, "d_kv": 16, "num_layers": 2}
LANGUAGE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1}  # fmt: skip
# one that is not named here is built in its full size, of gigabytes
SMALL = {
    **{f"clip_{name}_model_config": CLIP for name in "lgh"}, "t5xxl_model_config": T5,
    **{f"{name}_model_config": LANGUAGE for name in ("qwen25_7b", "qwen3_4b", "llama", "")}, "_model_config": LANGUAGE,
}  # fmt: skip
# module, its tokenizer, and its function that makes the encoder's class
ENCODERS = {
    "SD3": ("sd3_clip", "SD3Tokenizer", "sd3_clip"),
    "Flux": ("flux", "FluxTokenizer", "flux_clip"),
    "Chroma": ("pixart_t5", "PixArtTokenizer", "pixart_te"),
    "Qwen-Image": ("qwen_image", "QwenImageTokenizer", "te"),
    "Z-Image": ("z_image", "ZImageTokenizer", "te"),
}
LANGUAGE_MODELS = ("Qwen-Image", "Z-Image")


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    """comfy.sd.CLIP of one of ENCODERS, small and with random weights."""
    import comfy.sd
    import comfy.supported_models_base

    module, tokenizer, made = ENCODERS[request.param]
    try:
        module = importlib.import_module(f"comfy.text_encoders.{module}")
    except ImportError:
        pytest.skip(f"this host has no encoder of {request.param}")
    wide = {"t5xxl_model_config": {**T5, "d_model": 4096}} if request.param == "SD3" else {}  # joined with CLIP's rows
    cpu = torch.device("cpu")
    found = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(getattr(module, tokenizer), getattr(module, made)()),
        embedding_directory=None,
        model_options={**SMALL, **wide, "dtype": torch.float32, "load_device": cpu, "offload_device": cpu},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.cond_stage_model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() < 2 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else noise * max(1, *parameter.shape, 1) ** -0.5)
    found.kind = request.param
    return found


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
        assert TEMPLATE in roles and roles[-1] == TEMPLATE and START not in roles and PADDING not in roles
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
