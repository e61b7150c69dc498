"""Layers as loaders of GGUF files make them: weights are blocks of bytes that each forward turns into numbers.

The stand-in behaves as ComfyUI-GGUF does: a tensor subclass whose `shape` is that of the numbers, not of the bytes; it
cannot be cloned or detached; only its layer can turn it into numbers (get_weight); the layer's state_dict names a
tensor "temp.weight" that no layer has, for estimates of memory; patches of weights are kept beside the tensor and added
to the numbers in each forward. Its blocks are those of Q8_0: 32 whole numbers of 8 bits with one float16 scale.

What Membrane does to such a model is compared with what it does to one whose weights are the same numbers as float32.
"""

from pathlib import Path

import comfy.lora
import comfy.utils
import folder_paths
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.permeability import FIXED, TRANSPORT
from membrane.core.errors import ErasureError
from membrane.core.host.model.layers import modules
from membrane.core.host.model.weights import base_layers
from safetensors.torch import load_file, save_file

STAR, CIRCLE = "a red star on snow", "a red circle on snow"
BLOCK = 32
SAME = 3e-4  # of an effect: float32, summed in another order


class Blocks(torch.Tensor):
    """Bytes (out, blocks * 34) that stand for a weight of another shape."""

    @staticmethod
    def __new__(cls, data, shape, patches=()):
        found = data.as_subclass(cls)
        found.tensor_shape, found.patches = torch.Size(shape), list(patches)
        return found

    @property
    def shape(self):
        return getattr(self, "tensor_shape", self.size())

    def to(self, *args, **options):
        options.pop("copy", None)
        args = [arg for arg in args if not isinstance(arg, torch.dtype)]
        options.pop("dtype", None)
        return Blocks(super().to(*args, **options).as_subclass(torch.Tensor), self.shape, getattr(self, "patches", ()))

    def clone(self, *args, **options):
        return self

    def detach(self):
        return self


def packed(weight):
    """The Blocks of a weight (out, in), and the numbers that they stand for."""
    rows = weight.detach().float().reshape(len(weight), -1, BLOCK)
    scale = (rows.abs().amax(dim=2, keepdim=True) / 127).half()
    whole = (rows / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8)
    data = torch.cat([scale.view(torch.uint8), whole.view(torch.uint8)], dim=2).reshape(len(weight), -1)
    return Blocks(data, weight.shape), (whole.float() * scale.float()).reshape(weight.shape)


def unpacked(blocks, dtype):
    data = blocks.as_subclass(torch.Tensor)
    data = data.reshape(len(data), -1, BLOCK + 2).contiguous()
    scale, whole = data[..., :2].contiguous().view(torch.float16), data[..., 2:].contiguous().view(torch.int8)
    return (whole.float() * scale.float()).reshape(blocks.shape).to(dtype)


class Quantised:
    """What a layer of blocks does otherwise than the host's linear layer."""

    comfy_cast_weights = True

    def get_weight(self, tensor, dtype):
        if tensor is None or not isinstance(tensor, Blocks):
            return None if tensor is None else tensor.to(dtype)
        weight = unpacked(tensor, dtype)
        for patches, key in tensor.patches:
            calculate = getattr(comfy.lora, "calculate_weight", None)
            weight = calculate(patches, weight, key)
        return weight

    def cast_bias_weight(self, input, **options):
        return self.get_weight(self.weight, input.dtype), self.get_weight(self.bias, input.dtype)

    def forward(self, input):
        return torch.nn.functional.linear(input, *self.cast_bias_weight(input))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.zeros(self.weight.size(), device="meta")
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        destination[f"{prefix}temp.weight"] = torch.empty(self.weight.shape, device="meta")


def quantise(model):
    """Turns the linear layers of a MODEL into Quantised ones, in place; returns {key: the numbers they stand for}."""
    numbers, classes = {}, {}
    for key, module in modules(model).items():
        if not isinstance(module, torch.nn.Linear) or module.in_features % BLOCK:
            continue
        own = type(module)
        module.__class__ = classes.setdefault(own, type("Quantised", (Quantised, own), {}))
        blocks, numbers[key] = packed(module.weight)
        module.weight = torch.nn.Parameter(blocks, requires_grad=False)
        assert isinstance(module.weight, Blocks) and module.weight.size() != module.weight.shape
    model.__class__ = patcher(type(model))
    return numbers


