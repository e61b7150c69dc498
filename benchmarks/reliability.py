"""Fuzzes every parser, injects faults, and samples 500 times with changing models and stacks: what breaks or leaks.

The parsers' inputs come from tools/check/fuzz.py, the faults are the tests in tests/host/test_faults.py with what they
noted, and each of the 500 runs samples two steps with another stack, model, batch, sampler or amount of memory. Writes
docs/reliability.md; ends with an error where an input, a fault or a run did.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import psutil
import torch
from membrane.tools import ROOT
from membrane.tools.check import fuzz
from membrane.tools.host_library import start

WARM = 60  # runs until everything that is kept for good is there
AGAIN = 50  # runs after which all models are unloaded
ALLOWED = 24  # megabytes by which the process may grow from there on
SAMPLERS = ("euler", "dpmpp_2m", "euler_ancestral", "ddim", "heun", "uni_pc")
MODES = ("facilitated transport", "fixed", "route", "reference", "facilitated transport")
SHARED = ("tests/unit/test_hostile_files.py", "tests/unit/test_hostile_numbers.py", "tests/host/test_hostile_names.py")


# ---------------------------------------------------------------- inputs


def tried(seconds, seed=0):
    """[(parser, inputs, kept, lines, branches, slowest, findings)] of all parsers, so many seconds each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for parser in fuzz.parsers(folder):
            coverage = fuzz.Coverage(parser.code)
            found = fuzz.fuzz(parser, coverage, seconds, seed=seed)
            shares = coverage.line_share, coverage.branch_share
            rows.append((parser.name, found.tried, found.kept, *shares, found.slowest, found.findings))
            print(
                f"{parser.name:18} {found.tried:7} inputs, lines {shares[0]:4.0%}, branches {shares[1]:4.0%}, slowest "
                f"{found.slowest * 1000:.0f} ms, {len(found.findings)} findings",
                flush=True,
            )
            for error, data in found.findings:
                print(f"  {error!r}\n  {data[:200]!r}")
    return rows


# ---------------------------------------------------------------- faults


