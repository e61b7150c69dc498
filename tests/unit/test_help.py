"""The help pages: one screen first, with what a newcomer needs, and everything else folded."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent.parent
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
NODES = json.loads((ROOT / "tests" / "contract" / "nodes.json").read_text(encoding="utf-8"))
FOLD = "<details>"
MOST_LINES, MOST_INPUTS = 32, 5


@pytest.fixture(params=PAGES, ids=lambda page: page.stem)
def page(request):
    return request.param


def test_every_node_has_one():
    assert {page.stem for page in PAGES} == set(NODES)


def test_the_first_screen(page):
    """A picture, three steps, and at most five inputs, each by its label and its name."""
    first = page.read_text(encoding="utf-8").split(FOLD)[0]
    assert len(first.splitlines()) <= MOST_LINES
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", first)
    assert (page.parent / picture).is_file()
    assert re.findall(r"^(\d)\. ", first, re.MULTILINE) == ["1", "2", "3"]
    rows = re.findall(r"^\| (.+?) \| ", first, re.MULTILINE)[1:]
    assert 1 <= len(rows) <= MOST_INPUTS
    known = {input["name"] for input in NODES[page.stem]["inputs"]}
    for row in rows:
        label, names = re.fullmatch(r"(.+) \((.+)\)", row).groups()
        assert label[0].isupper() and set(names.split(", ")) <= known, row


def test_the_rest_is_folded(page):
    """And every fold is closed again, with a title."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^## ", text, re.MULTILINE)
    parts = text.split(FOLD)[1:]
    for part in parts:
        assert part.startswith("\n<summary>") and part.count("</details>") == part.count("</summary>") == 1
        assert not part.split("</details>")[1].strip()
