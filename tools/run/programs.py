"""Programs that tests of the page need and pip does not have: Node.js and Chromium."""

import os
import shutil
import subprocess

from filelock import FileLock

from . import hosts
from .messages import Failure


def run(*command, **options):
    """A command's output; raises CalledProcessError with what it said."""
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True, timeout=540, **options
    ).stdout


def installing():
    """Held while something is installed: 'run.py test' starts several runs at a time."""
    hosts.environment().mkdir(parents=True, exist_ok=True)
    return FileLock(hosts.environment() / "programs.lock")


def program(*names, packages):
    """Path of a program, installed from Debian's packages when it is missing; Failure when that does not work."""
    if found := _found(names):
        return found
    if shutil.which("apt-get") is None or getattr(os, "geteuid", lambda: 1)() != 0:
        raise Failure(f"{names[0]} is not installed, and only root can install it with apt-get; install it.")
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", env=environment)
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise Failure(f"apt-get could not install {names[0]}: {getattr(error, 'stderr', error)}") from None
    if found := _found(names):
        return found
    raise Failure(f"{names[0]} is not there after apt-get install {' '.join(packages)}; install it.")


def _found(names):
    return next(filter(None, map(shutil.which, names)), None)


def node_js():
    """Path of Node.js, installed when it is missing."""
    with installing():
        return program("node", packages=("nodejs", "npm"))
