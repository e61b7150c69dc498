"""What a step with adapters asks of a graphics card beyond a bare one, told without a card: nothing that copies or
waits from the second step on, and no more kernels for eight adapters than for one."""

import functools

import pytest
import torch
from membrane.benchmarks import gpu
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.deltas.text_rows import TextLowRank
from membrane.core.adapters.permeability import Permeability
from membrane.core.host.model.layers import text_entries
from membrane.tools import launches
from membrane.tools.tiny import networks

OPENED, ROUTED, FIXED = (Permeability(mode) for mode in ("facilitated transport", "route", "fixed"))
OWN = Permeability("facilitated transport", negative="own")


def layers(model, count):
    return gpu.low_rank(model, count)


def on_text(model, count):
    sizes = {
        site: module
        for site, module in gpu.linear_layers(model).items()
        if site.startswith("single_blocks") and site.endswith("linear1")
    }
    found = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        changes = {
            site: TextLowRank(
                torch.randn(m.out_features, 1, generator=g), torch.randn(1, m.in_features, generator=g), 1.0
            )
            for site, m in sizes.items()
        }
        found.append(ErasureAdapter(Card("Z-Erase", (f"star {i}",)), {"text_rows": changes}))
    return found


def maps(model, count):
    width = next(iter(text_entries(model).values()))
    normed = bool(next(iter(text_entries(model))).norm)
    found = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        change = TextMap(torch.randn(width, 2, generator=g), torch.randn(2, width, generator=g), (0, 0), normed=normed)
        found.append(ErasureAdapter(Card("UCE", (f"star {i}",)), {"map": {"text": change}}))
    return found


def masks(model, count):
    found = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        marked = {
            site: Mask.of(torch.rand(m.out_features, m.in_features, generator=g) < 0.1)
            for site, m in gpu.linear_layers(model).items()
        }
        found.append(ErasureAdapter(Card("pruning", (f"star {i}",)), {"mask": marked}))
    return found


CASES = {  # name: (network, adapters, settings of the stack's entries)
    "gated": ("sd15", layers, {"permeability": OPENED}),
    "own gates for the negative": ("sdxl", layers, {"permeability": OWN}),
    "routed": ("sd15", layers, {"permeability": ROUTED}),
    "gated, for a time": ("sd15", layers, {"permeability": OPENED, "end_percent": 0.5}),
    "fixed, for a time": ("sd15", layers, {"permeability": FIXED, "start_percent": 0.1, "end_percent": 0.5}),
    "map": ("sd15", maps, {"permeability": FIXED}),
    "gated map": ("sdxl", maps, {"permeability": OPENED}),
    "map for a time": ("sd15", maps, {"permeability": OPENED, "end_percent": 0.5}),
    "masks": ("sd15", masks, {"permeability": FIXED, "strength": 1.0}),
    "transformer": ("flux_dev", layers, {"permeability": OPENED}),
    "transformer, for a time": ("flux_dev", layers, {"permeability": OPENED, "end_percent": 0.5}),
    "text's rows": ("flux_dev", on_text, {"permeability": FIXED}),
    "map behind a norm": ("lumina2", maps, {"permeability": OPENED}),
    "experts": ("hidream", layers, {"permeability": OPENED}),
}


@pytest.fixture(scope="module")
def counted():
    """counted(network, adapters, count, settings) -> Launches of a step of a tiny network; settings: a tuple."""

    @functools.cache
    def run(name, adapters=None, count=0, settings=()):
        try:
            model = networks.build(name, dynamic=False)
        except networks.NotInThisHost as error:
            pytest.skip(str(error))
        clip = networks.text_encoder(name, padded=8)
        if count:
            model = gpu.stacked(model, clip, adapters(model, count), **dict(settings))
        gpu.loaded(model)
        with torch.inference_mode():
            texts = [gpu.encoded(clip, prompt) for prompt in (gpu.CONCEPT, gpu.OTHER)]
            call = launches.sides(model, texts)
        with launches.plain_attention():
            return launches.on_meta(model, networks.network(name).latent, call)

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_step_copies_nothing_and_waits_for_nothing(counted, case):
    name, adapters, settings = CASES[case]
    bare, one, eight = (counted(name, adapters if k else None, k, tuple(settings.items()) if k else ())
                        for k in (0, 1, 8))  # fmt: skip
    for found in (one, eight):
        assert found.copies == bare.copies, "something is copied to the device in every step"
        assert found.waits == bare.waits, "something waits for the device in every step"
    assert eight.kernels == one.kernels, "adapters that could share a kernel have one each"
    assert one.kernels.total() > bare.kernels.total() or case == "map" or case == "gated map"


def test_kernels_beside_a_layer(counted):
    """Two products and the gates between them; the gates themselves are made once."""
    bare, gated = counted("flux_dev"), counted("flux_dev", layers, 8, (("permeability", OPENED),))
    beyond = gated.kernels - bare.kernels
    count = len(gpu.linear_layers(networks.build("flux_dev", dynamic=False)))
    assert beyond.total() <= 3 * count, beyond
