"""Tests in this folder run inside one ComfyUI, in this process: the one MEMBRANE_HOST names.

Importing this file starts the host as a library, so test modules may import its modules at
their top. Only one host fits into a process; 'run.py test' starts one process for each.
"""

import asyncio
import importlib
import inspect
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest
from membrane.tools import hosts

ROOT = Path(__file__).absolute().parent.parent.parent


class Outputs(tuple):
    """What a node returned, in the order of its outputs; ui holds what it showed."""

    ui = None


def find_host():
    """(Host, None), or (None, one sentence saying why there is none)."""
    wanted = os.environ.get("MEMBRANE_HOST")
    try:
        found = hosts.named(wanted) if wanted else hosts.choose()
    except hosts.HostNotFound as error:
        if wanted:
            raise pytest.UsageError(str(error)) from None
        return None, str(error)
    try:
        import torch  # noqa: F401
    except ImportError:
        return None, "torch is not installed here; 'python run.py test' makes an environment that has it."
    return found, None


def start_host(host, work):
    """Import a ComfyUI as a library with all its folders below work; the order matters."""
    from membrane.tools import torch_shim

    torch_shim.install()
    sys.path.insert(0, str(host.path))
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
        raise LookupError(f"neither the pack nor this host ({HOST.version}) has a node class '{name}'")
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


HOST, REASON = find_host()
WORK = None
if HOST is not None:
    WORK = Path(tempfile.mkdtemp(prefix="membrane-host-"))
    start_host(HOST, WORK)
    if (ROOT / "__init__.py").is_file():
        load_pack()


class SkippedModule(pytest.Module):
    """Stands for a test file that needs a host where there is none."""

    def collect(self):
        """Skip without importing the file, which may import the host at its top."""
        raise pytest.skip.Exception(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip every file of this folder, with a sentence, when no host was found."""
    if HOST is None:
        return SkippedModule.from_parent(parent, path=module_path)
    return None


def pytest_unconfigure():
    """Remove the temporary folders."""
    if WORK is not None:
        shutil.rmtree(WORK, ignore_errors=True)


@pytest.fixture(scope="session")
def host():
    """The host: name, path, version, and work (the folder its temporary folders lie in)."""
    return types.SimpleNamespace(**HOST._asdict(), work=WORK)


@pytest.fixture(scope="session")
def pack():
    """The pack's root module, with NODE_CLASS_MAPPINGS."""
    return load_pack()


@pytest.fixture(scope="session")
def node():
    """node("KSampler", **inputs) -> outputs; for nodes of the host and of the pack."""
    return run_node
