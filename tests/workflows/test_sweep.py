"""Sweeps over real servers, of which one is killed in the middle: nothing is lost, nothing counted twice."""

import json
import sys
from pathlib import Path

import psutil
import pytest
from membrane.scripts.sweep import Own, Server, Sweep, connected, file_name, jobs_of, read_jobs
from membrane.tools.run import comfy_server

pytestmark = pytest.mark.workflow
READY = sorted((Path(__file__).absolute().parent.parent.parent / "scripts").glob("sweep_*.json"))
QUICK = {  # so that the ready jobs take seconds here
    "sweep_evaluate": {"2.strength": [1.0], "3.steps": [2]},
    "sweep_stress": {"3.steps": [2], "3.generations": [2], "3.population": [8], "3.pictures": [1], "5.steps": [2]},
    "sweep_train": {"2.steps": [6], "2.seed": [1], "5.steps": [2]},
}


@pytest.fixture(scope="module", autouse=True)
def ray():
    with connected(workers=2) as ray:
        yield ray


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

        servers = [Server(dying.url, patience=0.5), Server(server.url)]
        found = Sweep(jobs, servers, tmp_path, say=say, poll=0.05).run()
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


def comfyuis():
    """The ComfyUIs that workers of this process started; not those that have ended and are only waited for."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "host_main.py" in " ".join(child.cmdline()) and child.parent().name().startswith("ray::Worker"):
                found.append(child)
        except (psutil.Error, AttributeError):  # it, or what started it, has ended since
            continue
    return found


def test_ready_jobs_on_two_servers_of_our_own_of_which_one_is_killed(server_host, tmp_path):
    (tmp_path / "models.yaml").write_text(f"mine:\n    erasure_adapters: {tmp_path / 'adapters'}\n")
    assert [file.stem for file in READY] == list(QUICK)
    jobs = {}
    for file in READY:
        wanted = {"concept": ["star", "ring"], "2.method": ["UCE"], **QUICK[file.stem]}
        if file.stem == "sweep_train":
            del wanted["2.method"]
        jobs |= {f"{file.stem}: {key}": prompt for key, prompt in read_jobs(file, wanted.items()).items()}
    assert len(jobs) == 6
    said, killed = [], []

    def say(text):
        said.append(text)
        if ": done on" in text and not killed:
            killed.append(next(child for child in comfyuis() if child.is_running()))
            killed[0].kill()

    own = Own(server_host.path, sys.executable, ["--extra-model-paths-config", str(tmp_path / "models.yaml")])
    found = Sweep(jobs, [own] * 2, tmp_path / "out", say=say, poll=0.1, download=True).run()
    assert list(found) == list(jobs) and len(killed) == 1, said
    assert not any("error" in result for result in found.values()), found
    assert len({result["server"] for result in found.values()}) in (2, 3)
    for key, result in found.items():
        (report,) = result["reports"]["3" if key.startswith("sweep_evaluate") else "5"]
        assert report["finished"]
        assert "integrity" in report["summary"]["strata"]["erase"]["pixel"]
        kept = {file.suffix for file in (tmp_path / "out" / "files" / file_name(key)).iterdir()}
        assert kept == ({".html", ".png"} if key.startswith("sweep_stress") else {".html"})
    adapters = sorted(file.name for file in (tmp_path / "adapters" / "trained").glob("*_00001_.safetensors"))
    assert [name.split("_")[1] for name in adapters] == ["ring", "star"]
    assert not comfyuis()
