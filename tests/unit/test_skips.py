"""A run cannot pass by skipping: what the plugin, the report and the table of releases make of skipped tests."""

import subprocess
import sys

import pytest
from membrane.tools import ROOT
from membrane.tools.check import compatibility
from membrane.tools.check.skips import allowed_reasons
from membrane.tools.run import tests
from membrane.tools.run.reports import Report, read_report, report_options

CONFTEST = f"""
import re, sys
sys.path.insert(0, {str(ROOT)!r})
import tools
from membrane.tools.check.skips import Skips

def pytest_configure(config):
    config.pluginmanager.register(Skips([re.compile("no node '[A-Z]'")]))
"""
TESTS = """
import pytest

@pytest.fixture
def browser():
    pytest.skip("no browser")

def test_passes():
    pass

def test_allowed():
    pytest.skip("no node 'B'")

@pytest.mark.skipif(True, reason="no node 'C'")
def test_allowed_by_a_mark():
    pass

def test_more_than_allowed():
    pytest.skip("no node 'B', and no assets")

@pytest.mark.skipif(True, reason="no assets")
def test_mark():
    pass

def test_fixture(browser):
    pass

@pytest.mark.xfail(reason="no browser")
def test_expected_to_fail():
    assert False
"""


def run(folder, text):
    """(exit code, Report, output) of a file of tests with the plugin."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(text)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *report_options(report)]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return found.returncode, read_report(report), found.stdout


def test_only_allowed_reasons_skip(tmp_path):
    code, report, shown = run(tmp_path, TESTS)
    assert code == 1
    assert report.passed == 1
    assert sorted(report.failed) == [
        f"test_some.{name}" for name in ("test_fixture", "test_mark", "test_more_than_allowed")
    ]
    assert report.skipped == {"no node 'B'": 1, "no node 'C'": 1, "no browser": 1}  # the last: expected to fail
    assert "skipped for a reason that tests/allowed_skips.txt does not list: no assets" in shown


def test_a_whole_file_cannot_skip_either(tmp_path):
    code, report, shown = run(tmp_path, "import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass\n")
    assert code not in (0, 5)
    assert report.passed == 0 and len(report.failed) == 1
    assert "does not list: could not import 'no_such_module'" in shown


@pytest.mark.parametrize(
    "reason",
    [
        "the demo model's weights are not here",
        "chromium is not installed, and only root can install it with apt-get",
        "could not import 'torch': No module named 'torch'",
        "neither the pack nor this host (0.33.0) has a node class 'TorchCompileModel'",
        "unconditional skip",
    ],
)
def test_what_is_missing_is_no_allowed_reason(reason):
    assert not any(pattern.fullmatch(reason) for pattern in allowed_reasons())


def test_the_summary_says_how_many_and_why(capsys):
    report = Report(7, ["test_a.test_b"], {"no tabs": 2, "no clones": 1}, {"test_a.test_b": 9, "test_a.test_c": 12.4})
    tests.show_summary([("unit", 0, 3.0), ("host new", 1, 4.0)], [None, report])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[1:] == [
        "passed                   3 s  unit",
        "FAILED                   4 s  host new: 7 passed, 1 failed, 3 skipped",
        "skipped            1         host new: no clones",
        "skipped            2         host new: no tabs",
        "long              12 s  host new: test_a.test_c",
    ]


def test_the_table_of_releases_says_what_ran_and_what_was_skipped():
    found = {
        "2024": {
            "in its process": Report(715, [], {"no clones": 1, "no translations": 10}),
            "with its server": Report(9, ["test_server.test_x"], {}),
            "in its page": None,
        }
    }
    text = compatibility.table(found)
    assert "| 2024 | 715 passed, 11 skipped | 9 passed, 1 failed | not run |" in text
    assert "2024, in its process, skipped:\n\n- 1 x no clones\n- 10 x no translations\n" in text
    assert "2024, with its server, failed: test_server.test_x" in text
