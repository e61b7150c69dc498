"""Runs the host tests on ComfyUI releases and writes docs/compatibility.md from what they said.

python tools/compatibility.py            every host known here
python tools/compatibility.py v0.33.0    one of them; the others keep their last result in output/compatibility
"""

import datetime
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import hosts  # noqa: E402

RESULTS = ROOT / "output" / "compatibility"
TABLE = ROOT / "docs" / "compatibility.md"
REASONS = 6  # of skipped tests that are named


def run(host):
    """Runs tests/host on one host and keeps pytest's report."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    report = RESULTS / f"{host.name}.xml"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "MEMBRANE_HOST": str(host.path)}
    command = [sys.executable, "-m", "pytest", "-q", "tests/host", f"--junitxml={report}", "-o", "junit_family=xunit2"]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


def outcome(report):
    """({"tests", "failures", "errors", "skipped": int, "time": s}, names of failed tests, reasons of skipped ones)."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed, reasons = [], {}
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}")
        if (skipped := case.find("skipped")) is not None:
            reasons[skipped.get("message")] = reasons.get(skipped.get("message"), 0) + 1
    return {**counts, "time": float(suite.get("time"))}, failed, reasons


def table(found):
    """Markdown of {host's label: outcome()}."""
    lines = [
        "# ComfyUI releases",
        "",
        f"Written by `python tools/compatibility.py`, {datetime.date.today()}, Python "
        f"{'.'.join(map(str, sys.version_info[:2]))} on {platform.system()}, CPU only: tests/host in the process of "
        "each release, with its own nodes. The server and the page are tested by tests/workflows and tests/browser.",
        "",
        "| ComfyUI | passed | failed | skipped |",
        "|---|---|---|---|",
    ]
    for label, (counts, _, _) in found.items():
        bad = counts["failures"] + counts["errors"]
        lines.append(f"| {label} | {counts['tests'] - bad - counts['skipped']} | {bad} | {counts['skipped']} |")
    for label, (_, failed, reasons) in found.items():
        lines += [f"\n{label} failed: {', '.join(failed)}"] if failed else []
        shown = sorted(reasons.items(), key=lambda item: -item[1])[:REASONS]
        lines += [f"\n{label} skipped: {'; '.join(f'{reason} ({count})' for reason, count in shown)}"] if shown else []
    return "\n".join(lines) + "\n"


def main():
    known = hosts.known_hosts()
    wanted = [host for host in known if host.name in sys.argv[1:]] if sys.argv[1:] else known
    if len(wanted) < len(sys.argv[1:]):
        sys.exit(f"known hosts are {', '.join(host.name for host in known)}")
    for host in wanted:
        run(host)
    reports = {host.label: RESULTS / f"{host.name}.xml" for host in known}
    TABLE.write_text(table({label: outcome(path) for label, path in reports.items() if path.is_file()}), "utf-8")
    print(TABLE.read_text("utf-8"))


if __name__ == "__main__":
    main()
