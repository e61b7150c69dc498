"""What is left after a fault: no half a file, no changed weight, no patch or hook, and the next run works.

Each test notes the fault and what came of it, for the table in docs/reliability.md.
"""

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import comfy.model_management
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.cli_args import args
from membrane.core import files
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.beside import Bypass
from membrane.core.adapters.deltas import low_rank
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.errors import ErasureError
from membrane.core.formats import native
from membrane.core.host.files import calibrations
from membrane.core.host.files.folders import CATEGORY, EXTENSIONS
from membrane.core.host.files.reports import Place
from membrane.core.host.model.layers import modules
from membrane.core.host.patches.conditioning import ErasedConditioning
from membrane.core.host.patches.steps import ErasedSteps
from membrane.core.measures.detection import Calibration
from membrane.tools.run import comfy_server
from PIL import Image

pytestmark = pytest.mark.slow
management = comfy.model_management
STAR, HEART = "a red star on snow", "a blue heart on sand"
SMALL = {"width": 64, "height": 64}
CANCELLED = management.InterruptProcessingException


@pytest.fixture
def note(record_property):
    """note(fault, outcome) for the table."""

    def write(fault, outcome):
        record_property("fault", fault)
        record_property("outcome", " ".join(str(outcome).split()))

    return write


def changes_of(model, seed=1, size=0.1):
    g, changes = torch.Generator().manual_seed(seed), {}
    for key, module in modules(model).items():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if path.startswith("middle_block.1") and module.weight.dim() in (2, 4) and hasattr(module, "weight"):
            out, inside = module.weight.shape[:2]
            up, down = torch.randn(out, 2, generator=g) * size, torch.randn(2, inside, generator=g) * inside**-0.5
            changes[path.replace(".", "_")] = LowRank(up, down, 2.0)
    return changes


def spm(model, seed=1):
    return ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes_of(model, seed)})


def words():
    g = torch.Generator().manual_seed(1)
    return ErasureAdapter(
        Card("UCE", (STAR,)),
        {
            "map": {
                "text": TextMap(
                    torch.randn(128, 3, generator=g) * 0.1, torch.randn(3, 128, generator=g) * 0.1, (0,) * 3
                )
            }
        },
    )


def pruned(model):
    name, change = next((n, c) for n, c in changes_of(model).items() if n.endswith("ff_net_2"))
    marks = torch.rand(len(change.up), change.down.shape[1], generator=torch.Generator().manual_seed(2)) < 0.2
    return ErasureAdapter(Card("ConceptPrune", (STAR,)), {"mask": {name: Mask.of(marks)}})


def applied(node, demo, adapter, mode="facilitated transport", model=None, strength=0.8):
    stack = node("MembraneStack", adapter=adapter, strength=strength, permeability=mode)[0]
    return node("MembraneApply", model=model or demo[0], clip=demo[1], stack=stack)[0]


def traces(model):
    """What a run may leave on the network: forwards and hooks of its layers, patches of the MODEL, and its weights."""
    management.unload_all_models()
    base, found = model.model, []
    for name, module in base.named_modules():
        kept = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        found += [name] * any(map(bool, kept))
        for method in ("forward", "extra_conds", "apply_model"):
            # hosts put the class's own method back as an attribute
            own = getattr(module.__dict__.get(method), "__func__", None)
            found += [f"{name}.{method}"] * (method in module.__dict__ and own is not getattr(type(module), method))
    state = {key: value.clone() for key, value in base.state_dict().items()}
    return found, sorted(model.object_patches), sorted(model.patches), state


def same(before, after):
    return before[:3] == after[:3] and all(torch.equal(before[3][key], value) for key, value in after[3].items())


# ---------------------------------------------------------------- Cancel

