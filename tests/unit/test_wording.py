"""Wording: built-in captions by a word, and the demo world's styles that no template of the pack has."""

import pytest
from membrane.core.erasers.closed_form.daily import daily_job
from membrane.core.erasers.closed_form.job import Job
from membrane.core.erasers.closed_form.presets import CUSTOM, PRESETS, chosen
from membrane.core.text.captions import KINDS, captions_of, templates_for, templates_of
from membrane.core.text.concepts import fill, mentions
from membrane.tools.pixel_world import world
from membrane.tools.pixel_world.styles import IN_STYLE, captions_in, styles_of


@pytest.mark.parametrize("text", ["automatic", " Automatic\n"])
def test_one_word_stands_for_the_built_in_captions(text):
    assert templates_of(text) == list(captions_of("anything").templates)
    assert len(templates_of(text)) == 24


def test_own_captions_and_the_bare_word_are_taken_as_they_are():
    assert templates_of("{}\na photo of {}") == ["{}", "a photo of {}"]
    assert templates_of("{}") == templates_of("") == ["{}"]


def test_automatic_captions_that_have_the_words_are_left_out_and_own_ones_are_not():
    assert templates_for("automatic", ["a fish"]) == templates_of("automatic")
    without_red = [template for template in templates_of("automatic") if "red" not in template.split()]
    assert templates_for("automatic", ["red"]) == without_red and 0 < len(without_red) < 24
    assert templates_for("a red {}", ["red"]) == ["a red {}"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_says_what_the_word_stands_for(kind):
    assert daily_job("star", (), kind, templates="automatic") == daily_job("star", (), kind)
    assert daily_job("star", (), kind, templates="{}").templates != captions_of(kind).templates


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_stands_in_every_caption(kind):
    job = daily_job("star -> circle", ("heart",), kind)
    assert {fill(template, "heart") for template in captions_of(kind).templates} <= set(job.captions())


def test_a_built_in_caption_that_names_a_concept_is_left_out():
    job = daily_job("striped -> plain\nRed", ("dotted", "green"), "anything")
    assert 12 <= len(job.templates) < 24 and set(job.templates) < set(captions_of("anything").templates)
    assert not any(mentions(prompt, "striped") or mentions(prompt, "red") for prompt in job.captions())
    assert "a dotted {} heart" in job.templates  # what is kept may stand in it
    assert job.templates == daily_job("RED\nstriped", (), "anything").templates


def test_own_captions_are_all_taken_with_the_anchor_weight_as_it_is():
    own = daily_job("striped", (), "anything", templates="a striped {}\n{}", anchor=0.2)
    assert own.templates == ("a striped {}", "{}") and own.settings.anchor == 0.2


@pytest.mark.parametrize("method", ["UCE", "RECE"])
def test_weights_with_built_in_captions_are_those_of_one_concept_in_one_caption(method):
    given = {"templates": "automatic", "anchor": 0.2}
    expert = Job.from_text("red", "", (), method=method, **chosen(CUSTOM, method, 0, given))
    assert len(expert.templates) == 23 and expert.settings.anchor == pytest.approx(23 * 0.2)
    assert daily_job("red", (), "anything", method=method, **given) == expert
    several = daily_job("star\nmoon", (), "anything", method=method, **given)
    assert len(several.templates) == 24 and several.settings.anchor == pytest.approx(48 * 0.2)
    assert (expert.settings.preserve_scale, several.settings.preserve_scale) == (1.0, 2.0)


def test_published_presets_keep_their_captions_and_their_anchor_weight():
    job = Job.from_text("picture", "", (), **chosen("object", "UCE", 0, {"templates": "automatic"}))
    assert job.templates == PRESETS["object"].templates and job.settings.anchor == 0.5


@pytest.mark.parametrize("attribute", ["shape", "colour", "texture", "background"])
def test_no_template_of_the_pack_writes_a_held_out_style(attribute):
    sprites = world.from_index(range(0, 1024, 37))
    names = [world.NAMES[attribute][i] for i in getattr(sprites, attribute)]
    names += [world.SYNONYMS[name] for name in names] if attribute == "shape" else []
    templates = {t for kind in KINDS for t in captions_of(kind).templates} | {
        t for p in PRESETS.values() for t in p.templates
    }
    ours = {fill(template, name).lower() for template in templates for name in names}
    for style in styles_of(attribute):
        captions = captions_in(style, attribute, sprites)
        assert len(set(captions)) > 1
        if style not in (IN_STYLE, "bare word"):  # the bare word is in every set of templates
            assert not ours & {caption.lower() for caption in captions}, style


@pytest.mark.parametrize("attribute", ["shape", "colour", "texture"])
def test_every_style_names_the_value_once(attribute):
    sprites = world.from_index([700])
    value = world.NAMES[attribute][getattr(sprites, attribute)[0]]
    for style in styles_of(attribute):
        name = world.SYNONYMS[value] if style == "synonym" else value
        assert captions_in(style, attribute, sprites)[0].lower().count(name) == 1
