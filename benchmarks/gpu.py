"""What adapters cost on a graphics card: steps, memory, applying, training, closed form, pictures; five minutes on one.

Networks of full size with random weights, of the host's own classes: Stable Diffusion 1.5, XL and Flux.1, stored as
bfloat16 and as fp8. Each figure is a ratio against the bare model or the host's own loader in the same run: the two
take turns, and the median of the ratios counts. Memory is the peak that torch handed out beyond that of the bare
model's step, over the size of the adapters' factors. Every section has a budget of seconds; what it did not get to is
printed, and counted in `skipped`. On a machine without a graphics card it refuses; --toy runs all that a processor can
do on tiny networks, to see that it works, and its figures say nothing.

    python run.py bench gpu                   the figures, into benchmarks/results/gpu.json
    python -m benchmarks.gpu --only demo      some sections, on the screen alone
    python -m benchmarks.gpu --toy            a processor is enough
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

SECONDS = 300
BF16, FP8 = "bf16", "fp8"
KS, TOY_KS = (1, 8, 32, 100), (1, 8)
CONCEPT, OTHER = "a photo of star 3 on snow", "a small old house"
WORDS_300 = " ".join(f"word{i} star" for i in range(150))


class Skipped(Exception):
    """A part that this machine, this host or the time left has no place for; its text says why."""


@dataclass
class Run:
    """One run: where, how large, until when, and what was found."""

    device: torch.device
    toy: bool
    deadline: float
    figures: dict = field(default_factory=dict)
    skipped: list = field(default_factory=list)
    limit: float = 0.0

    @property
    def gpu(self):
        return self.device.type == "cuda"

    @property
    def dtype(self):
        """Type that networks work in; processors are slow in half precision."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def turns(self):
        return 2 if self.toy else 9

    def left(self):
        """Seconds left to the section that is under way."""
        return min(self.limit, self.deadline) - time.perf_counter()

    def skip(self, what, why):
        self.skipped.append(what)
        print(f"  skipped: {what} ({why})", flush=True)

    def record(self, name, value, unit=""):
        self.figures[name] = float(f"{value:.4g}")
        print(f"  {name:44} {value:10.4g} {unit}", flush=True)

    @contextmanager
    def part(self, what, needs=0.0):
        """A part of a section, skipped where fewer seconds are left than it needs or the machine cannot do it."""
        from membrane.core.errors import ErasureError
        from membrane.tools.tiny.networks import NotInThisHost

        if self.left() < needs or self.left() <= 0:
            self.skip(what, f"{max(0.0, self.left()):.0f} s left")
            yield False
            return
        try:
            yield True
        except (Skipped, ErasureError, NotInThisHost, torch.cuda.OutOfMemoryError) as error:
            self.skip(what, str(error).splitlines()[0])
        self.tidy()

    def tidy(self):
        if self.gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self):
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, function):
        """Seconds of a call on the device, until all of it is done."""
        self.wait()
        if not self.gpu:
            begin = time.perf_counter()
            function()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        self.wait()
        return begin.elapsed_time(end) / 1000

    def peak(self, function):
        """Bytes by which torch's memory on the device peaked in a call, in all."""
        if not self.gpu:
            function()
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.wait()
        return torch.cuda.max_memory_allocated()


# ---------------------------------------------------------------- models, texts, adapters


def built(run, name, storage=BF16):
    """(MODEL, CLIP, Network) of sd15, sdxl or flux; of toy size the tiny one of its family."""
    from membrane.tools.tiny import networks

    made = {"flux": "flux_dev"}.get(name, name) if run.toy else f"{name}_full"
    numbers = {"dtype": run.dtype}
    if storage == FP8:
        numbers = {"dtype": torch.float8_e4m3fn, "manual_cast": run.dtype}
    with torch.inference_mode():
        model = networks.build(made, dynamic=False, device=run.device, **numbers)
    return model, networks.text_encoder(made), networks.network(made)


def encoded(clip, prompt):
    """What `extra_conds` gets of a prompt."""
    from membrane.tools.host_library import run_node

    ((vectors, more),) = run_node("CLIPTextEncode", clip=clip, text=prompt)[0]
    return {"cross_attn": vectors, **more}


