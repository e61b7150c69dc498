"""Chromium, Node.js and a ComfyUI server for the tests of this folder.

What is missing is installed: Chromium and Node.js by apt-get where that is possible, playwright-core by npm into
the development environment, newer hosts' front ends by pip. What cannot be installed fails the tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from membrane.tools.run import comfy_server, hosts, programs
from membrane.tools.run.messages import Failure
from membrane.tools.run.packages import front_end_for

HERE = Path(__file__).absolute().parent
CONCEPTS = ("star -> circle", "heart -> square", "striped -> plain")


def tested_hosts():
    """The hosts to test on: the one MEMBRANE_HOST names, else all that are known."""
    return [hosts.wanted()] if os.environ.get("MEMBRANE_HOST") else hosts.known_hosts()


@pytest.fixture(scope="session")
def browser():
    """(node, environment variables) to run a script of this folder with."""
    with programs.installing():
        return prepared_browser()


def prepared_browser():
    chromium = programs.program("chromium", "chromium-browser", "google-chrome", packages=("chromium",))
    node, npm = programs.program("node", packages=("nodejs", "npm")), programs.program("npm", packages=("npm",))
    folder = hosts.environment() / "browser"
    lock = (HERE / "package-lock.json").read_bytes()
    if not (folder / "complete").is_file() or (folder / "complete").read_bytes() != lock:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy2(HERE / name, folder / name)
        try:
            programs.run(npm, "ci", "--no-audit", "--no-fund", cwd=folder)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise Failure(f"npm could not install playwright-core: {getattr(error, 'stderr', error)}") from None
        (folder / "complete").write_bytes(lock)
    variables = {"MEMBRANE_CHROMIUM": chromium, "MEMBRANE_BROWSER_MODULES": str(folder / "package.json")}
    return node, {**os.environ, **variables}


@pytest.fixture(scope="module", params=tested_hosts(), ids=lambda host: host.name)
def page_server(request, browser, tmp_path_factory):
    """A running server of a host, with its page and with three adapters in an otherwise empty model folder."""
    host = request.param
    with programs.installing():
        front_end = front_end_for(host, sys.executable)
    work = tmp_path_factory.mktemp("browser")
    models = work / "models"
    models.mkdir()
    settings = work / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")  # or a dialog greets who comes first
    with comfy_server.Server(
        host.path, sys.executable, work=work, front_end=front_end, model_paths={"erasure_adapters": models}
    ) as server:
        server.wait(server.queue(adapters()), timeout=240)
        yield server


def adapters():
    """A prompt that computes and saves the adapters that the scenarios stack."""
    prompt = {"model": {"class_type": "MembraneDemoModel", "inputs": {"variant": "day"}}}
    for concept in CONCEPTS:
        name = concept.split()[0]
        inputs = {"model": ["model", 0], "clip": ["model", 1], "concepts": concept, "replace_with": "", "preserve": ""}
        prompt[name] = {"class_type": "MembraneErase", "inputs": {**inputs, "method": "UCE", "strength": 1.0}}
        save = {"adapter": [name, 1], "filename_prefix": f"shapes/{name}"}
        prompt[f"save {name}"] = {"class_type": "MembraneSaveAdapter", "inputs": save}
    return prompt


@pytest.fixture(scope="module")
def outcomes(request, browser, page_server):
    """{scenario: {"seconds", "error", "absent"}} of the scenarios that were selected, from one run of Chromium."""
    node, environment = browser
    wanted = [
        item.callspec.params["scenario"]
        for item in request.session.items
        if item.path == request.path and item.callspec.params["page_server"].path == page_server.host
    ]
    child = subprocess.run(
        [node, str(HERE / "run.mjs"), page_server.url, *dict.fromkeys(wanted)],
        capture_output=True, text=True, env=environment, timeout=540,
    )  # fmt: skip
    found = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if child.returncode:
        found.append({"name": None, "error": child.stderr})
    return {outcome["name"]: outcome for outcome in found}
