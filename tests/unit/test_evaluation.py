"""The record of an evaluation, its numbers, its page, and what is measured in it."""

import base64
import html
import io
import json
import sys

import numpy as np
import pytest
import torch
from membrane.core.demo import judge as pixel_judge
from membrane.core.errors import ErasureError
from membrane.core.measures import distances
from membrane.core.measures.compare import built_in, by_pictures, compare, demo_judge, zero_shot_judge
from membrane.core.measures.record import ERASE, NEIGHBOUR, Record, decoded_picture, encoded_picture
from membrane.core.measures.render_grid import attack_sheet, drift_map, grid
from membrane.core.measures.render_page import page
from membrane.core.measures.render_text import report
from membrane.core.measures.scores import Prompt
from membrane.core.measures.summary import summarise
from membrane.core.measures.verdict import verdict
from membrane.tools.pixel_world import world
from PIL import Image


class Shifted:
    """Pictures of one colour, drawn from the prompt and the seed; the erased model's are brighter by a step."""

    def __init__(self, step):
        self.step, self.asked = step, []

    def latents(self, text, seeds):
        return torch.stack([torch.full((4, 2, 2), (len(text) * 7 + seed * 3) % 10 / 20) for seed in seeds])

    def pair(self, text, seeds):
        self.asked.append(text)
        plain = self.latents(text, seeds)
        moved = plain + self.step

        class Pair:
            original, erased = plain, moved
            original_pictures, erased_pictures = (
                x[:, :3].permute(0, 2, 3, 1).repeat(1, 8, 8, 1) for x in (plain, moved)
            )
            drift = [(sigma, [moved, plain, plain * 0]) for sigma in (9.0, 0.5)]

        return Pair

    def again(self, text, seeds):
        found = self.latents(text, seeds[:1]) + 0.001
        return found, found[:, :3].permute(0, 2, 3, 1).repeat(1, 8, 8, 1)


PROMPTS = {
    "erase": [Prompt("a star", "star"), Prompt("a <i>pentagram</i>", "star", True)],
    "neighbour": [Prompt("a heart", "heart"), Prompt("two hearts", "heart"), Prompt("three hearts, in all")],
}


def run(record, step=0.1, pairs=None, **options):
    options = {"judge": lambda pictures: ["star"] * len(pictures), **options}
    pairs = pairs or Shifted(step)
    compare(record, PROMPTS, pairs, built_in(), lambda n: [2 * n, 2 * n + 1], **options)
    return record


def test_rows_and_numbers():
    record = run(Record({}))
    assert record.finished and len(record.rows) == 10 and len({row["seed"] for row in record.rows}) == 10
    row = record.rows[0]
    assert row["distance"] == {name: pytest.approx(0.1) for name in ("latent", "pixel")}
    plain = Shifted(0).latents("a star", [0, 1])
    assert row["ceiling"]["latent"] == pytest.approx((plain[0] - plain[1]).abs().mean().item())
    assert row["floor"]["pixel"] == pytest.approx(0.001, rel=1e-3)
    assert row["drift"] == [[9.0, pytest.approx(0.1 / 0.1)], [0.5, pytest.approx(0.1 / 0.1)]]
    assert record.rows[1]["drift"][0][1] == pytest.approx(0.1 / 0.25)
    summary = summarise(record).as_json()
    found = summary["strata"]["neighbour"]["latent"]
    ceiling = np.mean([r["ceiling"]["latent"] for r in record.rows if r["stratum"] == "neighbour"])
    assert found["integrity"]["value"] == pytest.approx(1 - (0.1 - 0.001) / (ceiling - 0.001), rel=1e-4)
    assert (found["prompts"], found["count"]) == (3, 6)
    scores = summary["scores"]
    assert scores["erased"] == {"right": 2, "of": 2} and scores["synonym"] == {"right": 2, "of": 2}
    assert scores["kept"] == {"right": 0, "of": 4} and scores["harmonic"] == 0
    assert scores["erased_classes"] == ["star"]


