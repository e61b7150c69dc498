"""Tests in this folder run inside one ComfyUI, in this process: the one MEMBRANE_HOST names.

Importing this file starts the host as a library, so test modules may import its modules at
their top. Only one host fits into a process; 'run.py test' starts one process for each.
"""

import shutil
import tempfile
import types
from pathlib import Path

import pytest
import torch
from membrane.tools import host_library
from membrane.tools.run import hosts

try:
    HOST = hosts.wanted()
except hosts.HostNotFound as error:
    raise pytest.UsageError(str(error)) from None
WORK = Path(tempfile.mkdtemp(prefix="membrane-host-"))
host_library.start_host(HOST, WORK)
host_library.load_pack()

STAR, HEART = "a red star on snow", "a blue heart on sand"
# Inputs of Membrane Demo Model; every test that takes `demo` runs on each of them.
DEMO_MODELS = (pytest.param({"variant": "day"}, id=pytest.HIDDEN_PARAM),)


def pytest_unconfigure():
    """Remove the temporary folders."""
    shutil.rmtree(WORK, ignore_errors=True)


@pytest.fixture(scope="session")
def host():
    """The host: name, path, version, and work (the folder its temporary folders lie in)."""
    return types.SimpleNamespace(**HOST._asdict(), work=WORK)


@pytest.fixture(scope="session")
def pack():
    """The pack's root module, with NODE_CLASS_MAPPINGS."""
    return host_library.load_pack()


@pytest.fixture(scope="session")
def node():
    """node("KSampler", **inputs) -> outputs; for nodes of the host and of the pack."""
    return host_library.run_node


@pytest.fixture(scope="module", params=DEMO_MODELS)
def demo(request, node):
    """(MODEL, CLIP, VAE) of a demo model."""
    return node("MembraneDemoModel", **request.param)


@pytest.fixture(scope="module", params=["day", "transformer"])
def either(request, node):
    """((MODEL, CLIP, VAE), scheduler) of the demo model's U-Net and of its transformer."""
    from membrane.core.host.compat import has_flux

    if request.param == "transformer" and not has_flux():
        pytest.skip("this host has no Flux")
    scheduler = "simple" if request.param == "transformer" else "normal"
    return node("MembraneDemoModel", variant=request.param), scheduler


@pytest.fixture
def inference():
    """Inference mode, in which hosts run nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def text(node, demo):
    """text(prompt) -> CONDITIONING of the demo model."""
    known = {}

    def encode(prompt):
        if prompt not in known:
            known[prompt] = node("CLIPTextEncode", clip=demo[1], text=prompt)[0]
        return known[prompt]

    return encode


@pytest.fixture(scope="module")
def sample(node, text):
    """sample(model, ...) -> latents (batch, channels, size / 8, size / 8); prompts may be texts or CONDITIONINGs."""

    def run(
        model, positive=STAR, negative=HEART, *, steps=2, cfg=3.0, seed=7, batch=1, size=64, sampler="euler",
        scheduler="normal",
    ):  # fmt: skip
        positive, negative = (text(prompt) if isinstance(prompt, str) else prompt for prompt in (positive, negative))
        latent = node("EmptyLatentImage", width=size, height=size, batch_size=batch)[0]
        return node(
            "KSampler", model=model, seed=seed, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
            positive=positive, negative=negative, latent_image=latent, denoise=1.0,
        )[0]["samples"]  # fmt: skip

    return run


@pytest.fixture(scope="session")
def close():
    """close(found, expected, base, bound): equal up to a bound, relative to what the adapters do at all.

    seen: the least share of the latents that they must change; floor: share of the latents that the bound is of when
    they change less.
    """

    def check(found, expected, base, bound, seen=0.01, floor=0.0):
        effect, error = (expected - base).double().norm(), (found - expected).double().norm()
        assert effect > seen * base.double().norm(), "the adapters do nothing here"
        assert error <= bound * max(effect, floor * base.double().norm()), (
            f"off by {error / effect:.1e} of the adapters' effect"
        )

    return check


@pytest.fixture(scope="module")
def transformer_layers(demo):
    """{site: module} of every linear layer and convolution inside the demo model's transformers."""
    from membrane.core.host.model.layers import modules

    found = {}
    for key, module in modules(demo[0]).items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        inside = "transformer_blocks" in name or name.endswith(("proj_in", "proj_out"))
        if inside and (hasattr(module, "in_features") or hasattr(module, "kernel_size")):
            found[name.replace(".", "_")] = module
    return found


@pytest.fixture(scope="module")
def random_adapter(transformer_layers):
    """random_adapter(seed, ...) -> an adapter on all layers of the demo model's transformers, its factors random.

    size: of the product, such that 0.2 is seen in the latents; bias: also change the biases that there are.
    """
    from membrane.core.adapters.adapter import Card, ErasureAdapter
    from membrane.core.adapters.deltas.low_rank import LowRank

    def make(seed, concept=STAR, rank=1, size=0.2, bias=False, method="SPM"):
        g, changes = torch.Generator().manual_seed(seed), {}
        for name, module in transformer_layers.items():
            out, inside = module.weight.shape[:2]
            up = torch.randn(out, rank, generator=g) * size
            down = torch.randn(rank, inside, generator=g) * inside**-0.5
            shift = torch.randn(out, generator=g) * 0.05 if bias and module.bias is not None else None
            changes[name] = LowRank(up, down, 1.0 * rank, shift)
        return ErasureAdapter(Card(method, (concept,)), {"low_rank": changes})

    return make


@pytest.fixture
def nothing_kept(monkeypatch):
    """A memory of encoded texts that is empty."""
    from membrane.core.host.runs import erasing
    from membrane.core.host.text import entries, kept

    fresh = kept.Kept()
    for module in (entries, erasing):
        monkeypatch.setattr(module, "KEPT", fresh)


@pytest.fixture
def encodes(demo, monkeypatch):
    """A list that grows by one for every call of the text encoder."""
    model, calls = demo[1].cond_stage_model, []
    encode = model.encode_token_weights
    monkeypatch.setattr(model, "encode_token_weights", lambda *args: (calls.append(1), encode(*args))[1])
    return calls