def patcher(own):
    """The patcher of such a model: it keeps patches of quantised weights beside them."""

    class Patcher(own):
        def patch_weight_to_device(self, key, *args, **options):
            weight = comfy.utils.get_attr(self.model, key)
            if not isinstance(weight, Blocks):
                return super().patch_weight_to_device(key, *args, **options)
            if key in self.patches:
                weight.patches = [(self.patches[key], key)]

        def unpatch_model(self, *args, **options):
            for weight in self.model.parameters():
                if isinstance(weight, Blocks):
                    weight.patches = []
            return super().unpatch_model(*args, **options)

        def load(self, *args, force_patch_weights=False, **options):
            return super().load(*args, force_patch_weights=True, **options)

        def clone(self, *args, **options):
            self.__class__ = own  # which the host makes another one of
            try:
                found = own.clone(self, *args, **options)
            finally:
                self.__class__ = Patcher
            found.__class__ = Patcher
            return found

    return Patcher


@pytest.fixture(scope="module")
def pair(node):
    """(MODEL of blocks, MODEL of the same numbers in float32)."""
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher.ModelPatcher, "partially_load"):
        pytest.skip("this host has no partially_load")
    quantised, plain = (node("MembraneDemoModel", variant="day")[0] for _ in range(2))
    numbers = quantise(quantised)
    assert len(numbers) > 50
    layers = modules(plain)
    with torch.inference_mode():
        for key, weight in numbers.items():
            layers[key].weight.copy_(weight)
    return quantised, plain


@pytest.fixture(scope="module")
def compare(pair, sample):
    """compare(applied): applied(model) -> MODEL does the same to both, and the blocks are as they were afterwards."""
    quantised, plain = pair
    base, exact = sample(quantised), sample(plain)
    assert (base - exact).norm() < SAME * exact.norm()

    def check(applied, bound=SAME):
        found, expected = sample(applied(quantised)), sample(applied(plain))
        effect = (expected - exact).norm()
        assert effect > 0.01 * exact.norm()
        assert (found - expected).norm() < bound * effect
        assert torch.equal(sample(quantised), base)

    return check


def layer_adapter(model):
    g, changes = torch.Generator().manual_seed(1), {}
    for key, module in modules(model).items():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in path:
            out, inside = module.out_features, module.in_features
            up, down = torch.randn(out, 2, generator=g) * 0.15, torch.randn(2, inside, generator=g) * inside**-0.5
            changes[path.replace(".", "_")] = LowRank(up, down, 2.0, None)
    return ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": changes})


def erase(node, model, clip, method="UCE", **more):
    more = {"concepts": "star -> circle", "replace_with": "", "preserve": "heart", "strength": 1.0, **more}
    return node("MembraneErase", model=model, clip=clip, method=method, **more)


@pytest.mark.parametrize("method", ["UCE", "RECE", "SPEED", "Double Projections"])
def test_erase(node, demo, pair, compare, method):
    (_, found), (_, expected) = (erase(node, model, demo[1], method) for model in pair)
    for name, change in expected.maps.items():
        other = found.maps[name]
        both = [one.a.double() @ one.b.double() for one in (other, change)]
        assert (both[0] - both[1]).norm() < 1e-4 * both[1].norm()
    compare(lambda model: erase(node, model, demo[1], method)[0])


@pytest.mark.parametrize("layers", ["keys", "values"])
def test_erase_in_keys_or_values(node, demo, compare, layers):
    compare(lambda model: erase(node, model, demo[1], layers=layers)[0])


@pytest.mark.parametrize(
    ("kind", "mode", "to"),
    [("map", FIXED, "text"), ("map", TRANSPORT, "text"), ("map", FIXED, "weights"), ("layers", FIXED, "text"),
     ("layers", TRANSPORT, "text"), ("layers", FIXED, "weights")],
)  # fmt: skip
def test_apply(node, demo, pair, compare, kind, mode, to):
    adapter = layer_adapter(pair[1]) if kind == "layers" else erase(node, pair[1], demo[1])[1]
    stack = node("MembraneStack", adapter=adapter, strength=0.8, permeability=mode)[0]
    compare(lambda model: node("MembraneApply", model=model, clip=demo[1], stack=stack, apply_to=to)[0])


