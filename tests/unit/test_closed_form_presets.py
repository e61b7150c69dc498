"""Presets: the published numbers of each method for each kind of concept."""

from dataclasses import fields

import pytest
from membrane.core.erasers.closed_form.job import METHODS, Job
from membrane.core.erasers.closed_form.presets import KINDS, PRESETS, published, surrogate_of
from membrane.core.text.concepts import parse_templates


def settings_of(method):
    return {field.name for field in fields(METHODS[method].settings)}


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_preset_sets_everything_its_method_reads(kind, method):
    found = published(kind, method, 3)
    by_node = {"safe_anchor"}  # follows from the surrogates
    speed = {"lam", "prior_filter"}  # not on the node, so the defaults of a job hold elsewhere
    rounds = {"edit_erase_scale", "edit_preserve_scale", "edit_anchor"}  # the published ones are the defaults
    assert settings_of(method) - by_node - speed - rounds <= set(found) <= settings_of(method)
    Job.of((), **found)
    assert parse_templates("\n".join(PRESETS[kind].templates)) == list(PRESETS[kind].templates)
    assert KINDS[0] == "custom" and kind in KINDS


def test_the_published_numbers():
    assert published("nudity", "RECE", 0) == {
        "erase_scale": 1.0, "anchor": 0.5, "penalty_on": "length", "epochs": 3, "penalty": 0.1, "preserve_scale": 1.0,
    }  # fmt: skip
    assert published("style", "RECE", 1734)["penalty"] == 1e-3
    assert published("nudity", "SPEED", 0) == {
        "tau": 0.1, "rho": 0.7, "lam": 0.5, "prior_filter": True, "tokens": "all",
    }  # fmt: skip
    people = published("person", "SPEED", 100)
    assert (people["tau"], people["rho"], people["prior_filter"]) == (1e-4, 0.05, False)


@pytest.mark.parametrize(("lines", "scale"), [(0, 1.0), (2, 0.333), (9, 0.1), (1734, 0.1)])
def test_the_weight_of_a_preserved_prompt(lines, scale):
    assert published("object", "UCE", lines)["preserve_scale"] == scale


def test_what_takes_the_place_of_a_concept():
    assert [surrogate_of(kind, "UCE") for kind in PRESETS] == ["", "art", "person", ""]
    assert {surrogate_of(kind, "Double Projections") for kind in PRESETS} == {""}