def test_json_and_going_on():
    whole = run(Record({"a": 1}, [[0.5]]))
    text = whole.to_json(summarise(whole))
    assert "NaN" not in text and json.loads(text)["fingerprint"] == whole.fingerprint()
    back = Record.from_json(text)
    assert back == whole
    part = Record.from_json(text)
    part.rows, part.pictures, part.finished = part.rows[:4], part.pictures[:2], False
    pairs = Shifted(0.1)
    run(part, pairs=pairs)
    assert part == whole and pairs.asked == ["a heart", "two hearts", "three hearts, in all"]
    assert Record({"a": 2}).fingerprint() != whole.fingerprint()
    huge = text.replace("[[0.5]]", f"[[{10**400}]]")
    for damaged in ("", "{}", '{"format": "other"}', text[:100], "[]", huge):
        assert Record.from_json(damaged) is None


def test_drift_is_no_distance_but_stands_among_them_in_the_file():
    record = run(Record({"a": 1}))
    summary = summarise(record)
    assert summary.distance_names() == ["pixel", "latent"] and list(summary.strata) == ["erase", "neighbour"]
    erase = summary.strata["erase"]
    assert set(erase.distances) == {"pixel", "latent"} and [level.sigma for level in erase.drift] == [9.0, 0.5]
    assert (erase.distances["pixel"].count, erase.distances["pixel"].prompts) == (4, 2)
    held = json.loads(record.to_json(summary))["summary"]
    assert list(held["strata"]["erase"]) == ["pixel", "latent", "drift"]
    moved = "count mean median p95 prompts floor ceiling integrity".split()
    assert list(held["strata"]["erase"]["pixel"]) == moved
    assert list(held["strata"]["erase"]["pixel"]["mean"]) == ["value", "low", "high"]
    assert [list(level) for level in held["strata"]["erase"]["drift"]] == [["sigma", "value", "low", "high"]] * 2
    assert held["strata"]["erase"]["pixel"]["mean"]["value"] == erase.distances["pixel"].mean.value
    assert held["scores"]["erased"] == {"right": 2, "of": 2} and set(held) == {"strata", "scores"}


EARLIER = """
{"format": "membrane.evaluation", "version": 1, "fingerprint": "78a2c1a7dbb04b52", "configuration": {"a": 1},
"probe": [[0.5]], "rows": [
{"stratum": "erase", "index": 0, "prompt": "a star", "label": "star", "synonym": false, "seed": 0,
"distance": {"latent": 0.1, "pixel": 0.1}, "ceiling": {"latent": 0.15, "pixel": 0.15},
"drift": [[9.0, 1.0], [0.5, null]],
"floor": {"latent": 0.001, "pixel": 0.001}, "answer": ["star", "star"]},
{"stratum": "erase", "index": 0, "prompt": "a star", "label": "star", "synonym": false, "seed": 1,
"distance": {"latent": 0.1, "pixel": 0.1}, "ceiling": {"latent": 0.15, "pixel": 0.15},
"drift": [[9.0, 0.4], [0.5, null]],
"answer": ["star", "star"]}],
"pictures": [{"stratum": "erase", "prompt": "a star", "seed": 0, "original": "", "erased": ""}], "finished": false,
"summary": {"strata": {"erase": {"pixel": {"count": 2, "mean": {"value": 0.1, "low": 0.1, "high": 0.1}, "median": 0.1,
"p95": 0.1, "prompts": 1, "floor": 0.001, "ceiling": 0.15, "integrity": {"value": 0.3, "low": 0.3, "high": 0.3}},
"drift": [{"sigma": 9.0, "value": 0.7, "low": 0.4, "high": 1.0}]}}, "scores": null}}
"""


def test_a_record_of_an_earlier_release_goes_on():
    record, pairs = Record.from_json(EARLIER), Shifted(0.1)
    assert record.configuration == {"a": 1} and len(record.rows) == 2 and not record.finished
    first = summarise(record).strata["erase"]
    assert [level.sigma for level in first.drift] == [9.0] and first.drift[0].value == pytest.approx(0.7)
    assert first.distances["pixel"].floor == 0.001
    run(record, pairs=pairs)
    assert pairs.asked[0] == "a <i>pentagram</i>" and "a star" not in pairs.asked and len(record.rows) == 10
    assert summarise(record).strata["erase"].distances["pixel"].prompts == 2


