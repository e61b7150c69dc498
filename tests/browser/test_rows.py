"""Rows of words, menus, dropped files and hints, in a real browser on a real server: what scenarios_rows.mjs does."""

import re
from pathlib import Path

import pytest

SCENARIOS = re.findall(
    r"(?m)^    async (\w+)\(", (Path(__file__).parent / "scenarios_rows.mjs").read_text(encoding="utf-8")
)


@pytest.mark.workflow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(outcomes, scenario):
    found = outcomes.get(scenario) or outcomes.get(None, {"error": "the scenario was not run", "absent": None})
    if found.get("absent"):
        pytest.skip(found["absent"])
    assert not found["error"], found["error"]
