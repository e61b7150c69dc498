"""The stack editor in a real browser, on a real server: what scenarios.mjs does there."""

import re
from pathlib import Path

import pytest

SCENARIOS = re.findall(r"(?m)^    async (\w+)\(", (Path(__file__).parent / "scenarios.mjs").read_text(encoding="utf-8"))


OURS = {  # what is the same on every page
    "the_line_below_says_what_the_prompts_words_open",
    "rows_are_edited_moved_copied_and_removed",
    "older_and_foreign_entries_load_and_lose_nothing",
    "malformed_text_shows_one_sentence_and_loses_nothing",
    "a_keystroke_touches_its_own_row_only",
    "the_loader_shows_what_its_file_is",
}


@pytest.mark.workflow
@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[pytest.mark.slow] if name in OURS else []) for name in SCENARIOS]
)
def test_scenario(outcomes, scenario):
    found = outcomes.get(scenario) or outcomes.get(None, {"error": "the scenario was not run", "absent": None})
    if found.get("absent"):
        pytest.skip(found["absent"])
    assert not found["error"], found["error"]
