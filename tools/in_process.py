"""A ComfyUI in this process, as the host tests start it, for benchmarks."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start():
    """(node, tidy): node(name, **inputs) -> outputs runs a node of the host or the pack; tidy() removes its folders."""
    if "membrane" not in sys.modules:
        places = {"submodule_search_locations": [str(ROOT)]}
        package = importlib.util.spec_from_file_location("membrane", ROOT / "__init__.py", **places)
        sys.modules["membrane"] = importlib.util.module_from_spec(package)
    spec = importlib.util.spec_from_file_location("membrane_host", ROOT / "tests" / "host" / "conftest.py")
    host = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(host)
    if host.HOST is None:
        sys.exit(host.REASON)
    sys.modules["comfy.utils"].PROGRESS_BAR_ENABLED = False
    return host.run_node, host.pytest_unconfigure
