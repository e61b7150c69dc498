"""What the page says: English in web/js/strings.js, the other languages in locales/<language>/main.json."""

import re

import pytest
from membrane.core.adapters.permeability import MODES, NEGATIVES
from membrane.core.text.captions import KINDS
from membrane.tools import ROOT
from membrane.tools.check.locales import LANGUAGES, page_strings, read

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "web" / "js").rglob("*.js"))}
SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]"}
DIGITS = re.compile(r"(?<![%\d.])\d+(?:\.\d+)?")
FIELDS = {"strength", "start_percent", "end_percent"} | {
    f"permeability.{name}" for name in ("mode", "factor", "threshold", "negative", "top_k")
}
FIELDS |= {"words", "keep", "kind"}
BUTTONS = {f"bar.{name}{more}" for name in ("add", "words", "all-on", "all-off", "text") for more in ("", ".hint")}
MADE = {  # keys that modules put together from what a thing is called
    *(f"caption.{field}" for field in FIELDS),
    *(f"hint.{field}" for field in FIELDS),
    *(f"mode.{mode}" for mode in MODES),
    *(f"negative.{choice}" for choice in NEGATIVES),
    *(f"kind.{kind}" for kind in KINDS),
    "placeholder.words",
    "placeholder.keep",
    *BUTTONS,
}


def places(text):
    return sorted(re.findall(r"%\d", text))


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_every_string_of_the_page(language):
    english, translated = page_strings(), read(language, "main.json")["membrane"]
    assert list(translated) == list(english)
    for key, text in translated.items():
        words = re.search("[a-z]", re.sub(r"%\d", "", english[key]))
        assert not words or re.search(SCRIPTS[language], text), f"{key} is not translated: {text}"
        assert places(text) == places(english[key]), f"{key} puts in other values: {text}"
        assert set(DIGITS.findall(english[key])) <= set(DIGITS.findall(text)), f"{key} has lost a number: {text}"


def test_english_is_what_the_page_says():
    assert read("en", "main.json")["membrane"] == page_strings()
    for key, text in page_strings().items():
        found = places(text)
        assert found == [f"%{i + 1}" for i in range(len(found))], f"{key}: {text}"


def test_every_string_is_used_and_every_one_that_is_used_is_there():
    named = {
        key for name, source in SOURCES.items() if name != "strings.js"
        for key in re.findall(r'"([a-z]+(?:[.][a-z_-]+)*)"', source) if key in page_strings()
    }  # fmt: skip
    asked = {key for source in SOURCES.values() for key in re.findall(r'\bt\("([^"]+)"', source)}
    assert asked | MADE <= page_strings().keys()
    assert page_strings().keys() <= named | MADE


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"strings.js", "stack_style.js"}))
def test_no_sentence_is_written_elsewhere(name):
    code = re.sub(r"(?m)^\s*(?://|\*|/\*).*$", "", SOURCES[name])
    sentences = re.findall(r"""["'`]([A-Z][a-z]+ [a-z][^"'`]*)["'`]""", code)
    said = re.findall(r"""(?:title|placeholder|"aria-label"|textContent)(?::|"?,| =) ["'`]([^"'`]+)["'`]""", code)
    assert sentences + said == (["Erase a concept here"] if name == "erase_here.js" else [])  # the page translates it
