"""Gates that follow the meaning of a text: the probes, how they are fitted, kept in files, and what they open."""

import numpy as np
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.delta import KINDS
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.gates import (
    by_entry,
    columns,
    gate_values,
    gates_of,
    meanings,
    openings_by_words,
    side_by_side,
    wanted_concepts,
)
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.plan import make_plan
from membrane.core.adapters.probe import Probe
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.erasers.closed_form import probes
from membrane.core.erasers.closed_form.daily import probing_job
from membrane.core.erasers.closed_form.job import Job, erase
from membrane.core.errors import ErasureError
from membrane.core.families.unet import TEXT
from membrane.core.formats import native
from membrane.core.text.captions import captions_of
from membrane.core.text.encoded import Encoded
from membrane.core.text.everyday import everyday_captions
from safetensors.torch import load_file, save_file

WIDTH, TERMS = 6, 3
MEANING = Permeability("meaning")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probe(concept=0, low=0.2, high=0.5, seed=1):
    return Probe(concept, randn(WIDTH, seed=seed), low, high)


def text_map(*found, concepts=(0, 0, 0)):
    return TextMap(randn(WIDTH, TERMS), randn(TERMS, WIDTH, seed=1), concepts, probes=found)


def adapter(*found, names=("star",), **entries):
    maps = {"text": text_map(*found), **entries}
    return ErasureAdapter(Card("UCE", names), {"map": maps})


def stack_of(*adapters, permeability=MEANING, **settings):
    return ErasureStack(tuple(Entry(a, permeability=permeability, **settings) for a in adapters))


# ---------------------------------------------------------------- the rule


def expected_match(p, text):
    """The formula, row by row in float64: clip((max_i cos(c_i, p) - low) / (high - low), 0, 1)."""
    vector, found = p.vector.double().numpy(), []
    for rows in text.double().numpy():
        cosines = [row @ vector / (np.linalg.norm(row) * np.linalg.norm(vector)) for row in rows if row.any()]
        found.append(np.clip((max(cosines, default=-1.0) - p.low) / (p.high - p.low), 0.0, 1.0))
    return found


def test_the_match_is_the_formula():
    text = randn(40, 5, WIDTH, seed=3)
    text[0, 2:] = 0.0
    text[1] = 0.0
    found = probe().match(text)
    assert found.tolist() == pytest.approx(expected_match(probe(), text), abs=1e-6)
    assert {0.0, 1.0} < set(found.tolist()) and any(0 < m < 1 for m in found.tolist())


def test_up_to_low_it_is_exactly_shut_and_from_high_on_exactly_open():
    p = probe(low=0.2, high=0.5)
    other = randn(WIDTH, seed=9)
    across = torch.nn.functional.normalize(other - (other @ p.vector) / p.vector.square().sum() * p.vector, dim=0)
    along = torch.nn.functional.normalize(p.vector, dim=0)
    texts = [7.0 * (c * along + (1 - c * c) ** 0.5 * across) for c in (-1.0, 0.0, 0.19, 0.51, 1.0)]
    assert p.match(torch.stack(texts)[:, None]).tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_the_length_of_a_row_and_its_number_type_do_not_count():
    text = randn(9, 4, WIDTH, seed=4)
    assert torch.allclose(probe().response(text), probe().response(100.0 * text), atol=1e-6)
    assert torch.allclose(probe().response(text), probe().response(text.bfloat16()), atol=2e-2)


@pytest.mark.parametrize("text", [torch.zeros(2, 3, WIDTH), torch.zeros(2, 0, WIDTH)])
def test_a_text_that_says_nothing_opens_nothing(text):
    assert probe(low=-0.9, high=0.1).match(text).tolist() == [0.0, 0.0]


def test_of_several_entries_the_one_that_opens_further_counts():
    text, pooled = randn(8, 5, WIDTH, seed=5), randn(8, 1, WIDTH, seed=6)
    both = adapter(probe(), pooled=text_map(probe(seed=2)))
    one, two = probe().match(text), probe(seed=2).match(pooled)
    found = meanings(stack_of(both), {"text": text, "pooled": pooled})
    assert torch.equal(found[:, 0], torch.maximum(one, two)) and not torch.equal(one, found[:, 0])
    assert torch.equal(meanings(stack_of(both), {"text": text})[:, 0], one)
    assert torch.equal(meanings(stack_of(both), {}), torch.zeros(1, 1))


