"""docs/field_tests.md and docs/first_hour.md name tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
MISTAKES = (TESTS.parent / "docs" / "first_hour.md").read_text(encoding="utf-8").partition("## Mistakes")[2]
TABLE = (TESTS.parent / "docs" / "field_tests.md").read_text(encoding="utf-8")


def test_each_fault_is_held_by_a_test_that_is_there():
    faults = TABLE.partition("## The packs themselves")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| ---"))]
    assert len(rows) > 40
    for row in rows:
        named = re.findall(r"((?:host|unit|workflows)/\w+\.py)::(test_\w+)", row)
        assert named, f"no test holds: {row}"
        for file, name in named:
            assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file} has no {name}"


def test_each_mistake_is_held_by_a_test_or_a_scenario_that_is_there():
    scenarios = "".join(file.read_text(encoding="utf-8") for file in (TESTS / "browser").glob("scenarios*.mjs"))
    rows = [
        line for line in MISTAKES.splitlines() if line.startswith("| ") and not line.startswith(("| mist", "| ---"))
    ]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"((?:host|unit|workflows|browser)/\w+\.py)::(\w+)", row)
        assert named, f"no test holds: {row}"
        for file, name in named:
            there = f"async {name}(" in scenarios if file.startswith("browser/") else False
            assert there or f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), f"{file} has no {name}"
