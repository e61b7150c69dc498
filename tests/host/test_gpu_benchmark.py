"""benchmarks/gpu.py at toy size, as it runs on a graphics card otherwise."""

import os
import subprocess
import sys

import pytest
import torch
from membrane.tools import ROOT
from membrane.tools.run.bench import read_figures


def bench(host, *arguments):
    environment = {**os.environ, "MEMBRANE_HOST": str(host.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_toy_run(host):
    done = bench(host, "--toy")
    assert done.returncode == 0, done.stderr[-2000:]
    figures = read_figures(done.stdout.strip().splitlines()[-1], "gpu")
    for label in ("gated", "timed"):
        assert figures[f"sd15_{label}_8_copies"] == figures[f"sd15_{label}_8_waits"] == 0
        assert 0 < figures[f"sd15_{label}_8_kernels"] == figures[f"sd15_{label}_1_kernels"]
    sections = (
        "sd15_bf16_gated_8_ratio", "sdxl_bf16_timed_map_ratio", "sd15_fp8_gated_8_ratio", "demo_day_pictures_a_minute",
        "apply_ratio", "gates_300_words_ratio", "closed_form_wide_ratio", "sd15_training_ratio",
    )  # fmt: skip
    assert all(figures[name] > 0 for name in sections)
    # on the same processor the same map and, but for rounding, the same picture
    assert figures["closed_form_sd15_difference"] < 1e-6 and figures["demo_day_difference"] < 0.01
    assert "skipped: out of memory (only a graphics card really runs out" in done.stdout
    assert figures["skipped"] == done.stdout.count("  skipped: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_graphics_card_it_says_so(host):
    done = bench(host)
    assert done.returncode == 1 and "torch finds no graphics card here" in done.stderr and "--toy" in done.stderr
