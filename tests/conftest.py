"""Registers the pack as package 'membrane', whatever its folder is called (tools/__init__.py).

The root __init__.py is not executed here: it needs a ComfyUI (tests/host/conftest.py does that).
"""

import sys
from pathlib import Path

import pytest
import tools
from membrane.tools.check.skips import Skips

ROOT = tools.ROOT

# pytest, or -m, has put the repository on the path, where its "nodes" hides the host's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT.resolve()]

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
    """Register what is for all paths; hooks of this file would only see the folders below it."""
    config.pluginmanager.register(_PlainRoot())
    config.pluginmanager.register(Skips())
