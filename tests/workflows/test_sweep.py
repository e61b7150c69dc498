"""A sweep over two real servers, of which one is killed in the middle: nothing is lost, nothing counted twice."""

import json
import sys
from pathlib import Path

import pytest
from membrane.scripts.sweep import Server, Sweep, file_name, jobs_of
from membrane.tools.run import comfy_server

pytestmark = pytest.mark.workflow


def test_one_of_two_servers_is_killed(server, server_host, tmp_path):
    workflow = json.loads((Path(__file__).parent / "evaluate_sweep.json").read_text(encoding="utf-8"))
    strengths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    jobs = jobs_of(workflow, {"2.strength": strengths})
    said = []
    with comfy_server.Server(server_host.path, sys.executable) as dying:

        def say(text):
            said.append(text)
            if f"done on {dying.url}" in text and dying.process.poll() is None:
                dying.process.kill()

        servers = [Server(dying.url), Server(server.url)]
        found = Sweep(jobs, servers, tmp_path, patience=2, say=say, poll=0.05).run()
    assert list(found) == list(jobs)
    by = [result["server"] for result in found.values()]
    assert by.count(dying.url) == 1 and by.count(server.url) == len(jobs) - 1, said
    assert any("is given up" in text for text in said)
    values = []
    for key, result in found.items():
        assert "error" not in result
        (report,) = result["reports"]["3"]
        assert report["finished"] and len(report["rows"]) == 2 * 3
        assert result["outputs"]["3"]["membrane_files"][0]["filename"].startswith(file_name(key))
        values.append(report["summary"]["strata"]["erase"]["pixel"]["integrity"]["value"])
    assert values[0] == pytest.approx(1, abs=1e-3)
    assert values == sorted(values, reverse=True)  # each key has the result of its own strength
    assert len(list((tmp_path / "jobs").iterdir())) == len(jobs)
    again = Sweep(jobs, [Server(server.url)], tmp_path, say=said.append).run()
    assert again == found and said[-1].startswith("6 of 6 jobs")
