"""Scores, calibration and maps of the memorisation detector against their formulas."""

import json
import math

import numpy as np
import pytest
import torch
from membrane.core.errors import ErasureError
from membrane.core.measures.detection import Calibration, Trace, bright_ending, heat_map, magnitude, text_part, words_of
from membrane.core.measures.detection_report import plot, report, rows, suspicious

SETTINGS = {"steps": 50, "first_steps": 5, "seeds": 4, "cfg": 7.5}
SCORES = tuple(1 + 0.01 * i for i in range(100))


def calibration(scores=SCORES, probe=(1.0, -2.0, 0.5)):
    return Calibration(SETTINGS, probe, scores)


@pytest.mark.parametrize("kind", ["noise", "v"])
def test_the_text_part_is_the_difference_of_the_predicted_noise(kind):
    """On toy networks that predict noise, and v: both denoised tensors are made by the definition of each."""
    rng = np.random.default_rng(0)
    x, on, off = rng.normal(size=(3, 2, 4, 5, 6))
    sigma = np.array([9.0, 0.7])
    s = sigma[:, None, None, None]
    if kind == "noise":
        denoised = [x - s * out for out in (on, off)]
        expected = on - off
    else:  # x = a x0 + b e with a^2 + b^2 = 1, sigma = b / a; v = a e - b x0; the host's x is x / a
        a, b = 1 / np.sqrt(1 + s**2), s / np.sqrt(1 + s**2)
        denoised = [a * (a * x) - b * v for v in (on, off)]
        noise = [b * (a * x) + a * v for v in (on, off)]
        expected = noise[0] - noise[1]
    found = text_part(*(torch.from_numpy(d) for d in denoised), torch.from_numpy(sigma))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    lengths = [math.sqrt(sum(v * v for v in row.ravel())) * math.sqrt(16384 / (4 * 5 * 6)) for row in expected]
    np.testing.assert_allclose(magnitude(found).numpy(), lengths, rtol=1e-12)


def test_a_trace_means_over_steps_and_seeds():
    trace = Trace("a", torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]))
    assert trace.score == 4 and trace.curve == [3, 4, 5] and trace.by_seed == [2, 6]


def test_a_calibration_says_what_is_normal_and_survives_its_file():
    found = Calibration.from_json(calibration().to_json(), "file")
    assert found == calibration()
    mean = sum(SCORES) / 100
    std = math.sqrt(sum((s - mean) ** 2 for s in SCORES) / 99)
    assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)
    assert found.p99 == pytest.approx(1.9801)  # between the 99th and the 100th of 100
    assert found.z(mean + 2 * std) == pytest.approx(2)


def test_a_probe_tells_models_apart():
    found = calibration()
    assert found.fits((1.0, -2.0, 0.5001)) and not found.fits((1.0, -2.0, 0.6))
    assert not found.fits((1.0, -2.0)) and found.distance((2.0, -2.0, 0.5)) == pytest.approx(1 / math.sqrt(5.25))


def test_mistakes_of_a_calibration_are_sentences():
    with pytest.raises(ErasureError, match="at least 20 different benign prompts.*there are 19"):
        calibration(SCORES[:19])
    good = json.loads(calibration().to_json())
    for damage in (
        "", "[]", "{", json.dumps({**good, "format": "other"}), json.dumps({**good, "scores": good["scores"][:3]}),
        json.dumps({**good, "probe": ["x"]}), json.dumps({**good, "scores": [float("nan")] * 30}),
        json.dumps({**good, "settings": 3}), json.dumps({**good, "version": 9}),
    ):  # fmt: skip
        with pytest.raises(ErasureError, match='"SD15_1.json" is damaged .* calibrate again'):
            Calibration.from_json(damage, "SD15_1.json")


def test_bright_ending_against_its_formula():
    rng = np.random.default_rng(1)
    deltas = rng.normal(size=(3, 2, 4, 4, 6))
    m = rng.uniform(size=(2, 4, 6))
    expected = []
    for row in range(2):
        lengths = []
        for delta in deltas:
            lengths.append(math.sqrt(sum((delta[row, c, i, j] * m[row, i, j]) ** 2
                                         for c in range(4) for i in range(4) for j in range(6))))  # fmt: skip
        expected.append(sum(lengths) / 3 / m[row].mean() * math.sqrt(16384 / 96))
    found = bright_ending([torch.from_numpy(d) for d in deltas], torch.from_numpy(m))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_heat_map_goes_from_0_to_1_at_the_pictures_size():
    attention = torch.tensor([[0.2, 0.2], [0.2, 0.6]])
    found = heat_map(attention, 16, 24)
    assert found.shape == (16, 24) and found.min() == 0 and found.max() == 1
    assert found[-1, -1] == 1 and found[0, 0] == 0
    assert (heat_map(torch.ones(2, 2), 4, 4) == 0).all()


def test_tokens_are_put_together_to_words():
    pieces = [("por", False), ("trait", True), ("of", True), (None, True)]
    found = words_of(pieces, [0.1, 0.5, 0.7, 0.2])
    assert [(w.text, w.influence) for w in found] == [("of", 0.7), ("portrait", 0.5), ("[token 4]", 0.2)]
    assert words_of([("a", False)], [1.0])[0].text == "a" and words_of([], []) == []


def test_report_and_plot():
    traces = [Trace("calm", torch.full((4, 5), 1.5)), Trace("a memorised one", torch.full((4, 5), 3.0))]
    plain = rows(traces)
    text = report(plain, SETTINGS, source="calibrate first.")
    assert "No verdict, only a ranking: calibrate first." in text and "memorised\n" not in text
    assert text.index("a memorised one") < text.index("calm")
    assert suspicious(traces, None, 1) == [1] and suspicious(traces, calibration(), 1) == [1]
    judged = rows(traces, calibration(), [0.5, 0.7], {1: words_of([("one", True)], [2.0])})
    assert [row["memorised"] for row in judged] == [False, True]
    assert judged[1]["z"] == pytest.approx(calibration().z(3.0))
    text = report(judged, SETTINGS, calibration(), "file")
    assert "1 of 2 above p99" in text and "one 100%" in text and "bright ending 0.700" in text
    for picture in (plot(plain), plot(judged, calibration()), plot([]), plot(rows([Trace("x", torch.ones(1, 1))]))):
        assert picture.shape == (520, 900, 3) and 0 <= picture.min() and picture.max() == 1
    assert report([], SETTINGS, calibration(), "file").startswith("Calibration: 100 prompts")