def injected():
    """([(fault, outcome)] as the tests noted them, tests run, tests failed)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "faults.xml")
        options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-q", *options, "tests/host/test_faults.py", *SHARED]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    rows = []
    for case in cases:
        said = {one.get("name"): one.get("value") for one in case.iter("property")}
        if "fault" in said:
            rows.append((said["fault"], said["outcome"]))
        elif case in failed:
            rows.append((case.get("name"), "FAILED"))
    print(f"{len(rows)} faults noted, {len(cases)} tests, {len(failed)} failed", flush=True)
    if failed:
        print(done.stdout[-4000:])
    return rows, len(cases), len(failed)


# ---------------------------------------------------------------- a long run


class LittleMemory:
    """While entered, the host loads networks with so many megabytes of room only, as on a small card."""

    def __init__(self, megabytes):
        import comfy.model_management

        self.loaded, self.megabytes = comfy.model_management.LoadedModel, megabytes

    def __enter__(self):
        original, room = self.loaded.model_load, self.megabytes * 2**20

        def model_load(self, lowvram_model_memory=0, *rest, **more):
            return original(self, room, *rest, **more)

        self.original, self.loaded.model_load = original, model_load

    def __exit__(self, *error):
        self.loaded.model_load = self.original


def megabytes():
    """What the process holds."""
    return psutil.Process().memory_info().rss / 2**20


def digest(model):
    """A hash of a network's weights."""
    found = hashlib.sha256()
    for key, value in sorted(model.model.state_dict().items()):
        found.update(key.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


class Soak:
    """Runs that differ in everything a graph can say; faults: the module of the tests, for its adapters."""

    def __init__(self, node, faults):
        import comfy.model_management as management

        self.node, self.faults, self.management = node, faults, management
        self.demos = [node("MembraneDemoModel", variant=variant) for variant in ("day", "night")]
        # a network of its own: hosts of March 2024 leave layers that did not fit as they are
        self.small = node("MembraneDemoModel", variant="day")
        self.before = [digest(model) for model, *_ in self.demos]

    def run(self, number):
        """One picture or a few; raises when their numbers are not finite."""
        node, faults = self.node, self.faults
        low = number % 7 == 3
        if number % AGAIN == 0:
            self.management.unload_all_models()
        demo = self.small if low else self.demos[number % 2]
        stack = None
        for i in range(1 + number % 3):
            make = (faults.spm, faults.pruned, lambda model: faults.words())[(number + i) % 3]
            stack = node(
                "MembraneStack", adapter=make(demo[0]), strength=0.05 + number % 10 / 20,
                permeability=MODES[number % 5], stack=stack, end_percent=0.8 if number % 4 == 1 else 1.0,
            )[0]  # fmt: skip
        if low:
            with LittleMemory(4):
                return self.sample(number, demo, stack)
        return self.sample(number, demo, stack)

    def sample(self, number, demo, stack):
        node = self.node
        model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
        texts = [node("CLIPTextEncode", clip=demo[1], text=text)[0] for text in (f"a star {number}", "")]
        found = node(
            "KSampler", model=model, seed=number, steps=2, cfg=1.0 if number % 6 == 5 else 3.0,
            sampler_name=SAMPLERS[number % len(SAMPLERS)], scheduler="normal", positive=texts[0], negative=texts[1],
            latent_image=node("EmptyLatentImage", width=64, height=64, batch_size=1 + number % 4)[0], denoise=1.0,
        )[0]["samples"]  # fmt: skip
        if not found.isfinite().all():
            sys.exit(f"run {number} gave numbers that are not finite")

    def state(self):
        """(objects alive, hooks and patches left on the networks, megabytes) with nothing loaded."""
        self.management.unload_all_models()
        self.management.soft_empty_cache()
        if sys.platform == "linux":  # else what was freed stays with the process as often as not
            ctypes.CDLL(None).malloc_trim(0)
        alive = self.faults.living()
        left = sum(len(self.faults.traces(model)[0]) for model, *_ in self.demos)
        return alive, left, megabytes()


def soaked(runs):
    """(objects alive at first and last, hooks and patches left, megabytes at first and last) of so many runs."""
    node, tidy = start()
    import logging

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("membrane").setLevel(logging.WARNING)
    spec = importlib.util.spec_from_file_location("test_faults", ROOT / "tests" / "host" / "test_faults.py")
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    soak, begin = Soak(node, faults), time.monotonic()
    first = None
    for number in range(1, runs + 1):
        soak.run(number)
        if number == min(WARM, runs - 1):
            first = soak.state()
        if number % 100 == 0:
            print(f"{number} runs in {time.monotonic() - begin:.0f} s, {megabytes():.0f} MB", flush=True)
    last = soak.state()
    changed = [digest(model) for model, *_ in soak.demos] != soak.before
    tidy()
    return first, last, changed


# ---------------------------------------------------------------- what it says


def cell(text):
    return str(text).replace("|", "\\|")


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def page(inputs, faults, tests, failed, runs, first, last, changed):
    """docs/reliability.md."""
    parsers = [
        (name, f"{count:,}", kept, f"{lines:.0%}", f"{branches:.0%}", f"{slowest * 1000:.0f} ms", len(found))
        for name, count, kept, lines, branches, slowest, found in inputs
    ]
    (alive, left, before), (alive_after, left_after, after) = first, last
    objects = [(name, alive[name], alive_after[name]) for name in alive]
    objects += [
        ("hooks and patches left on the networks", left, left_after),
        ("memory of the process, MB", f"{before:.0f}", f"{after:.0f}"),
    ]
    return f"""# Reliability

Written by `python3 run.py bench reliability`, one thread, with Python {platform.python_version()} and torch
{torch.__version__}.

## What other people's files may hold

A coverage-guided fuzzer changes valid inputs and keeps those that take new branches of a parser's code. Every outcome
has to be a result or one sentence within {fuzz.LONGEST:g} seconds. *Branches* are the outcomes of conditional jumps.

{table(("parser", "inputs", "kept", "lines", "branches", "slowest", "findings"), parsers)}

Files are opened through the host's list of its model folders, and a link that leads out of those is refused. PyTorch
files are looked through before PyTorch opens them: only what `torch.save` writes for tensors gets further, and nothing
in them is run. Property tests of every reader, of names and of the routes run with all other tests.

## Faults

{tests} tests of faults and hostile inputs, {failed} failed. What the injected faults led to:

{table(("fault", "outcome"), faults)}

## Long runs

{runs} runs of two steps: both demo models, and one with room for 4 MB of its weights, all unloaded every {AGAIN} runs;
stacks of one to three adapters (layers, masks, text; gated, fixed, routed, as the reference, in a part of the
sampling), batches of one to four, six samplers, with and without guidance. Alive after {min(WARM, runs - 1)} runs and
after all of them:

{table(("", f"after {min(WARM, runs - 1)}", f"after {runs}"), objects)}

The weights of both models are {"CHANGED" if changed else "bit for bit what they were"}.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a second for each parser and 20 runs; writes no page")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each parser")
    parser.add_argument("--runs", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds, runs = (1.0, 20) if arguments.quick else (arguments.seconds, arguments.runs)
    inputs = tried(seconds)
    faults, tests, failed = ([], 0, 0) if arguments.quick else injected()
    first, last, changed = soaked(runs)
    (alive, left, before), (alive_after, left_after, after) = first, last
    print(f"alive {alive} -> {alive_after}, left {left} -> {left_after}, {before:.0f} -> {after:.0f} MB")
    findings = sum(len(row[-1]) for row in inputs)
    grown = sum(max(0, alive_after[name] - alive[name]) for name in alive)
    if not arguments.quick:
        text = page(inputs, faults, tests, failed, runs, first, last, changed)
        (ROOT / "docs" / "reliability.md").write_text(text, encoding="utf-8", newline="\n")
    figures = {
        "inputs": sum(row[1] for row in inputs),
        "findings": findings,
        "least_line_coverage": round(min(row[3] for row in inputs), 3),
        "least_branch_coverage": round(min(row[4] for row in inputs), 3),
        "slowest_input_ms": round(1000 * max(row[5] for row in inputs)),
        "faults": len(faults),
        "fault_tests": tests,
        "fault_tests_failed": failed,
        "runs": runs,
        "memory_before_mb": round(before, 1),
        "memory_after_mb": round(after, 1),
        "objects_grown": grown,
        "left_on_models": left_after,
    }
    print(json.dumps({"figures": figures}))
    return bool(findings or failed or grown or left_after or changed or after - before > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
