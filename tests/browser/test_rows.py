"""Rows of words, menus, dropped files, hints and the first hour, in a real browser on a real server.

What scenarios_rows.mjs and scenarios_hour.mjs do there.
"""

import re
from pathlib import Path

import pytest

SCENARIOS = [
    name
    for file in ("scenarios_rows.mjs", "scenarios_hour.mjs")
    for name in re.findall(r"(?m)^    async (\w+)\(page\)", (Path(__file__).parent / file).read_text(encoding="utf-8"))
]


@pytest.mark.workflow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(outcomes, scenario):
    found = outcomes.get(scenario) or outcomes.get(None, {"error": "the scenario was not run", "absent": None})
    if found.get("absent"):
        pytest.skip(found["absent"])
    assert not found["error"], found["error"]
