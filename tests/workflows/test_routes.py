"""The routes of the page's elements: what they answer, and what they refuse."""

import json
import re
import urllib.error

import pytest
from membrane.tools import ROOT
from membrane.tools.run.comfy_server import PACK_NAME

DOCS = ROOT / "web" / "docs"
HELP = [page.relative_to(DOCS).as_posix() for page in sorted(DOCS.rglob("*.md"))]

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def file(server):
    """An adapter's name on the server; the file is removed afterwards."""
    erase = {"concepts": "star -> circle", "replace_with": "", "preserve": "", "method": "UCE", "strength": 1.0}
    prompt = {
        "1": {"class_type": "MembraneDemoModel", "inputs": {"variant": "day"}},
        "2": {"class_type": "MembraneErase", "inputs": {"model": ["1", 0], "clip": ["1", 1], **erase}},
        "3": {"class_type": "MembraneSaveAdapter", "inputs": {"adapter": ["2", 1], "filename_prefix": "routes/star"}},
    }
    name = server.wait(server.queue(prompt))["outputs"]["3"]["text"][0]
    yield name
    for folder in (server.host / "models" / "erasure_adapters", *server.work.rglob("erasure_adapters")):
        (folder / name).unlink(missing_ok=True)


def refusal(ask):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask()
    return caught.value.code, json.loads(caught.value.read())["error"]


@pytest.mark.parametrize("page", HELP)
def test_pictures_of_help_pages_are_where_the_page_looks_for_them(server, page):
    """Below the address at which the host serves a pack's files; translations find those of the English page."""
    folder, text = f"/extensions/{PACK_NAME}/docs", (DOCS / page).read_text(encoding="utf-8")
    assert server.get(f"{folder}/{page}").decode() == text
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert server.get(f"{folder}/{picture}") == (DOCS / picture).read_bytes()


def test_what_a_file_is(server, file):
    found = server.get(f"/membrane/adapter?name={file}")
    assert (found["method"], found["concepts"], found["surrogates"]) == ("UCE", ["star"], ["circle"])
    assert found["size"] > 1000 and {"family", "licence", "name"} <= found.keys()


@pytest.mark.parametrize("name", ["../../main.py", "/etc/passwd", "..%5C..%5Cmain.py", "", "no.safetensors"])
def test_nothing_outside_the_folder_is_named(server, name):
    code, sentence = refusal(lambda: server.get(f"/membrane/adapter?name={name}"))
    assert code == 400 and "was not found in" in sentence


def test_which_rows_the_words_open(server, file):
    entry = {"adapter": file, "permeability": {"mode": "facilitated transport"}}
    text = json.dumps({"membrane_stack": 1, "entries": [entry, {"adapter": file, "strength": 0.5}]})
    ask = {"stack_json": text, "text": "a star"}
    rows = server.post("/membrane/openings", ask)["rows"]
    assert [(r["index"], r["mode"], r["value"]) for r in rows] == [(0, "facilitated transport", 1.0), (1, "fixed", 0.5)]
    assert server.post("/membrane/openings", {**ask, "text": "a heart"})["rows"][0]["value"] == 0.0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"stack_json": "{", "text": ""}, "not valid JSON"),
        ({"stack_json": '{"membrane_stack": 1, "entries": [{"adapter": "../x"}]}', "text": ""}, "was not found in"),
        ({"stack_json": 1, "text": ""}, "holds no text and stack"),
        ([], "holds no text and stack"),
        ({"stack_json": "", "text": "x" * (1 << 20)}, "larger than"),
    ],
)
def test_what_is_no_question(server, body, sentence):
    code, found = refusal(lambda: server.post("/membrane/openings", body))
    assert code == 400 and sentence in found and "\n" not in found


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        ({"concepts": "star -> circle"}, []),
        ({}, []),
        ({"concepts": " \n", "preserve": "heart", "templates": "automatic", "kind": "object"}, []),
        ({"concepts": "-> circle"}, [("error", 'names no concept before "->"')]),
        ({"concepts": "a -> b -> c"}, [("error", "has 2 arrows")]),
        ({"concepts": "art", "kind": "style"}, [("error", "is to be replaced by itself")]),
        ({"concepts": "star", "surrogate": "star"}, [("error", "is to be replaced by itself")]),
        ({"concepts": "star, moon, heart"}, [("warning", "write one per line to erase all three")]),
        ({"concepts": "star: circle"}, [("warning", 'write "concept -> replacement"')]),
        ({"concepts": "star", "preserve": "heart\nStar"}, [("warning", "is also to be kept")]),
        ({"templates": "a photo"}, [("error", "has 0 places for the concept")]),
        (
            {"concepts": "star, moon", "templates": "a photo"},
            [("error", "has 0 places"), ("warning", "was taken as one concept")],
        ),
    ],
)
def test_what_is_wrong_with_words(server, words, hints):
    found = server.post("/membrane/words", words)["hints"]
    assert [hint["level"] for hint in found] == [level for level, _ in hints]
    assert all(part in hint["text"] and hint["text"].endswith(".") for hint, (_, part) in zip(found, hints))


@pytest.mark.parametrize("body", [[], {"concepts": 1}, {"concepts": "a", "kind": ["object"]}, "star"])
def test_what_are_no_words(server, body):
    code, found = refusal(lambda: server.post("/membrane/words", body))
    assert code == 400 and "holds no words" in found


def test_newer_hosts_list_the_blueprint(server):
    try:
        found = server.get("/global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this host has no subgraphs")
    assert "Erase Concepts with Captions" in {entry["name"] for entry in found.values()}
