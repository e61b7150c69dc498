"""Benchmarks and the records of their figures."""

import ast
import json
import math
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

from .. import ROOT
from .environment import ensure_environment, venv_version
from .messages import Failure, say
from .processes import run_openly, run_quietly, show_and_keep_last_line


def benchmarks(folder=None):
    """{name: first line of its docstring} of the benchmarks that can be run."""
    found = {}
    for file in sorted((folder or ROOT / "benchmarks").glob("*.py")):
        if not file.name.startswith("_"):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = text.splitlines()[0] if text else "(no description)"
    return found


def bench(args):
    """Run one benchmark and keep its figures in benchmarks/results; of a run with options other than --fresh, which
    may be a part only, they are shown and not kept."""
    known = benchmarks()
    if args.name is None:
        say("Benchmarks:" if known else "There are no benchmarks in this checkout.")
        for name, text in known.items():
            say(f"  {name:20} {text}")
        return 0
    if args.name not in known:
        raise Failure(f"there is no benchmark '{args.name}'; there are: {', '.join(known) or 'none'}.")
    python = ensure_environment()
    command = [python, "-m", f"benchmarks.{args.name}", *args.options]
    if set(args.options) - {"--fresh"}:
        return run_openly(command)
    code, last = show_and_keep_last_line(command, ROOT)
    if code:
        raise Failure(f"benchmark '{args.name}' ended with exit code {code}; no results were written.")
    figures = read_figures(last, args.name)
    record = {"command": f"python run.py bench {args.name}", "machine": machine(python), "figures": figures}
    file = ROOT / "benchmarks" / "results" / f"{args.name}.json"
    write_json(file, record)
    say(f"Figures written to {file}")
    return 0


def read_figures(line, name):
    """The figures of a benchmark's last line; Failure when that is not the agreed JSON."""
    expected = 'a last line of JSON like {"figures": {"seconds": 1.5}}'
    try:
        figures = json.loads(line)["figures"]
        items = figures.items()
    except (ValueError, KeyError, TypeError, AttributeError):
        text = f"benchmark '{name}' ended with {line[:80]!r}, expected {expected}; no results were written."
        raise Failure(text) from None
    for key, value in items:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            text = f"benchmark '{name}' gives {key} = {value!r}, expected a finite number; no results were written."
            raise Failure(text)
    return figures


def machine(python=None):
    """What a figure's reader has to know about this machine, and nothing that identifies it."""
    torch = None
    if python is not None:
        code, output = run_quietly([str(python), "-c", "import importlib.metadata as m; print(m.version('torch'))"])
        torch = output if code == 0 else None
    card = graphics_card(python) if python is not None else None
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": venv_version(python.parent.parent) if python is not None else platform.python_version(),
        "torch": torch,
    } | ({"gpu": card} if card else {})


def graphics_card(python):
    """Name of the graphics card that the environment's torch sees, None without one."""
    code, output = run_quietly(
        [str(python), "-c", "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"]
    )
    return output if code == 0 and output else None


def cpu_model():
    """Name of the processor, as far as the system tells."""
    try:
        found = re.search(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found.group(1).strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        code, output = run_quietly(["sysctl", "-n", "machdep.cpu.brand_string"])
        if code == 0 and output:
            return output
    return platform.processor() or platform.machine()


def write_json(file, record):
    """Write a JSON file so that it is either the old or the complete new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=file.name + ".", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            json.dump(record, stream, indent=2)
            stream.write("\n")
        # mkstemp makes files that only their owner can read.
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise
