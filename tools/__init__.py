"""What is not shipped: the command line's parts, the checks, and what made the demo model.

Importing this package registers the repository as the package `membrane`, whatever its folder is called, so that
`python run.py`, `python -m tools.check.locales`, `python -m benchmarks.gates` (from the repository's folder) and the
tests all import `membrane.core` and `membrane.tools`. The root's __init__.py is not executed: it needs a ComfyUI.
"""

import importlib.util
import sys
from pathlib import Path

# Not resolved: a pack that is linked into custom_nodes has to find the ComfyUI around the link.
ROOT = Path(__file__).absolute().parent.parent

if "membrane" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "membrane", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["membrane"] = importlib.util.module_from_spec(_spec)
