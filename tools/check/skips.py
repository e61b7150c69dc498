"""A pytest plugin: a test that is skipped for a reason that nobody allowed fails.

A run in which a tool or a file is missing would otherwise pass by not testing.
"""

import re
from pathlib import Path

import pytest

from .. import ROOT

ALLOWED = ROOT / "tests" / "allowed_skips.txt"


def allowed_reasons(file=ALLOWED):
    """The regular expressions in a file, one a line; lines that start with # are remarks."""
    lines = (line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


class Skips:
    """Turns the report of a skipped test into that of a failed one unless a pattern matches the whole reason."""

    def __init__(self, patterns=None):
        self.patterns = allowed_reasons() if patterns is None else patterns

    def judge(self, report):
        """Changes the report of a test or of a file in place."""
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(pattern.fullmatch(reason) for pattern in self.patterns):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that tests/{ALLOWED.name} does not list: {reason}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        self.judge(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        report = yield
        self.judge(report)
        return report