@pytest.mark.parametrize("name", "stratum index prompt label synonym distance ceiling drift".split())
def test_a_row_without_what_all_have_is_no_record(name):
    data = json.loads(EARLIER)
    del data["rows"][1][name]
    assert Record.from_json(json.dumps(data)) is None


@pytest.mark.parametrize("name", ["seed", "floor", "answer"])
def test_a_row_without_what_some_have(name):
    data = json.loads(EARLIER)
    del data["rows"][0][name]
    assert len(Record.from_json(json.dumps(data)).rows) == 2


def test_what_is_shown_is_bounded():
    record = run(Record({}), shown=1)
    assert [(p["stratum"], p["prompt"]) for p in record.pictures] == [("erase", "a star"), ("neighbour", "a heart")]
    large = np.random.default_rng(0).random((500, 300, 3))
    assert decoded_picture(encoded_picture(large)).shape == (160, 96, 3)
    small = np.random.default_rng(0).random((16, 16, 3)).astype(np.float32)
    assert np.abs(decoded_picture(encoded_picture(small)) - small).max() < 0.003


def test_the_page_holds_everything_and_escapes():
    record = run(Record({"steps": 20, "prompts": {"erase": []}}))
    text = page(record, summarise(record))
    assert "a &lt;i&gt;pentagram&lt;/i&gt;" in text and "<i>" not in text
    assert "http" not in text and "<script" not in text
    pictures = [part.split('"', 1)[0] for part in text.split("data:image/png;base64,")[1:]]
    assert len(pictures) == 3 * len(record.pictures)
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (16, 16)
    assert "steps: 20" in text and "Not finished" not in text
    record.finished = False
    assert "Not finished" in page(record, summarise(record)) and "Not finished" in report(record, summarise(record))


def test_pictures_without_and_with_pairs():
    assert grid(Record({})).shape == (160, 160, 3)
    found = grid(run(Record({})))
    assert found.dtype == np.float32 and 0 <= found.min() and found.max() <= 1
    assert found.shape[0] > 2 * 3 * 160 and found.shape[1] > 3 * 160
    assert attack_sheet([("a", "b", torch.rand(2, 16, 16, 3))]).shape == (176, 300 + 2 * 168, 3)


def test_drift_map_is_dark_where_nothing_changed_and_brighter_with_more():
    before = np.zeros((2, 3, 3), np.float32)
    after = before.copy()
    after[0, 1], after[1, 2] = 0.2, 0.9
    found = drift_map(before, after).sum(axis=-1)
    assert found[0, 0] == 0 < found[0, 1] < found[1, 2]


def test_the_judge_knows_the_worlds_names():
    assert pixel_judge.ANSWERS == {**world.NAMES, "shape": (*world.SHAPES, pixel_judge.NONE)}
    assert pixel_judge.SIZE == world.SIZE
    sprites = world.from_index(np.arange(0, 1024, 33))
    pictures = torch.from_numpy(world.render(sprites, np.random.default_rng(0)))
    large = pictures.repeat_interleave(8, 1).repeat_interleave(8, 2)
    answers = demo_judge(["star", "heart"])(large)
    assert answers == [world.SHAPES[i] for i in sprites.shape]
    assert set(demo_judge(["red"])(large)) <= set(world.COLOURS)
    with pytest.raises(ErasureError, match="cannot tell star, red apart"):
        demo_judge(["star", "red"])


def test_zero_shot_takes_the_closest_class():
    judge = zero_shot_judge(["x", "y"], torch.tensor([[2.0, 0.0], [0.0, 0.1]]), lambda pictures: pictures)
    assert judge(torch.tensor([[1.0, 0.2], [0.1, 5.0]])) == ["x", "y"]


def test_distances():
    a, b = torch.rand(3, 4, 2, 2), torch.rand(3, 4, 2, 2)
    for i, found in enumerate(distances.rms(a, b)):
        assert found == pytest.approx(float(np.sqrt(np.mean((a[i].numpy() - b[i].numpy()) ** 2))), rel=1e-6)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert distances.cosine_distance(x, y).item() == pytest.approx(1 - 2**-0.5)


