"""The help pages: one screen first, with what a newcomer needs, and everything else folded."""

import json
import re
from pathlib import Path

import pytest
from membrane.tools.help_pictures import PICTURES

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


TRANSLATED = sorted((ROOT / "web" / "docs").glob("*/??.md"))
ALPHABETS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]"}


def first_screen(page):
    """(pictures, numbers of the steps, inputs named in the table) of a page before what is folded."""
    first = page.read_text(encoding="utf-8").split(FOLD)[0]
    rows = re.findall(r"^\| [^|]+ \(([^)|]+)\) \| ", first, re.MULTILINE)
    return re.findall(r"\]\(([^)]+)\)", first), re.findall(r"^(\d)\. ", first, re.MULTILINE), rows


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_a_short_help_in_another_language_is_the_first_screen(page):
    """The host gives it to a page of that language in the place of the English one."""
    assert first_screen(page) == first_screen(page.parent.with_suffix(".md"))
    assert len(re.findall(ALPHABETS[page.stem], page.read_text(encoding="utf-8"))) > 200


def test_the_nodes_for_every_day_have_one_in_each_language():
    daily = ("MembraneCompare", "MembraneErase", "MembraneForget", "MembraneStackEditor")
    assert [(page.parent.name, page.stem) for page in TRANSLATED] == [(n, one) for n in daily for one in ("ja", "zh")]


def test_what_a_node_does_is_shown_before_and_after():
    """On the pages of the nodes that a script draws (tools/help_pictures.py); small, and no larger altogether."""
    pictures = {picture.stem: picture.stat().st_size for picture in (ROOT / "web/docs/img").glob("*_before_after.png")}
    assert pictures.keys() == {f"{name}_before_after" for name in PICTURES}
    assert max(pictures.values()) < 10_000
    for name in PICTURES:
        first = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8").split(FOLD)[0]
        assert f"(img/{name}_before_after.png)" in first


def test_the_rest_is_folded(page):
    """And every fold is closed again, with a title."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^## ", text, re.MULTILINE)
    parts = text.split(FOLD)[1:]
    for part in parts:
        assert part.startswith("\n<summary>") and part.count("</details>") == part.count("</summary>") == 1
        assert not part.split("</details>")[1].strip()
