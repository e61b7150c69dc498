"""Runs all tests on ComfyUI releases and writes docs/compatibility.md from what they said.

python -m tools.check.compatibility            every host known here
python -m tools.check.compatibility 0.3.75     one of them; the others keep their last result in output/compatibility
"""

import datetime
import os
import platform
import subprocess
import sys

from membrane.tools import ROOT
from membrane.tools.run import hosts
from membrane.tools.run.reports import read_report, report_options

RESULTS = ROOT / "output" / "compatibility"
TABLE = ROOT / "docs" / "compatibility.md"
# What is run on a release, and where its tests lie.
PARTS = {"in its process": "tests/host", "with its server": "tests/workflows", "in its page": "tests/browser"}


def report_file(host, part):
    """Where pytest's report of a part on a host is kept."""
    return RESULTS / f"{host.name}.{part.rpartition(' ')[2]}.xml"


def run(host):
    """Runs the parts on one host, the slow tests too, and keeps pytest's reports."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "MEMBRANE_HOST": str(host.path)}
    for part, folder in PARTS.items():
        report = report_file(host, part)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", folder, *report_options(report)]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)


def table(found):
    """Markdown of {host's label: {part: Report, or None where it was not run}}."""
    lines = [
        "# ComfyUI releases",
        "",
        f"Written by `python -m tools.check.compatibility`, {datetime.date.today()}, Python "
        f"{'.'.join(map(str, sys.version_info[:2]))} on {platform.system()}, CPU only. Each release ran "
        + ", ".join(f"`{folder}` ({part})" for part, folder in PARTS.items())
        + ", slow tests included. A test is skipped only for a reason that `tests/allowed_skips.txt` lists.",
        "",
        f"| ComfyUI | {' | '.join(PARTS)} |",
        "|---" * (len(PARTS) + 1) + "|",
    ]
    for label, reports in found.items():
        cells = [reports[part].counts if reports[part] else "not run" for part in PARTS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for label, reports in found.items():
        for part in PARTS:
            if reports[part]:
                lines += details(f"{label}, {part}", reports[part])
    return "\n".join(lines) + "\n"


def details(title, report):
    """Lines that name the failed tests of a run and say why others were skipped, none where all passed."""
    lines = [f"\n{title}, failed: {', '.join(report.failed)}"] if report.failed else []
    if report.skipped:
        lines.append(f"\n{title}, skipped:\n")
        lines += [f"- {count} x {reason}" for reason, count in sorted(report.skipped.items())]
    return lines


def main(names):
    for host in hosts.chosen(names):
        run(host)
    found = {host.label: {part: read_report(report_file(host, part)) for part in PARTS} for host in hosts.known_hosts()}
    found = {label: reports for label, reports in found.items() if any(reports.values())}
    TABLE.write_text(table(found), encoding="utf-8", newline="\n")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
