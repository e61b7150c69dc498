"""A ComfyUI as a library in this process, with the pack in it: for tests, benchmarks and checks.

Only one fits into a process, because hosts share the names of their modules.
"""

import asyncio
import importlib
import inspect
import os
import shutil
import sys
import tempfile
from pathlib import Path

from . import ROOT, torch_shim
from .run import hosts


class Outputs(tuple):
    """What a node returned, in the order of its outputs; ui holds what it showed."""

    ui = None


def start_host(host, work):
    """Import a ComfyUI as a library with all its folders below work; the order matters."""
    torch_shim.install()
    # The repository's own "nodes" would hide the host's.
    sys.path[:] = [str(host.path), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve())]
    from comfy.cli_args import args

    # Before anything imports comfy.model_management, which fails on a torch without CUDA.
    args.cpu = os.environ.get("MEMBRANE_TEST_DEVICE", "cpu") == "cpu"
    if (host.path / "utils" / "extra_config.py").is_file():
        # Before "nodes" puts the host's comfy folder first, where "utils" is another module.
        importlib.import_module("utils.extra_config")
    import folder_paths

    for name in ("output", "input", "temp", "user", "custom_nodes"):
        (work / name).mkdir()
        setter = getattr(folder_paths, f"set_{name}_directory", None)
        if setter is not None:
            setter(str(work / name))
    folder_paths.models_dir = str(work / "models")
    for kind, entry in list(folder_paths.folder_names_and_paths.items()):
        folder = work / kind if kind == "custom_nodes" else work / "models" / kind
        if kind != "configs":
            folder.mkdir(parents=True, exist_ok=True)
            folder_paths.folder_names_and_paths[kind] = ([str(folder)], entry[1])
    importlib.import_module("nodes")


def load_pack():
    """Execute the pack's __init__.py as the host would, under the package name 'membrane'."""
    pack = sys.modules["membrane"]
    if not hasattr(pack, "NODE_CLASS_MAPPINGS"):
        pack.__spec__.loader.exec_module(pack)
    return pack


def load_extra_nodes():
    """Register the host's own extra nodes (comfy_extras)."""
    import nodes

    start = getattr(nodes, "init_builtin_extra_nodes", None) or nodes.init_custom_nodes
    result = start()
    if inspect.isawaitable(result):
        asyncio.run(_awaited(result))


async def _awaited(awaitable):
    return await awaitable


def node_class(name):
    """Node class of the pack or the host; the host's extra nodes are loaded when first needed."""
    import nodes

    pack = sys.modules["membrane"]
    for mapping in (getattr(pack, "NODE_CLASS_MAPPINGS", {}), nodes.NODE_CLASS_MAPPINGS):
        if name in mapping:
            return mapping[name]
    if not getattr(load_extra_nodes, "done", False):
        load_extra_nodes.done = True
        load_extra_nodes()
    if name not in nodes.NODE_CLASS_MAPPINGS:
        version = hosts.version_of(Path(nodes.__file__).parent)
        raise LookupError(f"neither the pack nor this host ({version}) has a node class '{name}'")
    return nodes.NODE_CLASS_MAPPINGS[name]


def with_defaults(cls, inputs):
    """The inputs plus the defaults that the browser would fill into required widgets."""
    filled = dict(inputs)
    for name, entry in cls.INPUT_TYPES().get("required", {}).items():
        if name in filled:
            continue
        options = entry[1] if len(entry) > 1 and isinstance(entry[1], dict) else {}
        choices = entry[0] if isinstance(entry[0], list | tuple) else options.get("options")
        if "default" in options:
            filled[name] = options["default"]
        elif choices:
            filled[name] = choices[0]
    return filled


def run_node(name, **inputs):
    """Outputs of one node, run as the executor would; missing widget values get their defaults."""
    import torch

    cls = node_class(name)
    inputs = with_defaults(cls, inputs)
    with torch.inference_mode():
        # A V3 class is called as the class; its FUNCTION names a wrapper that only the executor prepares.
        is_v3 = hasattr(cls, "define_schema")
        result = cls.execute(**inputs) if is_v3 else getattr(cls(), cls.FUNCTION)(**inputs)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    ui = getattr(result, "ui", None)
    if isinstance(result, dict):
        ui, result = result.get("ui"), result.get("result", ())
    elif not isinstance(result, tuple):
        result = getattr(result, "args", None) or ()
    outputs = Outputs(result)
    outputs.ui = ui
    return outputs


def start(host=None):
    """Start a Host (default: the one MEMBRANE_HOST names, else hosts.choose()) and the pack in it.

    Returns (node, tidy): node(name, **inputs) -> outputs runs a node of the host or the pack; tidy() removes its
    folders. Raises HostNotFound.
    """
    work = Path(tempfile.mkdtemp(prefix="membrane-host-"))
    start_host(host or hosts.wanted(), work)
    load_pack()
    sys.modules["comfy.utils"].PROGRESS_BAR_ENABLED = False
    return run_node, lambda: shutil.rmtree(work, ignore_errors=True)