def test_perceptual_distances_are_taken_when_there(monkeypatch, tmp_path):
    with pytest.raises(ErasureError, match='needs the Python package "dreamsim"'):
        distances.perceptual("DreamSim")

    class Fake:
        @staticmethod
        def LPIPS(net, verbose):
            assert net == "alex"

            class Model:
                def train(self, mode):
                    return self

                def __call__(self, a, b):
                    assert a.shape[1] == 3 and a.min() >= -1 and a.min() < 0
                    return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

            return Model()

    monkeypatch.setitem(sys.modules, "lpips", Fake)
    monkeypatch.setattr(distances.importlib.util, "find_spec", lambda name: name == "lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ErasureError, match="nothing is downloaded"):
        distances.perceptual("LPIPS")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    a, b = torch.rand(2, 8, 8, 3), torch.rand(2, 8, 8, 3)
    found = by_pictures(distances.perceptual("LPIPS")).between(a, b)
    assert torch.allclose(found.float(), 2 * (a - b).abs().mean(dim=(1, 2, 3)))


# ---------------------------------------------------------------- the verdict and the page's shape


def measured(erased, kept, answers=None):
    """A finished Record: a prompt that was to be erased and two to be kept; shares of another seed's distance."""
    rows = []
    for stratum, index, prompt, share in [
        (ERASE, 0, "a star", erased),
        *((NEIGHBOUR, i, *k) for i, k in enumerate(kept)),
    ]:
        for seed in (0, 1):
            row = {
                "stratum": stratum, "index": index, "prompt": prompt, "label": prompt.split()[-1], "synonym": False,
                "seed": seed, "distance": {"pixel": 0.2 * share}, "ceiling": {"pixel": 0.2}, "drift": [],
            }  # fmt: skip
            rows.append(row | ({"answer": answers[prompt]} if answers else {}))
    return Record({}, rows=rows, finished=True)


@pytest.mark.parametrize(
    ("erased", "kept", "said"),
    [
        (0.99, 0.01, ["What was to be erased changed as much as by another seed.", "Neighbours hardly changed."]),
        (0.7, 0.2, ["What was to be erased changed strongly.", "Neighbours changed a little."]),
        (0.05, 0.0, ["What was to be erased hardly changed.", "Neighbours hardly changed."]),
    ],
)
def test_the_verdict_says_how_much_each_kind_changed(erased, kept, said):
    record = measured(erased, [("a heart", kept), ("a moon", kept)])
    assert verdict(record, summarise(record)) == said


def test_the_verdict_names_the_kept_prompt_that_changed_most():
    record = measured(0.9, [("a heart", 0.02), ("a moon", 0.5)])
    assert verdict(record, summarise(record))[-1] == 'Watch: "a moon" changed visibly.'
    record.finished = False
    assert verdict(record, summarise(record))[0] == "Not finished."
    assert verdict(Record({}, finished=True), summarise(Record({}))) == []


def test_the_verdict_counts_what_a_classifier_sees():
    answers = {"a star": ["star", "circle"], "a heart": ["heart", "heart"], "a moon": ["moon", "ring"]}
    record = measured(0.9, [("a heart", 0.0), ("a moon", 0.1)], answers)
    assert verdict(record, summarise(record))[:2] == [
        "Star: gone in 2 of 2 pictures (seen in 2 before).",
        "Kept: 2 of 4 others right (4 before).",
    ]


def test_the_page_begins_with_the_verdict_and_folds_the_numbers():
    record = run(Record({}))
    summary = summarise(record)
    text = page(record, summary)
    order = ['<div class="verdict">', "<figure>", "<details><summary>The numbers", "<summary>Settings"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for sentence in verdict(record, summary):
        assert html.escape(sentence) in text[: places[1]]
    assert report(record, summary).startswith(" ".join(verdict(record, summary)))
    assert "prefers-color-scheme: dark" in text and "initial-scale=1" in text
    assert text.count("<table") == text.count('<div class="wide"><table')
    figure = text[places[1] : text.index("</figure>")]
    assert [part.split('"')[0] for part in figure.split('alt="')[1:]] == ["original", "erased", "difference"]