TEXTS = {"concepts": f"{STAR} -> circle", "preserve": HEART, "templates": "{}"}
EVALUATE = {
    "erase_prompts": STAR, "neighbour_prompts": "", "unrelated_prompts": HEART, "seeds": 2, "seed": 1, "steps": 2,
    "cfg": 3.0, **SMALL, "noise_levels": 2,
}  # fmt: skip
STAGES = {
    "encoding and solving (RECE)": lambda node, demo: node(
        "MembraneErase", model=demo[0], clip=demo[1], replace_with="", method="RECE", strength=1.0, **TEXTS
    ),
    "sampling": lambda node, demo: node(
        "KSampler", model=applied(node, demo, spm(demo[0])), seed=7, steps=3, cfg=3.0, sampler_name="euler",
        scheduler="normal", positive=node("CLIPTextEncode", clip=demo[1], text=STAR)[0],
        negative=node("CLIPTextEncode", clip=demo[1], text="")[0], denoise=1.0,
        latent_image=node("EmptyLatentImage", **SMALL, batch_size=1)[0],
    ),
    "detecting": lambda node, demo: node(
        "MembraneDetectMemorization", model=demo[0], clip=demo[1], prompts=f"{STAR}\n{HEART}", seeds=1, first_steps=1,
        steps=2, cfg=3.0, seed=1, **SMALL, bright_ending=True,
    ),
    "evaluating": lambda node, demo: node(
        "MembraneEvaluate", original=demo[0], erased=applied(node, demo, spm(demo[0])), clip=demo[1],
        filename_prefix="faults/cancelled", resume=False, **EVALUATE,
    ),
    "training": lambda node, demo: node(
        "MembraneTrain", model=demo[0], clip=demo[1], concepts=STAR, surrogate="", steps=3, rank=1, seed=1, **SMALL,
        filename_prefix="faults/trained", rollout_steps=2, preview_every=0,
    ),
    "locating (pruning)": lambda node, demo: node(
        "MembraneLocateMemorization", model=demo[0], clip=demo[1], prompts=STAR, base_prompts="", first_steps=1,
        steps=2, cfg=3.0, seed=1, **SMALL,
    ),
    "stress test": lambda node, demo: node(
        "MembraneStressTest", original=demo[0], erased=applied(node, demo, words(), "fixed"), clip=demo[1],
        concept="star", captions="{}", pictures=1, seed=1, steps=1, cfg=3.0, **SMALL, generations=1, population=4,
        prompts_tried=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_cancel(node, demo, sample, monkeypatch, note, stage):
    """At the first, a middle and the last place where the stage looks whether it was pressed."""
    run, before, original = STAGES[stage], traces(demo[0]), sample(demo[0])
    checks, at = [0], [None]

    def look():
        checks[0] += 1
        if checks[0] == at[0]:
            raise CANCELLED

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", look)
    # as the host's server does after each step
    hook = lambda *progress, **more: management.throw_exception_if_processing_interrupted()  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    run(node, demo)
    count = checks[0]
    assert count >= 2
    for place in sorted({1, (count + 1) // 2, count}):
        stopped = False
        while not stopped:  # a later run may look less often: some hosts' progress bars go by the clock
            checks[0], at[0] = 0, place
            try:
                run(node, demo)
            except CANCELLED:
                stopped = True
            else:
                assert checks[0] < place, f"Cancel at check {place} of {checks[0]} did not stop it"
                place = checks[0]
        assert same(before, traces(demo[0]))
        at[0] = None
        assert torch.equal(sample(demo[0]), original)
    assert not [
        n for where, _, names in os.walk(folder_paths.get_output_directory()) for n in names if n.endswith("tmp")
    ]
    note(f"Cancel while {stage}, first, middle and last of {count} checks", "stops; model, patches and hooks as before")


def test_cancel_while_saving(node, demo, monkeypatch, tmp_path, note):
    """Nothing is asked there; what comes in between leaves the old file."""
    path = str(tmp_path / "x.safetensors")
    native.save(words(), path)
    before = (tmp_path / "x.safetensors").read_bytes()

    def interrupted(*args):
        raise CANCELLED

    for place in ("save_file", "os"):
        with monkeypatch.context() as patch:
            if place == "os":
                patch.setattr(files.os, "replace", interrupted)
            else:
                patch.setattr(files, "save_file", interrupted)
            with pytest.raises(CANCELLED):
                native.save(spm(demo[0]), path)
        assert (tmp_path / "x.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]
    note("Cancel while saving, before and after the bytes are written", "old file intact, nothing left beside it")


# ---------------------------------------------------------------- exceptions and memory


@pytest.mark.parametrize("kind", ["gated layers", "masks", "text in steps"])
def test_an_exception_in_the_middle_of_sampling(node, demo, sample, note, kind):
    make = {"gated layers": spm, "masks": pruned, "text in steps": lambda model: words()}[kind]
    stack = node("MembraneStack", adapter=make(demo[0]), strength=1.0, permeability="facilitated transport",
                 end_percent=0.9 if kind == "text in steps" else 1.0)[0]  # fmt: skip
    model = node("MembraneApply", model=demo[0], clip=demo[1], stack=stack)[0]
    expected, base, before = sample(model), sample(demo[0]), traces(demo[0])
    assert not torch.equal(expected, base)
    layer, calls = modules(demo[0])["diffusion_model.out.2.weight"], []

    def fail(module, inputs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("another node's mistake")

    hook = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="another node's mistake"):
            sample(model)
    finally:
        hook.remove()
    steps = model.object_patches["apply_model"]
    assert isinstance(steps, ErasedSteps) and steps.rows.gates is None and steps.rows.active == ()
    assert torch.equal(sample(demo[0]), base) and torch.equal(sample(model), expected)
    assert same(before, traces(demo[0]))
    note(f"exception in the second step, {kind} on the model", "gates taken back; both models sample as before")


@pytest.fixture
def shortage(monkeypatch):
    """shortage(rows): from now on the adapters' own products run out of memory above so many rows of a batch."""

    class Functional:
        linear, conv2d = torch.nn.functional.linear, torch.nn.functional.conv2d

    def limit(rows):
        def limited(function):
            def run(x, *args, **kwargs):
                if len(x) > rows:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
                return function(x, *args, **kwargs)

            return run

        Functional.linear = staticmethod(limited(torch.nn.functional.linear))
        Functional.conv2d = staticmethod(limited(torch.nn.functional.conv2d))
        monkeypatch.setattr(low_rank, "functional", Functional)

    return limit


def test_out_of_memory_beside_a_layer(node, demo, sample, shortage, note):
    """Row by row instead: the same picture."""
    model = applied(node, demo, spm(demo[0]))
    expected, base = sample(model, batch=3), sample(demo[0], batch=3)
    shortage(1)
    found = sample(model, batch=3)
    assert (found - expected).norm() < 1e-5 * (expected - base).norm()
    note("out of memory beside a layer, all rows at once", "computed row by row, the same picture")


def test_no_memory_at_all_beside_a_layer(node, demo, sample, shortage, monkeypatch, note):
    model = applied(node, demo, spm(demo[0]))
    base, before = sample(demo[0]), traces(demo[0])
    with monkeypatch.context():
        shortage(0)
        with pytest.raises(
            torch.cuda.OutOfMemoryError, match="not enough memory for the .* make smaller pictures"
        ) as found:
            sample(model)
    monkeypatch.undo()
    note("out of memory beside a layer, even for one row", found.value)
    del found  # its traceback holds the sampling, which would not be over
    gc.collect()
    assert torch.equal(sample(demo[0]), base) and same(before, traces(demo[0]))


def test_out_of_memory_while_weights_are_patched(node, demo, sample, monkeypatch, note):
    """The host's own patching fails for an erasure without gates: the next run starts from the right weights."""
    model = applied(node, demo, spm(demo[0]), "fixed")
    base, expected = sample(demo[0]), sample(model)
    management.unload_all_models()
    cls, calls = type(model), []
    name = "patch_weight_to_device" if hasattr(cls, "patch_weight_to_device") else "calculate_weight"
    original = getattr(cls, name)

    def scarce(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, scarce)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            sample(model)
    assert len(calls) >= 3
    management.unload_all_models()
    assert torch.equal(sample(demo[0]), base) and torch.equal(sample(model), expected)
    note("out of memory while the host patches weights", "the host's error; next runs right")


# ---------------------------------------------------------------- disks


@contextlib.contextmanager
def full_disk(size):
    """No file of this process can grow beyond so many bytes: a real failure of write(), in the middle."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def disk(monkeypatch):
    """A folder on the way to which everybody may go, as the model and the output folder."""
    work = tempfile.mkdtemp(prefix="membrane-disk-")
    os.chmod(work, 0o755)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, CATEGORY, ([work], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: work)
    monkeypatch.setattr(calibrations, "family_name", lambda model: "SD15")
    yield work
    os.chmod(work, 0o755)
    shutil.rmtree(work)


def saves(node, demo):
    """{what: function that saves it}."""
    calibration = Calibration({"a": 1}, tuple(float(i) for i in range(3000)), tuple(float(i) for i in range(30)))
    return {
        "adapter": lambda: node("MembraneSaveAdapter", adapter=spm(demo[0]), filename_prefix="x"),
        "report": lambda: Place("report").write("json", "[" + "1, " * 20_000 + "1]"),
        "calibration": lambda: calibrations.store(None, calibration),
    }


@pytest.mark.parametrize("what", ["adapter", "report", "calibration"])
def test_a_full_disk(node, demo, disk, note, what):
    """A sentence; the file that was there stays, and nothing half stays beside it."""
    save = saves(node, demo)[what]
    save()
    before = {p: open(p, "rb").read() for p in everything(disk)}
    with full_disk(4096), pytest.raises(ErasureError, match="could not be saved .* make room") as found:
        save()
    assert {p: open(p, "rb").read() for p in everything(disk)} == before
    save()
    note(f"disk full while saving: {what}", found.value)


def everything(folder):
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


@contextlib.contextmanager
def read_only(folder):
    """A folder that this process may not write to; the superuser becomes nobody for it."""
    places = [where for where, *_ in os.walk(folder)]
    for place in places:
        os.chmod(place, 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for place in places:
            os.chmod(place, 0o755)


@pytest.mark.parametrize("what", ["adapter", "report", "calibration"])
def test_a_read_only_folder(node, demo, disk, note, what):
    save = saves(node, demo)[what]
    save()  # imports what it needs
    before = everything(disk)
    with read_only(disk), pytest.raises(ErasureError, match="could not be saved .* can be written to") as found:
        save()
    assert everything(disk) == before
    note(f"read-only folder while saving: {what}", found.value)


def test_a_folder_that_cannot_be_made(node, demo, disk, note):
    with read_only(disk), pytest.raises(ErasureError, match="could not be saved") as found:
        node("MembraneSaveAdapter", adapter=words(), filename_prefix="new/x")
    assert not os.path.exists(os.path.join(disk, "new"))
    note("read-only folder, a subfolder is to be made", found.value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_killed_while_saving(demo, tmp_path, note):
    """SIGKILL at some moment, again and again: the file is one of the two that were saved, whole."""
    path, both = str(tmp_path / "x.safetensors"), [spm(demo[0], seed).low_rank for seed in (1, 2)]

    def is_one_of_both():
        found = native.load(path).low_rank
        return any(all(torch.equal(found[n].up, change.up) for n, change in one.items()) for one in both)

    native.save(spm(demo[0]), path)
    wait = random.Random(1)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for seed in (1, 2):
                        native.save(spm(demo[0], seed), path)
            finally:
                os._exit(1)
        time.sleep(wait.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert is_one_of_both()
    left = [name for name in os.listdir(tmp_path) if name != "x.safetensors"]
    assert not [name for name in left if os.path.splitext(name)[1] in EXTENSIONS], left  # no node lists the others
    note("host killed while saving, 12 times", "file whole every time, the old one or the new one")


# ---------------------------------------------------------------- one run after the other


@pytest.mark.parametrize("kind", ["gated", "fixed", "masks", "text"])
def test_unloaded_and_reloaded_between(node, demo, sample, note, kind):
    adapter = {"masks": pruned, "text": lambda model: words()}.get(kind, spm)(demo[0])
    model = applied(node, demo, adapter, "fixed" if kind == "fixed" else "facilitated transport")
    base, expected = sample(demo[0]), sample(model)
    other = node("MembraneDemoModel", variant="night")[0]
    for _ in range(2):
        management.unload_all_models()
        assert torch.equal(sample(model), expected)
        sample(other)
        management.soft_empty_cache()
        assert torch.equal(sample(demo[0]), base)
    note(f"model unloaded and loaded again between runs, {kind}", "the same pictures, bit for bit")


def living():
    """How many objects of the kinds that runs could leave behind are alive."""
    gc.collect()
    kinds = (Bypass, low_rank.Part, ErasedConditioning, ErasedSteps, comfy.model_patcher.ModelPatcher)
    count = dict.fromkeys((*(kind.__name__ for kind in kinds), "Tensor"), 0)
    for thing in gc.get_objects():
        for kind in kinds:
            if type(thing) is kind or (kind.__name__ == "ModelPatcher" and isinstance(thing, kind)):
                count[kind.__name__] += 1
        count["Tensor"] += type(thing) is torch.Tensor
    return count


def test_thirty_runs(node, demo, sample, note):
    """What `run.py bench reliability` does 500 times: nothing is more after 30 runs than after 10."""
    seen = {}
    for run in range(30):
        kind = (spm, pruned, lambda model: words())[run % 3](demo[0])
        model = applied(node, demo, kind, ("facilitated transport", "fixed")[run % 2], strength=0.1 + run / 50)
        assert sample(model, batch=1 + run % 2).isfinite().all()
        del model, kind
        if run + 1 in (12, 30):
            management.unload_all_models()
            seen[run + 1] = living()
    runs = node("MembraneApply", model=demo[0], clip=demo[1], stack=node(
        "MembraneStack", adapter=spm(demo[0]), strength=1.0, permeability="facilitated transport")[0])[0]  # fmt: skip
    sample(runs)
    gc.collect()
    assert not [state for ref, state in runs.object_patches["extra_conds"].runs.under_way if ref() is not None]
    assert seen[12] == seen[30]
    note("30 runs of other stacks one after the other", "no more patches, clones or tensors alive than after 12")


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("prompt", ["", " ", "star", " ".join(["star on snow,"] * 350), "\u661f" * 400, "(star:1000)"])
def test_gates_of_any_prompt(node, demo, note, prompt):
    """Empty, of one token and of a thousand, and weighted beyond reason: finite, and at most the strength."""
    adapter = spm(demo[0])
    model = applied(node, demo, adapter, strength=1.0)
    text = node("CLIPTextEncode", clip=demo[1], text=prompt)[0]
    gates = model.object_patches["extra_conds"].gates(text[0][0], "positive", None)
    assert gates.isfinite().all() and gates.abs().max() <= 1 + 1e-5
    tokens = text[0][0].shape[1]
    note(f"prompt of {len(prompt)} characters, {tokens} vectors", f"gate {gates.max():.3f}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_hundred_adapters_in_half_precision(node, demo, sample, monkeypatch, note, dtype):
    """Their factors beyond what half precision holds, their sum one adapter: finite, and that adapter's picture."""
    option = {torch.bfloat16: "bf16_unet", torch.float16: "fp16_unet"}[dtype]
    if not hasattr(args, option):
        pytest.skip(f"this host has no {option}")
    with monkeypatch.context() as patch:
        patch.setattr(args, option, True)
        patch.setattr(management, "unet_manual_cast", lambda *a, **k: None)
        half = node("MembraneDemoModel", variant="day")[0]
    assert half.model.get_dtype() == dtype
    one = changes_of(demo[0], size=1.0)
    many = {n: LowRank(c.up * 1e7, c.down * 1e-9, c.alpha) for n, c in one.items()}
    stack = None
    for _ in range(100):
        stack = node("MembraneStack", adapter=ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": many}), strength=1.0,
                     permeability="facilitated transport", stack=stack)[0]  # fmt: skip
    found = sample(node("MembraneApply", model=half, clip=demo[1], stack=stack)[0])
    expected = sample(applied(node, demo, ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": one}), strength=1.0))
    base, rough = sample(demo[0]), sample(half)
    rounding, effect = (rough - base).norm(), (expected - base).norm()
    print(f"rounding {rounding:.3g}, effect {effect:.3g}, error {(found - expected).norm():.3g}")
    assert found.isfinite().all() and effect > 1.5 * rounding
    assert (found - expected).norm() < 2 * rounding
    note(f"100 adapters in {option.removesuffix('_unet')}, factors of 1e7 and 1e-9", "finite, as their sum in float32")


# ---------------------------------------------------------------- the host's own queue


@pytest.fixture(scope="module")
def server(host):
    """A server of this host, since only its queue knows of Cancel, caches and two prompts at once."""
    with comfy_server.Server(host.path, sys.executable) as running:
        yield running


def graph(steps=4, seed=1, concept="star", adapter=None):
    """A prompt that samples one picture; adapter: name of a file, else an erasure of a concept is computed."""
    erase = {"concepts": f"{concept} -> circle", "replace_with": "", "preserve": "", "method": "UCE", "strength": 1.0}
    found = {
        "1": {"class_type": "MembraneDemoModel", "inputs": {"variant": "day"}},
        "2": {"class_type": "MembraneErase", "inputs": {"model": ["1", 0], "clip": ["1", 1], **erase}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red star on snow"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {**SMALL, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {
            "model": ["2", 0], "seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0], "denoise": 1.0}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }  # fmt: skip
    if adapter:
        found["2"] = {"class_type": "MembraneLoadAdapter", "inputs": {"adapter_name": adapter}}
        found["8"] = {"class_type": "MembraneStack", "inputs": {
            "adapter": ["2", 0], "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}}  # fmt: skip
        found["9"] = {
            "class_type": "MembraneApply", "inputs": {"model": ["1", 0], "clip": ["1", 1], "stack": ["8", 0]},
        }  # fmt: skip
        found["5"]["inputs"]["model"] = ["9", 0]
    return found


def picture(server, prompt_id):
    data = server.images(server.wait(prompt_id, timeout=120))[0][1]
    return Image.open(io.BytesIO(data)).tobytes()  # the file also holds the prompt


def test_two_prompts_at_once(server, note):
    """Queued from two threads: each gives what it gives alone."""
    prompts = [graph(seed=seed, concept=concept) for seed, concept in ((1, "star"), (2, "red"), (1, "snow"))]
    alone = [picture(server, server.queue(prompt)) for prompt in prompts]
    assert len(set(alone)) == 3
    found = {}

    def ask(number):
        other = graph(seed=10 + number)  # so that nothing is answered from the cache
        server.wait(server.queue(other), timeout=120)
        found[number] = picture(server, server.queue(prompts[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(3)] == alone
    note("three prompts queued at once", "each picture as alone, bit for bit")


def test_cancel_over_http(server, note):
    expected = picture(server, server.queue(graph(seed=3)))
    running = server.queue(graph(seed=4, steps=3000))
    time.sleep(1.0)
    server.interrupt()
    with pytest.raises(comfy_server.ExecutionFailed, match="interrupted"):
        server.wait(running, timeout=60)
    assert picture(server, server.queue(graph(seed=3))) == expected
    note("Cancel in the browser while sampling", "interrupted; the next prompt as before")


def test_a_file_replaced_between_runs(server, note):
    """Known by its content: the new one is used, and the same content again is not."""
    save = {"class_type": "MembraneSaveAdapter", "inputs": {"adapter": ["2", 1], "filename_prefix": "faults/kept"}}
    names = []
    for concept in ("star", "red"):
        prompt = {k: v for k, v in graph(concept=concept).items() if k in ("1", "2")} | {"8": save}
        names.append(server.wait(server.queue(prompt), timeout=120)["outputs"]["8"]["text"][0])
    folders = [server.host / "models" / CATEGORY, *server.work.rglob(CATEGORY)]
    first, second = (next(f / name for f in folders if (f / name).exists()) for name in names)
    try:
        whole = first.read_bytes()
        star = picture(server, server.queue(graph(adapter=names[0])))
        red = picture(server, server.queue(graph(adapter=names[1])))
        assert star != red
        shutil.copyfile(second, first)
        assert picture(server, server.queue(graph(adapter=names[0]))) == red
        entry = server.wait(server.queue(graph(adapter=names[0])), timeout=120)
        cached = [data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached"]
        assert "2" in cached[0]
        first.write_bytes(b"half a file")
        with pytest.raises(comfy_server.ExecutionFailed, match="cannot be read"):
            server.wait(server.queue(graph(adapter=names[0])), timeout=120)
        first.write_bytes(whole)
        assert picture(server, server.queue(graph(adapter=names[0]))) == star
    finally:
        for file in (first, second):
            file.unlink()
    note("file replaced, damaged and put back between runs", "the picture of what is there; damage is a sentence")


def test_requests_from_other_pages(server, note):
    """The pack's routes are as open to other origins as the host's own, and no more."""

    def asked(path, **options):
        headers = {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
        request = urllib.request.Request(server.url + path, headers=headers, **options)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                return answer.status, answer.headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("Access-Control-Allow-Origin")

    own = asked("/queue"), asked("/interrupt", data=b"{}", method="POST")
    ours = asked("/membrane/adapter?name=x"), asked("/membrane/openings", data=b"{}", method="POST")
    assert [(status == 403, allowed) for status, allowed in own] == [
        (status == 403, allowed) for status, allowed in ours
    ]
    assert all(allowed is None for _, allowed in ours)
    note("requests from a page of another origin", "refused by this host" if own[0][0] == 403 else "as the host's own")


def test_hostile_workflow_inputs(server, note):
    """What no widget gives but a script may send: refused with a sentence, and the host goes on."""
    stack = {"membrane_stack": 1, "entries": [{"adapter": "../../x.safetensors"}]}
    sent = {
        "a stack that names a file outside": ("MembraneStackEditor", {"stack_json": json.dumps(stack)}),
        "a stack of brackets": ("MembraneStackEditor", {"stack_json": "[" * 100_000}),
        "half a character": ("MembraneErase", {"concepts": "\ud800 -> circle"}),
        "a template without a place": ("MembraneErase", {"concepts": "a", "templates": "x"}),
        "a concept of 10,000 words": ("MembraneErase", {"concepts": "star " * 10_000}),
    }
    said = []
    for what, (kind, inputs) in sent.items():
        prompt = graph()
        if kind == "MembraneErase":
            prompt["2"]["inputs"] |= inputs
        else:
            prompt["8"] = {"class_type": kind, "inputs": inputs}
            prompt["9"] = {
                "class_type": "MembraneApply", "inputs": {"model": ["1", 0], "clip": ["1", 1], "stack": ["8", 0]},
            }  # fmt: skip
            prompt["5"]["inputs"]["model"] = ["9", 0]
        with pytest.raises((comfy_server.ExecutionFailed, comfy_server.PromptError)) as found:
            server.wait(server.queue(prompt), timeout=120)
        reason = getattr(found.value, "reason", "") or str(found.value)
        assert reason.endswith((".", ".)")) and "Traceback" not in reason, (what, reason)
        said.append(what)
    assert picture(server, server.queue(graph()))
    note("hostile workflow inputs: " + ", ".join(said), "a sentence each; the host goes on")