def test_impact_says_the_same(node, demo, pair):
    adapter = erase(node, pair[1], demo[1])[1]
    stack = node("MembraneStack", adapter=adapter, strength=1.0)[0]
    reports = [
        node("MembraneImpact", model=model, clip=demo[1], stack=stack, prompts=f"{STAR}\n{CIRCLE}\na cat")[1]
        for model in pair
    ]
    assert reports[0] == reports[1]


def test_every_weight_is_read_as_its_numbers(pair):
    found, expected = (base_layers(model) for model in pair)
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        for one, other in zip(found[name].read(), layer.read(), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_an_edit_is_extracted(node, pair):
    """The published way: a file with the edited layers, of full width."""
    key = next(key for key in modules(pair[1]) if key.endswith("attn2.to_k.weight"))
    weight = modules(pair[1])[key].weight
    g = torch.Generator().manual_seed(3)
    delta = torch.randn(len(weight), 2, generator=g) @ torch.randn(2, weight.shape[1], generator=g)
    name = key.removeprefix("diffusion_model.")
    folder = Path(folder_paths.get_folder_paths("erasure_adapters")[0])
    folder.mkdir(exist_ok=True)
    save_file({name: weight.detach() + delta}, folder / "edited_blocks.safetensors")
    settings = {"weights_file": "edited_blocks.safetensors", "concepts": STAR, "energy": 1.0, "max_rank": 8}
    adapter, _ = node("MembraneExtract", model=pair[0], **settings)
    (change,) = adapter.low_rank.values()
    found = change.up.double() @ change.down.double() * change.alpha / change.up.shape[1]
    assert (found - delta).norm() < 1e-3 * delta.norm()


def test_it_is_saved_for_other_programs(node, demo, pair):
    """As a kohya LoRA, for which the product of map and weights is factored."""
    adapter, saved = erase(node, pair[1], demo[1])[1], []
    for model in pair:
        name = node(
            "MembraneSaveAdapter", adapter=adapter, filename_prefix="blocks", format="LoRA (kohya)", model=model
        ).ui["text"][0]  # fmt: skip
        saved.append(load_file(folder_paths.get_full_path("loras", name)))
    found, expected = saved
    assert found.keys() == expected.keys()
    for name in expected:
        if name.endswith(".lora_up.weight"):
            down = name.replace("lora_up", "lora_down")
            both = [tensors[name].double() @ tensors[down].double() for tensors in saved]
            assert (both[0] - both[1]).norm() < 1e-4 * both[1].norm()


LOCATED = {
    "prompts": f"{STAR}\n{CIRCLE}", "base_prompts": "a blue heart\na cat", "sparsity": 0.02, "first_steps": 2,
    "steps": 4, "cfg": 1.5, "width": 64, "height": 64, "seed": 3,
}  # fmt: skip


def test_the_same_weights_are_located_and_switched_off(node, demo, pair, compare):
    located = [node("MembraneLocateMemorization", model=model, clip=demo[1], **LOCATED)[0] for model in pair]
    found, expected = (adapter.masks for adapter in located)
    assert found.keys() == expected.keys() and expected
    for site, mask in expected.items():
        differs = (found[site].bits != mask.bits).float().mean()
        assert found[site].shape == mask.shape and mask.bits.any() and differs < 0.01
    stack = node("MembraneStack", adapter=located[1], strength=1.0)[0]
    compare(lambda model: node("MembraneApply", model=model, clip=demo[1], stack=stack)[0])


@pytest.mark.parametrize("layers", ["feed-forward", "text keys and values"])
def test_dampening_says_that_it_needs_gradients(node, demo, pair, layers):
    with pytest.raises(ErasureError, match="holds no weights that gradients reach .*; load the model in fp32"):
        method = f"dampening: {layers} (experimental)"
        node("MembraneLocateMemorization", model=pair[0], clip=demo[1], method=method, **LOCATED)


def test_training(node, demo, pair):
    """Training against blocks is training against the numbers that they stand for, and leaves the blocks."""
    trained = [
        node("MembraneTrain", model=model, clip=demo[1], concepts="star -> circle", steps=4, learning_rate=1e-2,
             width=64, height=64, warmup=0, rollout_steps=4, filename_prefix="blocks")[0].low_rank
        for model in pair
    ]  # fmt: skip
    found, expected = (torch.cat([change.up.flatten() for change in each.values()]) for each in trained)
    assert expected.abs().max() > 1e-3 and (found - expected).norm() < 0.02 * expected.norm()
    assert any(isinstance(weight, Blocks) for weight in pair[0].model.parameters())