def test_gates_by_names_and_by_meaning_side_by_side():
    """Each concept has its own column: first the names that texts are compared with, then the probes."""
    words = ErasureAdapter(Card("UCE", ("heart",)), {"map": {"text": text_map()}})
    two = adapter(probe(0), probe(1, seed=2), names=("star", "moon"))
    by_words = stack_of(words, permeability=Permeability("facilitated transport"))
    stack = stack_of(two) + by_words + stack_of(adapter(probe()))
    names = wanted_concepts(stack)
    assert names == ("heart",) and columns(stack, names) == {1: (0,), 0: (1, 2), 2: (3,)}
    text = randn(4, 5, WIDTH, seed=7)
    score = side_by_side(torch.full((4, 1), 0.25), meanings(stack, {"text": text}))
    gates = gates_of(stack, names)
    assert [g.concepts for g in gates] == [(1,), (2,), (0,), (3,)]
    assert [g.label for g in gates] == ["star, moon (star)", "star, moon (moon)", "heart", "star"]
    values = gate_values(gates, score)
    one, other = probe().match(text), probe(seed=2).match(text)
    expected = torch.stack([one, other, torch.full((4,), 0.25), one], 1)
    assert torch.equal(values, expected)
    assert set(by_entry(gates, values)) == {0, 1, 2}


def test_strength_factor_and_threshold_count():
    text = randn(30, 5, WIDTH, seed=8)
    match = probe().match(text)
    stack = stack_of(adapter(probe()), permeability=Permeability("meaning", 2.0, 0.5), strength=0.5)
    values = gate_values(gates_of(stack), meanings(stack, {"text": text}))[:, 0]
    assert torch.allclose(values, torch.where(match >= 0.5, match, 0.0)) and 0 < (match[match < 0.5] > 0).sum()


def test_a_plan_gates_each_concept_by_its_own_probe():
    mapped = text_map(probe(0), probe(1, seed=2), concepts=(0, 1, 1))
    two = ErasureAdapter(Card("UCE", ("star", "moon")), {"map": {"text": mapped}})
    plan = make_plan(stack_of(two), {TEXT: WIDTH})
    assert plan.concepts is None and plan.maps["text"].gate.tolist() == [0, 1, 1]


def test_a_text_that_no_probe_knows_is_bit_identical():
    plan = make_plan(stack_of(adapter(probe())), {TEXT: WIDTH})
    text = randn(6, 5, WIDTH, seed=11).half()
    values = gate_values(plan.gates, torch.tensor([[0.0]] * 3 + [[1.0]] * 3))
    found = plan.maps["text"].erased(text, values)
    assert torch.equal(found[:3], text[:3]) and not any(torch.equal(a, b) for a, b in zip(found[3:], text[3:]))


@pytest.mark.parametrize("found, names", [((), ("star",)), ((probe(),), ("star", "moon"))])
def test_an_adapter_without_probes_is_one_sentence(found, names):
    with pytest.raises(ErasureError, match='^The adapter star.* has no probe for each of its concepts, .*"facilitated'):
        make_plan(stack_of(adapter(*found, names=names)), {TEXT: WIDTH})


def test_without_a_text_encoder_the_page_goes_by_words():
    assert openings_by_words(stack_of(adapter(probe())), "a red Star") == {0: 1.0}
    assert openings_by_words(stack_of(adapter(probe())), "a red heart") == {0: 0.0}


# ---------------------------------------------------------------- how they are fitted


WORDS = 120


def world(prompts, known):
    """Encoded prompts of a toy encoder: each word has a vector, and a word behind others has a share of theirs."""
    ids, vectors = [], []
    for prompt in prompts:
        own = [known.setdefault(word, len(known) + 2) for word in prompt.replace(",", " ").replace(".", " ").split()]
        ids.append([0, *own, 1] + [1] * (24 - len(own)))
        table = randn(WORDS * 4, 32, seed=5)
        table[1] = table[0]
        rows = table[torch.tensor(ids[-1])]
        vectors.append(rows + 0.3 * rows.cumsum(0) / torch.arange(1, len(rows) + 1)[:, None] ** 0.5)
    return Encoded.of_contexts(prompts, ids, torch.stack(vectors), 1)


CAPTIONS = captions_of("anything").templates


def fitted(concepts, preserve=(), templates=CAPTIONS):
    job, known = Job.from_text(concepts, "", preserve, templates=templates), {}
    encoded, others = world(job.prompts(), known).at(TEXT), world(everyday_captions(), known).at(TEXT)
    return erase(job, {"text": encoded}, "SD15", "", others={"text": others}), known


