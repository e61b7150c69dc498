"""What adapters keep on a device is the host's to take away: it calls for it when it takes a model off the device."""

import comfy.model_management
import pytest
import torch
from membrane.benchmarks import gpu
from membrane.core.adapters.beside import Bypass
from membrane.core.adapters.permeability import Permeability
from membrane.core.host.patches.kept import NAME
from membrane.core.host.patches.places import without_stack
from membrane.core.host.patches.steps import APPLY_MODEL
from membrane.tools.tiny import networks

OPENED, FIXED = (Permeability(mode) for mode in ("facilitated transport", "fixed"))
ELSEWHERE, HERE = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def stacked():
    """A tiny U-Net of its own with gated adapters on its layers, a map for a part of the steps and a mask."""
    model, clip = networks.build("sd15", dynamic=False), networks.text_encoder("sd15")
    layers = gpu.stacked(model, clip, gpu.low_rank(model, 3), permeability=OPENED)
    timed = gpu.stacked(layers, clip, [gpu.text_map(48)], permeability=OPENED, end_percent=0.9)
    found = gpu.stacked(timed, clip, [gpu.masks(model)], strength=1.0, permeability=FIXED)
    text = [[value, more] for value, more in clip_text(clip)]
    yield found, text
    comfy.model_management.unload_all_models()


def clip_text(clip):
    found = gpu.encoded(clip, gpu.CONCEPT)
    return [(found.pop("cross_attn"), found)]


def predicted(model, text):
    with torch.inference_mode():
        return networks.predict(model, text, text, "sd15")


def kept(model):
    """Everything that the patches of a MODEL keep on a device between two steps, as far as there is any."""
    found = []
    for patch in model.object_patches.values():
        if isinstance(patch, Bypass):
            found += [part.ready for part in patch.parts]
            found += [patch.changes.ready] if patch.changes else []
            found += [patch.rows.lending, patch.rows.places]
    steps = model.object_patches[APPLY_MODEL]
    return [one for one in (*found, steps.lent, steps.bounds) if one is not None]


def test_what_is_kept_on_the_device_is_given_back_when_the_host_takes_the_model_off_it(stacked):
    model, text = stacked
    before = predicted(model, text)
    assert len(kept(model)) > 20
    model.model_patches_to(HERE)  # as when it is loaded again
    model.model_patches_to(torch.float16)  # which the host says too
    assert len(kept(model)) > 20
    model.model_patches_to(ELSEWHERE)
    assert kept(model) == []
    after = predicted(model, text)
    assert all(torch.equal(one, other) for one, other in zip(before, after))
    assert len(kept(model)) > 20


def test_the_host_does_so_by_itself(stacked):
    model, text = stacked
    predicted(model, text)
    assert kept(model)
    comfy.model_management.unload_all_models()  # to the processor, where it is
    assert kept(model)
    model.offload_device = ELSEWHERE  # as if the model had been on a graphics card
    comfy.model_management.load_models_gpu([model])
    comfy.model_management.unload_all_models()
    assert kept(model) == []


def test_clones_share_what_is_kept(stacked):
    model, text = stacked
    predicted(model.clone().clone(), text)
    assert kept(model)
    model.clone().model_patches_to(ELSEWHERE)
    assert kept(model) == []


def test_lists_of_other_packs_stay(stacked):
    model, _ = stacked
    seen = []
    patched = model.clone()
    patched.set_model_attn2_patch(seen.append)
    again = gpu.stacked(patched, networks.text_encoder("sd15"), gpu.low_rank(model, 1), permeability=OPENED)
    for one, names in ((again, {NAME, "attn2_patch"}), (without_stack(again), {"attn2_patch"}), (model, {NAME})):
        assert one.model_options["transformer_options"]["patches"].keys() == names
