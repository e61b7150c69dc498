"""What nodes say and show after a run, in a real browser on a real server: what scenarios_parts.mjs does there."""

import re
from pathlib import Path

import pytest

SCENARIOS = re.findall(
    r"(?m)^    async (\w+)\(", (Path(__file__).parent / "scenarios_parts.mjs").read_text(encoding="utf-8")
)
OURS = {"what_a_run_said_fades_while_the_next_one_runs_and_is_replaced"}  # what is the same on every page


@pytest.mark.workflow
@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=[pytest.mark.slow] if name in OURS else []) for name in SCENARIOS]
)
def test_scenario(outcomes, scenario):
    found = outcomes.get(scenario) or outcomes.get(None, {"error": "the scenario was not run", "absent": None})
    if found.get("absent"):
        pytest.skip(found["absent"])
    assert not found["error"], found["error"]
