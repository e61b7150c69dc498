"""Chromium, Node.js and a ComfyUI server for the tests of this folder.

What is missing is installed: Chromium and Node.js by apt-get where that is possible, playwright-core by npm into
the development environment, newer hosts' front ends by pip. Without a network the tests are skipped, with the reason.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from membrane.tools.run import comfy_server, hosts

HERE = Path(__file__).absolute().parent
CONCEPTS = ("star -> circle", "heart -> square", "striped -> plain")


def tested_hosts():
    """The hosts to test on: the one MEMBRANE_HOST names, else all that are known."""
    try:
        wanted = os.environ.get("MEMBRANE_HOST")
        return [hosts.named(wanted)] if wanted else hosts.known_hosts()
    except hosts.HostNotFound:
        return []


def run(*command, **options):
    """A command's output; raises CalledProcessError with what it said."""
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, timeout=540, **options
    ).stdout


def program(*names, packages):
    """Path of a program, installed from Debian's packages when it is missing; skips when that fails."""
    for attempt in range(2):
        found = next(filter(None, map(shutil.which, names)), None)
        if found or attempt:
            break
        if shutil.which("apt-get") is None or getattr(os, "geteuid", lambda: 1)() != 0:
            pytest.skip(f"{names[0]} is not installed, and only root can install it with apt-get")
        try:
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            run("apt-get", "update", "-qq", env=environment)
            run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=environment)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"apt-get could not install {names[0]}: {getattr(error, 'stderr', error)}")
    if found is None:
        pytest.skip(f"{names[0]} is not there after apt-get install {' '.join(packages)}")
    return found


def installing():
    """Held while something is installed: 'run.py test' starts the pages of several hosts at a time."""
    hosts.environment().mkdir(parents=True, exist_ok=True)
    return FileLock(hosts.environment() / "browser.lock")


@pytest.fixture(scope="session")
def browser():
    """(node, environment variables) to run a script of this folder with."""
    with installing():
        return prepared_browser()


def prepared_browser():
    chromium = program("chromium", "chromium-browser", "google-chrome", packages=("chromium",))
    node, npm = program("node", packages=("nodejs", "npm")), program("npm", packages=("npm",))
    folder = hosts.environment() / "browser"
    lock = (HERE / "package-lock.json").read_bytes()
    if not (folder / "complete").is_file() or (folder / "complete").read_bytes() != lock:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy2(HERE / name, folder / name)
        try:
            run(npm, "ci", "--no-audit", "--no-fund", cwd=folder)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not install playwright-core: {getattr(error, 'stderr', error)}")
        (folder / "complete").write_bytes(lock)
    variables = {"MEMBRANE_CHROMIUM": chromium, "MEMBRANE_BROWSER_MODULES": str(folder / "package.json")}
    return node, {**os.environ, **variables}


@pytest.fixture(scope="module", params=tested_hosts(), ids=lambda host: host.name)
def page_server(request, browser, tmp_path_factory):
    """A running server of a host, with its page and with three adapters in an otherwise empty model folder."""
    from membrane.run import Failure, front_end_for

    host = request.param
    try:
        with installing():
            front_end = front_end_for(host, sys.executable)
    except Failure as error:
        pytest.skip(str(error))
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
