"""Registers the pack as package 'membrane', whatever its folder is called.

The root __init__.py is not executed here: it needs a ComfyUI (tests/host/conftest.py does that).
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent

# pytest, or -m, may have put the repository on the path, where its "nodes" hides the host's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve()]

if "membrane" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "membrane", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["membrane"] = importlib.util.module_from_spec(spec)

try:
    import torch
except ImportError:
    pass
else:
    # Two spinning threads on busy cores are up to a hundred times slower than one.
    torch.set_num_threads(1)


class _PlainRoot:
    """Collects the repository's root as a folder: pytest would import its __init__.py, which needs a ComfyUI."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    """Register the above for all paths; as a hook of this file it would only see folders below it."""
    config.pluginmanager.register(_PlainRoot())
