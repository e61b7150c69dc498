"""The development environment: a folder with Python, the pinned packages and the ComfyUIs of the registry."""

import hashlib
import os
import platform
import re
import shutil
import sys

from .. import ROOT
from . import hosts, packages
from .messages import Failure, step
from .processes import pip_install, run_quietly

OLDEST_PYTHON = (3, 10)

# pip is asked for torch in exactly this spelling and before all else: as a dependency of
# another package, or with a looser version, it may choose a build that is gigabytes larger.
TORCH = "torch==2.13.0"
REQUIREMENTS = ROOT / "requirements-dev.txt"
REQUIREMENTS_WITHOUT_DEPENDENCIES = ROOT / "requirements-dev-nodeps.txt"


def venv_python(folder):
    """Interpreter of a virtual environment folder (which may not exist)."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_version(folder):
    """'3.11' for a virtual environment folder, or None when there is none."""
    try:
        text = (folder / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"(?m)^version(?:_info)?\s*=\s*(\d+\.\d+)", text)
    return found.group(1) if found and venv_python(folder).exists() else None


def stamp_value(version, files=None):
    """What the stamp file holds when an environment fits: a hash of requirements and Python version."""
    wheels = " ".join(hosts.WHEELS.values())
    digest = hashlib.sha256(f"{version} {TORCH} {wheels} {sys.platform}".encode())
    for file in files or (REQUIREMENTS, REQUIREMENTS_WITHOUT_DEPENDENCIES):
        # Line ends differ between checkouts of the same file.
        digest.update(b"\0" + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stamp_fits(folder, files=None):
    """Whether the environment in folder was completed with today's requirement files."""
    version = venv_version(folder)
    try:
        return version is not None and (folder / "membrane.stamp").read_text() == stamp_value(version, files)
    except OSError:
        return False


def ensure_environment():
    """Interpreter of a complete environment; creates or updates it first when that is needed."""
    folder = hosts.environment()
    if not stamp_fits(folder):
        create_environment(folder)
    return venv_python(folder)


def create_environment(folder):
    """Make or complete the environment, one line of progress a step."""
    if venv_version(folder) is None:
        if folder.exists() and any(folder.iterdir()):
            raise Failure(f"{folder} exists but holds no working Python environment; delete it and run this again.")
        if sys.version_info < OLDEST_PYTHON:
            raise Failure(
                f"this is Python {platform.python_version()}, but the pinned packages need"
                f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; start run.py with a newer one,"
                " for instance 'python3.12 run.py demo'."
            )
        with step(f"creating {folder.name} (Python {platform.python_version()})"):
            create_venv(folder)
    elif tuple(map(int, venv_version(folder).split("."))) < OLDEST_PYTHON:
        raise Failure(
            f"{folder} holds Python {venv_version(folder)}, but the pinned packages need"
            f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; delete it and start run.py with a newer Python."
        )
    (folder / "membrane.stamp").unlink(missing_ok=True)
    python = venv_python(folder)
    with step(f"installing {TORCH} (the large one; takes minutes the first time)"):
        pip_install(python, TORCH)
    with step(f"installing {REQUIREMENTS.name}"):
        pip_install(python, "-r", str(REQUIREMENTS))
    with step(f"installing {REQUIREMENTS_WITHOUT_DEPENDENCIES.name}"):
        pip_install(python, "--no-deps", "-r", str(REQUIREMENTS_WITHOUT_DEPENDENCIES))
    for name in hosts.WHEELS:
        packages.front_end_for(packages.wheel_host(name, python), python)
    partial = folder / "membrane.stamp.partial"
    partial.write_text(stamp_value(venv_version(folder)))
    os.replace(partial, folder / "membrane.stamp")


def create_venv(folder):
    """Create a virtual environment; a failed or interrupted one leaves nothing behind."""
    try:
        code, output = run_quietly([sys.executable, "-m", "venv", str(folder)])
        if code or venv_version(folder) is None:
            raise Failure(
                f"Python could not create the environment {folder} (exit code {code}):\n{output}\n"
                "On Debian and Ubuntu the package python3-venv has to be installed first."
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