def test_probes_open_for_their_concept_in_other_captions_and_for_nothing_else():
    found, known = fitted("star -> circle\nmoon -> ring")
    assert found.probed
    captions = "two {} in the garden", "{} , blue , striped", "look at this {}"
    for own, other in (("star", "moon"), ("moon", "star")):
        p = next(p for p in found.maps["text"].probes if found.card.concepts[p.concept] == own)
        of = {w: world([c.format(w) for c in captions], known).vectors for w in (own, other, "circle", "heart", "dog")}
        assert p.match(of.pop(own)).tolist() == [1.0] * 3
        assert all(not p.match(text).any() for text in of.values())


def test_the_direction_solves_the_regression_it_says():
    """Against the equations written out, with more rows than columns and with fewer."""
    for width in (5, 40):
        targets, others = (torch.nn.functional.normalize(randn(n, width, seed=n).double(), dim=1) for n in (9, 14))
        weights = torch.cat([torch.full((9,), 0.5 / 9), torch.full((14,), 0.5 / 14)]).double()
        rows = torch.cat([targets, others])
        centred = rows - (targets.mean(0) + others.mean(0)) / 2
        covariance = (centred * weights[:, None]).T @ centred
        ridge = probes.SHRINKAGE * covariance.trace() / width
        expected = torch.linalg.solve(covariance + ridge * torch.eye(width).double(), targets.mean(0) - others.mean(0))
        found = probes._direction([targets[:4], targets[4:]], [others])
        assert torch.allclose(found, expected / expected.norm(), atol=1e-10)


def test_a_concept_that_cannot_be_told_from_others_has_no_probe():
    found, _ = fitted("dog", templates=("{}", "a {}"))
    assert found.maps["text"].probes and found.probed
    same = {"dog": 99, "star": 99}  # one word for the encoder
    job = Job.from_text("star", "", ("dog",), templates=("{}", "a {}", "a red {}"))
    encoded, others = world(job.prompts(), same).at(TEXT), world(everyday_captions(), same).at(TEXT)
    assert not erase(job, {"text": encoded}, "SD15", "", others={"text": others}).probed


def test_probes_leave_the_map_as_it_is():
    job, known = Job.from_text("star -> circle", "", ("heart",), templates=("{}", "a {}")), {}
    encoded, others = world(job.prompts(), known).at(TEXT), world(everyday_captions(), known).at(TEXT)
    plain, probed = (erase(job, {"text": encoded}, "SD15", "", others=o) for o in ({}, {"text": others}))
    assert torch.equal(plain.maps["text"].a, probed.maps["text"].a) and plain.card == probed.card
    assert torch.equal(plain.maps["text"].b, probed.maps["text"].b) and not plain.probed and probed.probed


# ---------------------------------------------------------------- in files


def test_they_are_kept_in_the_file(tmp_path):
    saved = adapter(probe(0), probe(1, 0.1, 0.25, 2), names=("star", "moon"), pooled=text_map(probe(1, seed=3)))
    native.save(saved, tmp_path / "a.safetensors")
    found = native.load(tmp_path / "a.safetensors")
    assert found.probed and not any(found.maps[name].probes is None for name in ("text", "pooled"))
    for name, mapped in saved.maps.items():
        for a, b in zip(mapped.probes, found.maps[name].probes, strict=True):
            assert (a.concept, a.low, a.high) == (b.concept, b.low, b.high) and torch.equal(a.vector, b.vector)


