"""The translations have every text of the nodes, and only texts that the page shows as they stand.

Which nodes, inputs and outputs there are comes from the contract's snapshot; tests/host/test_locales.py compares the
English texts with the nodes themselves. When one of these fails after a node has changed:
run tools/check/locales.py, then translate what it names.
"""

import json
import re
from pathlib import Path

import pytest
from membrane.tools.check.locales import LANGUAGES, flat, page_strings, plain, read

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "locales").rglob("*.json"))
SCRIPTS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff]"}
ASCII_NAMES = {"CLIP", "VAE", "CFG", "JSON", "eta", "tau", "rho", "top_k", "Bright Ending"}
DIGITS = re.compile(r"\d+(?:\.\d+)?")


def expected():
    """Keys of everything the contract's nodes have to say."""
    nodes = json.loads((ROOT / "tests" / "contract" / "nodes.json").read_text(encoding="utf-8"))
    for node, said in nodes.items():
        yield from (f"{node}.display_name", f"{node}.description")
        places = [f"inputs.{entry['name']}" for entry in said["inputs"]]
        for place in places + [f"outputs.{i}" for i in range(len(said["outputs"]))]:
            yield from (f"{node}.{place}.name", f"{node}.{place}.tooltip")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_has_every_text_of_the_nodes(language):
    there, wanted = set(flat(read(language))), set(expected())
    assert there == wanted, f"run tools/check/locales.py, then translate: {sorted(wanted ^ there)}"


def test_english_has_them_too_but_for_what_the_page_would_misread():
    english, wanted = flat(read("en")), set(expected())
    assert english.keys() <= wanted
    assert all(key.endswith(".tooltip") for key in wanted - english.keys())
    assert len(wanted - english.keys()) < 10, "tools/check/locales.py has not been run for a while"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_text_is_shown_as_it_stands(path):
    assert path.name in ("main.json", "nodeDefs.json")  # the host reads these, and two more that are not needed
    for key, text in flat(json.loads(path.read_text(encoding="utf-8"))).items():
        assert isinstance(text, str) and text.strip() == text != "", key
        assert plain(text) and "\n" not in text, f"{key} has a character that the page takes for a placeholder"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_in_their_language_and_keep_the_numbers(language):
    english, translated = flat(read("en")), flat(read(language))
    for key, text in translated.items():
        assert re.search(SCRIPTS[language], text) or language == "ja" and re.search("[\u4e00-\u9fff]", text) or (
            key.endswith(".name") and text in ASCII_NAMES
        ), f"{key} is not translated: {text}"  # fmt: skip
        lost = set(DIGITS.findall(english.get(key, ""))) - set(DIGITS.findall(text))
        assert not lost, f"{key} says {text!r} without {sorted(lost)}"


def test_menu_entries_are_those_of_the_page():
    entry = re.search(r'TITLE = "([^"]+)"', (ROOT / "web" / "js" / "erase_here.js").read_text(encoding="utf-8"))[1]
    assert read("en", "main.json") == {"contextMenu": {entry: entry}, "membrane": page_strings()}
    for language in LANGUAGES:
        assert list(flat(read(language, "main.json")["contextMenu"])) == [entry]