def linear_layers(model):
    """{site: module} of a network's linear layers in its blocks, each once."""
    from membrane.core.host.model.layers import layer_keys, modules, plain_key

    layers, found = modules(model), {}
    for site, key in layer_keys(model).items():
        module = layers.get(plain_key(key))
        if isinstance(key, str) and hasattr(module, "in_features") and "blocks" in key:
            found.setdefault(key, (site, module))
    return dict(found.values())


def low_rank(model, count):
    """SPM adapters of rank 1 on all linear_layers()."""
    from membrane.benchmarks import gates

    sizes = {site: (module.out_features, module.in_features) for site, module in linear_layers(model).items()}
    return gates.rank_one(sizes, count, "star")


def text_map(width, terms=8):
    """A map of the text, as closed-form erasure makes it."""
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.text_map import TextMap

    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(width, terms, generator=g) * 0.01, torch.randn(terms, width, generator=g) * 0.01
    return ErasureAdapter(Card("UCE", ("star 3",)), {"map": {"text": TextMap(a, b, (0,) * terms)}})


def masks(model, count=16):
    """A pruning adapter that marks one weight of a hundred in some layers."""
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.mask import Mask

    layers = linear_layers(model)
    chosen, found = list(layers)[:: max(1, len(layers) // count)], {}
    for i, site in enumerate(chosen):
        shape = layers[site].out_features, layers[site].in_features
        found[site] = Mask.of(torch.rand(shape, generator=torch.Generator().manual_seed(i)) < 0.01)
    return ErasureAdapter(Card("pruning", ("star",)), {"mask": found})


def stacked(model, clip, adapters, **entry):
    """A MODEL with a stack of adapters on it."""
    from membrane.core.adapters.stack import Entry, ErasureStack
    from membrane.core.host.patches.stack import apply_stack

    return apply_stack(
        model, ErasureStack(tuple(Entry(adapter, **{"strength": 0.5, **entry}) for adapter in adapters)), clip
    )


def loaded(model):
    """The model ready to run, all its patches in place."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model


class Step:
    """A step of a MODEL with guidance for a prompt and a negative prompt; the model has to be loaded() to call it."""

    def __init__(self, run, model, clip, network):
        from membrane.tools import launches

        self.model = loaded(model)
        with torch.inference_mode():
            texts = [encoded(clip, prompt) for prompt in (CONCEPT, OTHER)]
            call = launches.sides(model, texts, device=run.device)
        self.latent = network.latent
        self.call = launches.moved(call, run.device)
        self.x = torch.randn(2, *self.latent, generator=torch.Generator().manual_seed(1)).to(run.device)
        self.t = torch.full((2,), 0.5, device=run.device)

    def __call__(self):
        with torch.inference_mode():
            return self.model.model.apply_model(self.x, self.t, transformer_options={}, **self.call)

    def ready(self):
        """The step with its model in place, warmed up."""
        loaded(self.model)
        self()
        return self


def factor_bytes(model):
    """Bytes of what adapters keep on the device for a MODEL whose step has run."""
    from membrane.core.adapters.beside import Bypass

    found = 0
    for patch in model.object_patches.values():
        if not isinstance(patch, Bypass):
            continue
        for part in patch.parts:
            tensors = (part.ready.up, part.ready.down, part.ready.gate) if part.ready else ()
            found += sum(tensor.nbytes for tensor in tensors)
        for _, delta in patch.changes.ready or () if patch.changes else ():
            found += delta.places.nbytes
    return found


# ---------------------------------------------------------------- a step


def compared(run, label, bare, model, clip, network):
    """Records a model's step as a ratio to the bare one, and its memory as one to its factors."""
    step = Step(run, model, clip, network).ready()
    ratios = []
    for _ in range(run.turns):
        plain = run.seconds(bare.ready())
        ratios.append(run.seconds(step.ready()) / plain)
    run.record(f"{label}_ratio", median(ratios), "of a bare step")
    if not run.gpu:
        return
    usual = run.peak(bare.ready())
    beyond, factors = run.peak(step.ready()) - usual, factor_bytes(model)
    run.record(f"{label}_beyond_mb", beyond / 1e6, "MB beyond the bare model")
    if factors:
        run.record(f"{label}_memory_ratio", beyond / factors, "of the size of the factors")


def variants(model, clip, network, ks):
    """{label: function that makes the MODEL} of everything that is measured beside the bare one."""
    from membrane.core.adapters.permeability import Permeability

    opened, fixed = Permeability("facilitated transport"), Permeability("fixed")
    adapters = low_rank(model, max(ks))
    found = {f"gated_{k}": lambda k=k: stacked(model, clip, adapters[:k], permeability=opened) for k in ks}
    words = text_map(network.width)
    return found | {
        "entry_map": lambda: stacked(model, clip, [words], permeability=fixed),
        "text_map": lambda: stacked(model, clip, [words], permeability=opened),
        "timed_map": lambda: stacked(model, clip, [words], permeability=opened, end_percent=0.5),
        "masks": lambda: stacked(model, clip, [masks(model)], strength=1.0, permeability=fixed),
    }


def steps(run, name, storage):
    """A step with K gated adapters, maps and masks."""
    with run.part(f"{name}, {storage}", needs=8) as goes:
        if not goes:
            return
        model, clip, network = built(run, name, storage)
        bare = Step(run, model, clip, network).ready()
        print(f"  {name}, {storage}: bare step {1000 * run.seconds(bare):.1f} ms", flush=True)
        ks = TOY_KS if run.toy else KS if storage == BF16 else (8, 100)
        for label, make in variants(model, clip, network, ks).items():
            if storage == FP8 and not label.startswith("gated"):
                continue
            with run.part(f"{name}, {storage}, {label}") as one:
                if one:
                    compared(run, f"{name}_{storage}_{label}", bare, make(), clip, network)


def compiled(run):
    """A step under torch.compile, against the bare one compiled: in a process of its own, which can be stopped."""
    if run.toy:
        return compiled_here(run)
    with run.part("torch.compile", needs=60) as goes:
        if goes:
            command = [sys.executable, "-m", "benchmarks.gpu", "--only", "compiled_here"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=run.left())
            except subprocess.TimeoutExpired:
                raise Skipped("compiling took longer than what was left") from None
            except subprocess.CalledProcessError as error:
                raise Skipped(f"it failed: {error.stderr[-300:]}") from None
            for key, value in json.loads(done.stdout.strip().splitlines()[-1])["figures"].items():
                if key.startswith("sd15_compiled"):
                    run.record(key, value)


def compiled_here(run):
    from membrane.core.adapters.permeability import Permeability
    from membrane.tools.host_library import run_node

    with run.part("torch.compile") as goes:
        if not goes:
            return
        model, clip, network = built(run, "sd15")
        gated = stacked(model, clip, low_rank(model, 8), permeability=Permeability("facilitated transport"))
        try:
            both = [
                run_node("TorchCompileModel", model=each, backend="eager" if run.toy else "inductor")[0]
                for each in (model, gated)
            ]
        except LookupError as error:
            raise Skipped(str(error)) from None
        from membrane.tools import launches

        with launches.plain_attention() if run.toy else warnings.catch_warnings():
            bare, step = (Step(run, each, clip, network) for each in both)
            compared_steps(run, "sd15_compiled_gated_8", bare, step)


def compared_steps(run, label, bare, step):
    """Records a step as a ratio to another; the host may put both networks into one place, so each runs in turn."""
    times = []
    for one in (bare, step):
        one.ready()
        times.append(median(run.seconds(one) for _ in range(run.turns)))
    run.record(f"{label}_ratio", times[1] / times[0], "of a bare step")


def waits(run):
    """What a step copies and waits for beyond the bare one, from its second on: with gates, time ranges and masks."""
    from membrane.core.adapters.permeability import Permeability

    opened = Permeability("facilitated transport")
    with run.part("copies and waits") as goes:
        if not goes:
            return
        for label, settings in (("gated", {}), ("timed", {"end_percent": 0.5})):
            counted = {}
            for k in (0, 1, 8):
                model, clip, network = built(run, "sd15")
                if k:
                    model = stacked(model, clip, low_rank(model, k), permeability=opened, **settings)
                counted[k] = profiled(run, Step(run, model, clip, network).ready())
            for kind in counted[0]:
                for k in (1, 8):
                    run.record(f"sd15_{label}_{k}_{kind}", counted[k][kind] - counted[0][kind], "beyond a bare step")


def profiled(run, step):
    """{"kernels", "copies", "waits": number} of a step: as the profiler sees them on a graphics card, and as they can
    be told without one."""
    if not run.gpu:
        from membrane.tools import launches

        with launches.plain_attention():
            return launches.on_meta(step.model, step.latent, step.call).totals()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    run.wait()
    names = {"kernels": ("cudaLaunchKernel", "cuLaunchKernel"), "copies": ("Memcpy HtoD", "Memcpy DtoH")}
    events = [(event.key, event.count) for event in found.key_averages()]
    counted = {kind: sum(n for key, n in events if key.startswith(starts)) for kind, starts in names.items()}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counted | {"waits": sum("synchroniz" in str(warning.message) for warning in seen)}


# ---------------------------------------------------------------- applying, gates


def applying(run):
    """32 adapters in place, against as many LoraLoaders."""
    from membrane.benchmarks import gates

    with run.part("applying 32 adapters", needs=10) as goes:
        if goes:
            model, _, _ = built(run, "sd15")
            found, _ = gates.adapters(model, 4 if run.toy else 32)
            with torch.inference_mode():
                ungated, gated, loras = gates.apply_times(model, found, 1 if run.toy else 3)
            run.record("apply_ratio", ungated / loras, "of LoraLoaders, ungated")
            run.record("apply_gated_ratio", gated / loras, "of LoraLoaders, gated")


def long_prompt(run):
    """The gates of a prompt of 300 words, 32 concepts, against a bare step."""
    from membrane.core.adapters.permeability import Permeability
    from membrane.core.host.patches.stack import applied

    with run.part("gates of 300 words") as goes:
        if not goes:
            return
        model, clip, network = built(run, "sd15")
        bare = Step(run, model, clip, network).ready()
        gated = stacked(model, clip, low_rank(model, 32), permeability=Permeability("facilitated transport"))
        words = WORDS_300.split()
        contexts = [encoded(clip, " ".join(words[i : i + 75]))["cross_attn"] for i in range(0, len(words), 75)]
        text, ratios = torch.cat(contexts, dim=1), []
        for _ in range(run.turns):
            plain = run.seconds(bare)
            begin = time.perf_counter()
            applied(gated).gates(text, "positive", torch.zeros(1))
            ratios.append((time.perf_counter() - begin) / plain)
        run.record("gates_300_words_ratio", median(ratios), "of a bare step, once a sampling")


# ---------------------------------------------------------------- training, closed form


def training(run, name):
    """An iteration of Latent Anchoring against the rows of the published loop."""
    from membrane.benchmarks import training as loops
    from membrane.core.erasers.paths import NoiseSchedule
    from membrane.core.erasers.spm import NOISE, Settings
    from membrane.core.erasers.spm_run import texts_of
    from membrane.core.host.runs.training import HostDenoiser, encoded_for, fitted, trainable_sites

    with run.part(f"training of {name}", needs=6) as goes:
        if not goes:
            return
        model, clip, network = built(run, name)
        pixels = tuple(8 * side for side in reversed(network.latent[-2:]))
        settings = Settings(**{**fitted(model, *pixels, preserves=False), "anchor_kind": NOISE})
        prompts = ("a red star", "a red circle")
        (texts,), found = texts_of(encoded_for(model, clip, [*prompts, ""], *pixels), [prompts], ()), {}
        sites = trainable_sites(model)
        for way in ("ours", "published"):
            with HostDenoiser(model, sites) as denoiser:
                path = denoiser.path(settings.rollout_steps) or NoiseSchedule(settings)
                if way == "published":
                    loops.without_checkpoints(model)

                def once(denoiser=denoiser, way=way, path=path):
                    x = torch.randn(1, *network.latent, generator=torch.Generator().manual_seed(2))
                    getattr(loops, way)(denoiser, texts, settings, x, 2, path)

                once()
                usual = torch.cuda.memory_allocated() if run.gpu else 0
                found[way] = median(run.seconds(once) for _ in range(1 if run.toy else 3)), run.peak(once) - usual
        run.record(f"{name}_training_ratio", found["ours"][0] / found["published"][0], "of the published iteration")
        if run.gpu:
            run.record(f"{name}_training_memory_ratio", found["ours"][1] / found["published"][1], "of its peak memory")


def closed_form(run):
    """UCE of 100 concepts on the processor and on the device: seconds, and how far the two maps differ."""
    from membrane.core.erasers.closed_form.uce import uce_of

    sizes = {"sd15": (768, 76, 2000), "sdxl": (2048, 76, 4000), "wide": (15360, 8, 1000)}
    if run.toy:
        sizes = {"sd15": (64, 7, 20), "wide": (512, 2, 30)}
    for name, (width, rows, preserved) in sizes.items():
        with run.part(f"closed form, {name}", needs=5) as goes:
            if not goes:
                continue
            g = torch.Generator().manual_seed(3)
            spread = torch.logspace(0.5, -1, width)
            drawn = torch.randn(2 * (8 if run.toy else 100), rows, width, generator=g) * spread
            kept, maps, took = torch.randn(preserved, width, generator=g) * spread, {}, {}
            for where in ("cpu", run.device.type):
                targets, replacements = drawn.to(where).chunk(2)
                groups, rest = [[pair] for pair in zip(targets, replacements)], kept.to(where)

                def once(groups=groups, rest=rest, where=where, maps=maps):
                    with torch.device(where):
                        maps[where] = uce_of(groups, rest)

                if where != "cpu":
                    once()
                took[where] = run.seconds(once)
            ours, theirs = maps["cpu"], maps[run.device.type]
            probe = torch.randn(16, width, generator=g).double()
            one, other = (((probe @ m.b.cpu().double().T) @ m.a.cpu().double().T) for m in (ours, theirs))
            run.record(f"closed_form_{name}_difference", ((one - other).norm() / one.norm()).item(), "of the map")
            run.record(f"closed_form_{name}_ratio", took[run.device.type] / took["cpu"], "of the processor's seconds")


# ---------------------------------------------------------------- pictures, memory that is not there


def demo(run):
    """Pictures of the demo models: on the device and on the processor from the same noise, and how many a minute."""
    import comfy.model_management
    from membrane.core.demo.world import latent_to_rgb
    from membrane.tools.host_library import run_node

    for variant, scheduler in (("day", "normal"), ("transformer", "simple")):
        with run.part(f"demo model, {variant}", needs=5) as goes:
            if not goes:
                continue
            model, clip, _ = run_node("MembraneDemoModel", variant=variant)
            positive, negative = (
                run_node("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a red star on snow", "")
            )

            def painted(model, batch, steps, positive=positive, negative=negative, scheduler=scheduler):
                latent = run_node("EmptyLatentImage", width=128, height=128, batch_size=batch)[0]
                drawn = run_node(
                    "KSampler", model=model, seed=7, steps=steps, cfg=1.5, sampler_name="euler", scheduler=scheduler,
                    denoise=1.0, latent_image=latent, positive=positive, negative=negative,
                )[0]["samples"]  # fmt: skip
                return latent_to_rgb(drawn.float().cpu() * 0.18215)

            steps = 2 if run.toy else 20
            here = painted(model, 2, steps)
            batch = 2 if run.toy else 64
            minute = 60 * batch / run.seconds(lambda m=model, b=batch, s=steps: painted(m, b, s))
            run.record(f"demo_{variant}_pictures_a_minute", minute)
            comfy.model_management.unload_all_models()
            model = model.clone()
            model.load_device = torch.device("cpu")
            other = painted(model, 2, steps)
            comfy.model_management.unload_all_models()
            run.record(f"demo_{variant}_difference", (here - other).abs().mean().item() * 255, "of 255, mean")


def no_memory(run):
    """Adapters beside a layer where memory is really too small: for all rows at once, then for one."""
    from membrane.core.adapters.beside import Bypass, Rows
    from membrane.core.adapters.deltas.low_rank import Factors, Part

    with run.part("out of memory") as goes:
        if not goes:
            return
        if not run.gpu:
            raise Skipped("only a graphics card really runs out; tests/host/test_faults.py has it in play")
        columns, rows = 8192, 8
        layer = torch.nn.Linear(512, 512, device=run.device, dtype=torch.bfloat16)
        g = torch.Generator().manual_seed(0)
        factors = Factors(
            torch.randn(columns, 512, generator=g) * 0.01, torch.randn(columns, 512, generator=g) * 0.04,
            torch.zeros(columns, dtype=torch.long),
        )  # fmt: skip
        lent = Rows()
        bypass = Bypass(layer, [Part(factors)], lent)
        x = torch.randn(rows, 4096, 512, generator=g).to(run.device, torch.bfloat16)
        row = 4096 * columns * 2  # bytes of what is between the factors, twice of which is needed at a time

        with torch.inference_mode(), lent.lent(torch.ones(1, 1, device=run.device), (0,)):
            expected = bypass(x)
            with only(run, 4 * row):
                found = bypass(x)
            off = ((found - expected).float().norm() / expected.float().norm()).item()
            run.record("oom_by_rows_difference", off, "of what all rows at once give")
            with only(run, row // 2):
                try:
                    bypass(x)
                except torch.cuda.OutOfMemoryError as error:
                    run.record("oom_says_what_to_do", float("make smaller pictures" in str(error)))
                else:
                    run.record("oom_says_what_to_do", 0.0)


@contextmanager
def only(run, size):
    """While it lasts, torch gets no more than `size` bytes of the device beyond what it has."""
    run.tidy()
    total = torch.cuda.get_device_properties(run.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + size) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        run.tidy()


# ---------------------------------------------------------------- all of it

SECTIONS = {  # name: (seconds, function), the most wanted first; budgets of 290 s with what the start takes
    "waits": (15, waits),
    "steps_sd15": (25, lambda run: steps(run, "sd15", BF16)),
    "steps_sdxl": (40, lambda run: steps(run, "sdxl", BF16)),
    "steps_flux": (45, lambda run: steps(run, "flux", BF16)),
    "steps_sd15_fp8": (12, lambda run: steps(run, "sd15", FP8)),
    "steps_flux_fp8": (20, lambda run: steps(run, "flux", FP8)),
    "no_memory": (5, no_memory),
    "demo": (20, demo),
    "applying": (20, applying),
    "long_prompt": (8, long_prompt),
    "closed_form": (25, closed_form),
    "training_sd15": (12, lambda run: training(run, "sd15")),
    "training_sdxl": (12, lambda run: training(run, "sdxl")),
    "training_flux": (12, lambda run: training(run, "flux")),
    "compiled": (120, compiled),
}


def measured(run, names):
    """Runs sections one after the other, each within its budget."""
    sections = SECTIONS | {"compiled_here": (SECONDS, compiled_here)}
    for name in names:
        budget, function = sections[name]
        begin = time.perf_counter()
        run.limit = math.inf if run.toy else begin + budget
        print(f"{name} (at most {budget} s)", flush=True)
        function(run)
        run.tidy()
        print(f"  took {time.perf_counter() - begin:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny networks on the processor, to see that it runs")
    parser.add_argument("--only", nargs="*", choices=[*SECTIONS, "compiled_here"], default=list(SECTIONS))
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        sys.exit(
            "error: torch finds no graphics card here, and figures of a processor would say nothing about one; run it "
            "where there is one, or add --toy to see that it works (python -m benchmarks.gpu --toy)."
        )
    begin = time.perf_counter()
    if not arguments.toy:
        os.environ["MEMBRANE_TEST_DEVICE"] = "cuda"
    from membrane.tools.host_library import start

    torch.set_num_threads(1 if arguments.toy else min(8, os.cpu_count() or 1))
    _, tidy = start()
    device = torch.device("cpu") if arguments.toy else torch.device("cuda", 0)
    run = Run(device, arguments.toy, math.inf if arguments.toy else begin + SECONDS)
    if run.gpu:
        print(torch.cuda.get_device_name(run.device), flush=True)
    try:
        measured(run, arguments.only)
    finally:
        tidy()
    run.record("skipped", len(run.skipped))
    run.record("seconds", time.perf_counter() - begin)
    print(json.dumps({"figures": run.figures}))


if __name__ == "__main__":
    main()