def test_a_file_without_them_is_as_before(tmp_path):
    native.save(adapter(), tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {"text_map.a", "text_map.b", "text_map.concept"}
    assert native.load(tmp_path / "a.safetensors").maps["text"].probes == ()


def layers(*found, kind="low_rank", names=("star",), **entries):
    """An adapter that changes one layer, with probes at text entries."""
    cls = KINDS[kind]
    return ErasureAdapter(
        Card("SPM", names), {kind: {"a.b": cls(randn(4, 1), randn(1, 4), 1.0)}}, layer_probes={"text": found, **entries}
    )


def test_of_an_adapter_on_layers_they_open_its_one_gate():
    """The best of its concepts and entries counts; a text of another width opens nothing."""
    two = layers(probe(0), probe(1, seed=2), names=("star", "moon"), pooled=(probe(1, seed=3),))
    assert two.probed and not layers(probe(0), names=("star", "moon")).probed and not layers().probed
    stack = stack_of(two)
    gates = gates_of(stack)
    assert [(g.concepts, g.label) for g in gates] == [((0, 1), "star, moon")] and columns(stack, ()) == {0: (0, 1)}
    text, pooled = randn(60, 1, WIDTH, seed=12), randn(60, 1, WIDTH, seed=13)
    found = gate_values(gates, meanings(stack, {"text": text, "pooled": pooled}))[:, 0]
    best = torch.stack([probe().match(text), probe(seed=2).match(text), probe(seed=3).match(pooled)]).amax(dim=0)
    assert torch.equal(found, best) and {0.0, 1.0} < set(found.tolist())
    assert not meanings(stack, {"text": randn(2, 5, WIDTH + 1)}).any()


def test_an_adapter_on_layers_without_them_says_how_it_gets_them():
    sentence = "^The adapter star has no probe .*; connect clip .* computed, or set .*"
    with pytest.raises(ErasureError, match=sentence):
        make_plan(stack_of(layers()))


def test_the_texts_that_tell_an_adapter_of_layers():
    """Its own concepts in the captions for anything, its surrogates and what its card says that it keeps."""
    card = Card("SPM", ("star", "moon"), ("circle",), settings={"preserve": ["heart", 5]})
    job = probing_job(card)
    assert [(c.text, c.surrogate) for c in job.concepts] == [("star", "circle"), ("moon", "")]
    assert job.preserve == ("heart", "circle") and job.templates == CAPTIONS
    assert probing_job(Card("LoRA", ("star",), settings={"preserve": "heart"})).preserve == ()


@pytest.mark.parametrize("kind", ["low_rank", "text_rows"])
def test_those_of_layers_are_kept_in_files_of_every_version(tmp_path, kind):
    file, saved = tmp_path / "a.safetensors", layers(probe(0), probe(0, seed=4), kind=kind, t5=(probe(0, seed=3),))
    native.save(saved, file)
    found = native.load(file)
    assert found.probed and found.probes.keys() == {"text", "t5"}
    for entry, own in saved.probes.items():
        for a, b in zip(own, found.probes[entry], strict=True):
            assert (a.concept, a.low, a.high) == (b.concept, b.low, b.high) and torch.equal(a.vector, b.vector)
    native.save(layers(kind=kind), file)
    assert not native.load(file).probes and not any(key.startswith("probes.") for key in load_file(file))


@pytest.mark.parametrize(
    "change",
    [
        {"probe": torch.full((1, WIDTH), float("nan"))},
        {"probe": torch.zeros(1, WIDTH)},
        {"probe": torch.ones(1, WIDTH + 1)},
        {"probe": torch.ones(WIDTH)},
        {"probe": torch.ones(1, WIDTH, dtype=torch.int32)},
        {"probe_concept": torch.tensor([1], dtype=torch.int32)},
        {"probe_concept": torch.tensor([-1], dtype=torch.int32)},
        {"probe_concept": torch.tensor([0.0])},
        {"probe_concept": torch.zeros(2, dtype=torch.int32)},
        {"probe_range": torch.tensor([[0.5, 0.2]], dtype=torch.float64)},
        {"probe_range": torch.tensor([[0.2, 0.2]], dtype=torch.float64)},
        {"probe_range": torch.tensor([[0.2, float("nan")]], dtype=torch.float64)},
        {"probe_range": torch.tensor([[float("-inf"), 0.5]], dtype=torch.float64)},
        {"probe_range": torch.tensor([[0.2, 1.5]], dtype=torch.float64)},
        {"probe_range": torch.tensor([0.2, 0.5], dtype=torch.float64)},
        {"probe_range": None},
    ],
)
def test_tampered_probes_are_refused(tmp_path, change):
    require_refused(tmp_path / "a.safetensors", adapter(probe()), "text_map", change)


@pytest.mark.parametrize(
    "change",
    [
        {"probe": torch.ones(2, WIDTH)},
        {"probe": torch.ones(WIDTH)},
        {"probe": torch.zeros(1, 0)},
        {"probe_concept": torch.tensor([1], dtype=torch.int32)},
        {"probe_range": None},
    ],
)
def test_tampered_probes_of_layers_are_refused(tmp_path, change):
    require_refused(tmp_path / "a.safetensors", layers(probe()), "probes.text", change)


def require_refused(file, saved, prefix, change):
    """That a file is refused whose probes were changed."""
    native.save(saved, file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file) | {f"{prefix}.{part}": value for part, value in change.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata)
    with pytest.raises(ErasureError, match='^"a.safetensors" holds probes that .* damaged, save the adapter again.$'):
        native.load(file)
