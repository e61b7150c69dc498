"""What a pytest run said, read from its JUnit report."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import NamedTuple


class Report(NamedTuple):
    """How many tests passed, the names of those that failed, {reason: how many} of those that were skipped, {name
    without parameters: seconds} of all."""

    passed: int
    failed: list[str]
    skipped: dict[str, int]
    seconds: dict[str, float] = {}

    @property
    def counts(self):
        """The numbers as text."""
        parts = {"passed": self.passed, "failed": len(self.failed), "skipped": sum(self.skipped.values())}
        return ", ".join(f"{count} {word}" for word, count in parts.items() if count or word == "passed")


def report_options(file):
    """pytest's options that make it write a report into a file."""
    return [f"--junitxml={file}", "-o", "junit_family=xunit2"]


def read_report(file):
    """Report of a file that pytest wrote; None when it wrote none, because it was stopped or asked for help only."""
    if not file.is_file():
        return None
    passed, failed, skipped, seconds = set(), [], Counter(), Counter()
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        seconds[name.partition("[")[0]] += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (reason := case.find("skipped")) is not None:
            skipped[reason.get("message")] += 1
        else:
            passed.add((case.get("classname"), case.get("name")))
    return Report(len(passed), failed, dict(skipped), dict(seconds))
