"""What a new kind of delta, a new family of models and a new method cost: one file each, here this one, and a line that
registers it.

Everything goes through the pack's real nodes. A delta says what it adds to a weight, nothing more. A family is data. A
method makes text maps of rows. (A new file format: test_adapters.py.)
"""

from dataclasses import dataclass

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas import delta as deltas
from membrane.core.adapters.deltas.delta import Delta
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.erasers.closed_form import method as registry
from membrane.core.erasers.closed_form.method import Method
from membrane.core.errors import ErasureError
from membrane.core.families import table
from membrane.core.families.family import Family, TextEntry
from membrane.core.formats import native
from membrane.core.host.text import entries
from membrane.core.host.text.encode import encode
from membrane.core.host.text.entries import encode_for
from membrane.core.host.text.kept import Kept
from membrane.core.text.encoded import PADDING
from membrane.core.text.rows import subject
from membrane.tools import host_library
from torch import nn

STAR, HEART = "a red star on snow", "a blue heart on sand"
WIDTH, INNER = 128, 48


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stacked(node, adapter, **settings):
    return node("MembraneStack", adapter=adapter, **settings)[0]


def applied(node, demo, adapter, apply_to="text", **settings):
    stack = stacked(node, adapter, **settings)
    return node("MembraneApply", model=demo[0], clip=demo[1], stack=stack, apply_to=apply_to)[0]


# ---------------------------------------------------------------- a kind of delta


class Scaling(Delta):
    """W -> W * (1 + s (factor - 1)), a factor for each output: neither of low rank nor a mask."""

    kind = "scaling"

    def __init__(self, factor, inputs):
        self.factor, self.inputs = factor, int(inputs)

    @property
    def shape(self):
        return len(self.factor), self.inputs

    def difference(self, weight, strength=1.0):
        return weight.float() * (self.factor.to(weight.device) - 1.0)[:, None] * strength

    def parts(self):
        return {"factor": self.factor, "inputs": torch.tensor(self.inputs)}

    @classmethod
    def of_parts(cls, parts):
        if parts["factor"].dim() != 1:
            raise ErasureError("a scaling has one factor for each output")
        return cls(parts["factor"], parts["inputs"])


@pytest.fixture
def scaling():
    deltas.register(Scaling)
    yield Scaling
    del deltas.KINDS[Scaling.kind]


@pytest.fixture
def scaled(scaling, transformer_layers):
    """scaled(seed, ...) -> an adapter that scales every key and value layer of the demo model."""

    def make(seed, method="Scaling"):
        g, found = torch.Generator().manual_seed(seed), {}
        for site, module in transformer_layers.items():
            if site.endswith(("to_k", "to_v")):
                out, inside = module.weight.shape
                found[site] = Scaling(1 + torch.rand(out, generator=g), inside)
        return ErasureAdapter(Card(method, (STAR,)), {"scaling": found})

    return make


def on_copy(model, adapter, strength):
    """The same on a copy of the weights, by the formula."""
    changed = model.clone()
    for site, change in adapter.deltas["scaling"].items():
        name, module = next(
            (n, m) for n, m in model.model.diffusion_model.named_modules() if n.replace(".", "_") == site
        )
        difference = module.weight.detach().float() * (change.factor - 1.0)[:, None] * strength
        changed.add_patches({f"diffusion_model.{name}.weight": ("diff", (difference,))})
    return changed


@pytest.mark.parametrize("apply_to", ["text", "weights"])
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_a_new_delta_acts_as_its_formula_says(node, demo, sample, close, scaled, apply_to, strength):
    base, expected = sample(demo[0]), sample(on_copy(demo[0], scaled(1), strength))
    found = sample(applied(node, demo, scaled(1), apply_to, strength=strength))
    close(found, expected, base, 1e-4)
    assert torch.equal(sample(demo[0]), base)


def test_a_new_delta_at_strength_zero_is_no_node(node, demo, sample, scaled):
    assert applied(node, demo, scaled(1), strength=0.0) is demo[0]


def test_a_new_delta_follows_the_prompt(node, demo, sample, close, scaled):
    """The prompt is the concept, so its gate is 1, and the negative prompt gets the same."""
    base = sample(demo[0])
    found = sample(applied(node, demo, scaled(1), permeability="facilitated transport"))
    close(found, sample(on_copy(demo[0], scaled(1), 1.0)), base, 1e-4)
    off = node("MembranePermeability", stack=stacked(node, scaled(1)), mode="facilitated transport", factor=1.0,
               threshold=1.0, negative="off", top_k=1)[0]  # fmt: skip
    closed = node("MembraneApply", model=demo[0], clip=demo[1], stack=off)[0]
    assert torch.equal(sample(closed, HEART, STAR), sample(demo[0], HEART, STAR))


def test_a_new_delta_beside_the_old_kinds(node, demo, sample, close, scaled, random_adapter):
    """Additive kinds commute: a scaling adds to the weight, and what is of low rank runs beside or inside of it."""
    base, lora = sample(demo[0]), random_adapter(3)
    first, second = (
        stacked(node, scaled(1), strength=0.5, permeability="fixed"),
        stacked(node, lora, strength=0.7, permeability="fixed"),
    )
    both = node("MembraneApply", model=node("MembraneApply", model=demo[0], clip=demo[1], stack=second)[0],
                clip=demo[1], stack=first)[0]  # fmt: skip
    other = node("MembraneApply", model=node("MembraneApply", model=demo[0], clip=demo[1], stack=first)[0],
                 clip=demo[1], stack=second)[0]  # fmt: skip
    close(sample(both), sample(other), base, 1e-4)


def test_a_new_delta_is_saved_and_loaded(node, demo, sample, scaled):
    name = node("MembraneSaveAdapter", adapter=scaled(2), filename_prefix="kinds/scaling").ui["text"][0]
    loaded = node("MembraneLoadAdapter", adapter_name=name)[0]
    assert torch.equal(sample(applied(node, demo, loaded)), sample(applied(node, demo, scaled(2))))


def test_a_new_delta_of_another_shape_is_refused(node, demo, scaling, transformer_layers):
    site = next(site for site in transformer_layers if site.endswith("attn2_to_k"))
    wrong = ErasureAdapter(Card("Scaling", ()), {"scaling": {site: Scaling(torch.ones(3), 5)}})
    with pytest.raises(ErasureError, match=r"changes .* as a layer of shape \(3, 5\), but in this"):
        applied(node, demo, wrong)


def test_an_unknown_kind_in_a_file_is_not_lost_in_silence(tmp_path, scaling, scaled):
    path = str(tmp_path / "scaling.safetensors")
    native.save(scaled(1), path)
    del deltas.KINDS[Scaling.kind]
    try:
        with pytest.raises(ErasureError, match="scaling"):
            native.load(path)
    finally:
        deltas.register(Scaling)


# ---------------------------------------------------------------- a family


class Reader(nn.Module):
    """A network that reads the text behind a norm, as Z-Image and Qwen-Image do: no attention, no U-Net."""

    def __init__(self, dtype=None, device=None, operations=nn, **config):
        super().__init__()
        self.cap_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.cap_embedder = operations.Linear(WIDTH, INNER, dtype=dtype, device=device)
        self.layers = nn.ModuleList([operations.Linear(INNER, INNER, dtype=dtype, device=device)])
        self.out = operations.Linear(INNER, 4, dtype=dtype, device=device)
        self.dtype = dtype

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **options):
        text = torch.tanh(self.cap_embedder(self.cap_norm(context)))
        text = torch.tanh(self.layers[0](text)).mean(dim=1)
        return x * 0.1 + self.out(text)[:, :, None, None]


class ToyReader(comfy.supported_models_base.BASE):
    unet_config, unet_extra_config = {}, {}
    latent_format = comfy.latent_formats.SD15
    supported_inference_dtypes = [torch.float32]

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.EPS


FAMILY = Family(
    "toy reader",
    "Toy Reader",
    ("ToyReader",),
    (TextEntry("text", "cross_attn", "c_crossattn", ("cap_embedder",), norm="cap_norm"),),
    roles=((r"^layers_\d+$", "feed_forward.up"),),
)


@pytest.fixture(scope="module")
def reader(demo):
    """(MODEL of the new family, the demo model's CLIP)."""
    config = ToyReader({})
    if hasattr(config, "set_inference_dtype"):
        config.set_inference_dtype(torch.float32, None)
    made = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, unet_model=Reader)
    with torch.no_grad():
        for seed, parameter in enumerate(made.diffusion_model.parameters()):
            parameter.copy_(numbers(seed, *parameter.shape) * parameter.shape[-1] ** -0.5)
    table.register(FAMILY)
    yield comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu")), demo[1]
    table.FAMILIES.remove(FAMILY)


def words(concept=STAR):
    """A map of the text as it is after the norm."""
    return ErasureAdapter(
        Card("UCE", (concept,)),
        {"map": {"text": TextMap(numbers(5, WIDTH, 3) * 0.3, numbers(6, 3, WIDTH) * 0.3, (0, 0, 0), normed=True)}},
    )


def edited(reader, adapter, strength):
    """W -> W (I + A B) of the one layer that reads the text, by hand."""
    model, matrix = reader[0].clone(), adapter.maps["text"].matrix().double()
    weight = reader[0].model.diffusion_model.cap_embedder.weight.detach().double()
    model.add_patches({"diffusion_model.cap_embedder.weight": ("diff", ((strength * weight @ matrix).float(),))})
    return model


@pytest.mark.parametrize("apply_to", ["text", "weights"])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_new_family_gets_the_exact_map(node, reader, sample, close, apply_to, strength):
    base, expected = sample(reader[0]), sample(edited(reader, words(), strength))
    found = sample(applied(node, reader, words(), apply_to, strength=strength))
    close(found, expected, base, 1e-5)
    assert torch.equal(sample(reader[0]), base)
    assert applied(node, reader, words(), strength=0.0) is reader[0]


def test_a_new_family_has_a_gate_for_each_row(node, reader, sample, close):
    """The prompt is the concept and opens the gate; the negative prompt's own words, or nothing, decide for its row."""
    base = sample(reader[0], STAR, HEART, steps=1)

    def tuned(negative):
        stack = node("MembranePermeability", stack=stacked(node, words()), mode="facilitated transport", factor=1.0,
                     threshold=1.0, negative=negative, top_k=1)[0]  # fmt: skip
        return node("MembraneApply", model=reader[0], clip=reader[1], stack=stack)[0]

    everywhere = sample(edited(reader, words(), 1.0), STAR, HEART, steps=1)
    close(sample(tuned("same as positive"), STAR, HEART, steps=1), everywhere, base, 1e-5)
    # cfg 3: the picture is 3 * positive - 2 * negative of the prediction, which is linear in one Euler step
    positive_only = sample(tuned("off"), STAR, HEART, steps=1)
    assert (positive_only - everywhere).norm() > 0.01 * base.norm() < (positive_only - base).norm() * 10
    close(positive_only, base + (sample(edited(reader, words(), 1.0), STAR, STAR, steps=1)
                                 - sample(reader[0], STAR, STAR, steps=1)) * 3, base, 1e-4)  # fmt: skip
    assert torch.equal(sample(tuned("off"), HEART, STAR), sample(reader[0], HEART, STAR))


def test_a_new_family_in_a_part_of_the_sampling(node, reader, sample, close):
    """Steps before the range are the unedited model's, those inside the edited one's."""
    run = {"steps": 4, "scheduler": "simple"}  # whose last step is a quarter of the sampling before the end
    base, expected = sample(reader[0], **run), sample(edited(reader, words(), 1.0), **run)
    late, most = ((0.9, 1.0), (0.0, 0.9))
    found = {part: sample(applied(node, reader, words(), start_percent=part[0], end_percent=part[1]), **run)
             for part in (late, most)}  # fmt: skip
    assert torch.equal(found[late], base)
    close(found[most], expected, base, 1e-5)


def test_a_new_familys_layers_take_adapters(node, reader, sample, close):
    change = LowRank(numbers(7, INNER, 2) * 0.5, numbers(8, 2, INNER) * 0.5, 2.0)
    adapter = ErasureAdapter(Card("SPM", (STAR,)), {"low_rank": {"layers_0": change}})
    base = sample(reader[0])
    patched, beside = (
        sample(applied(node, reader, adapter, permeability=mode)) for mode in ("fixed", "facilitated transport")
    )
    close(beside, patched, base, 1e-5)


def test_a_new_familys_adapter_is_saved_and_loaded(node, reader, sample):
    name = node("MembraneSaveAdapter", adapter=words(), filename_prefix="kinds/reader").ui["text"][0]
    loaded = node("MembraneLoadAdapter", adapter_name=name)[0]
    assert loaded.maps["text"].normed
    assert torch.equal(sample(applied(node, reader, loaded)), sample(applied(node, reader, words())))


def test_a_map_from_before_the_norm_is_refused(node, reader):
    raw = ErasureAdapter(words().card, {"map": {"text": TextMap(numbers(5, WIDTH, 1), numbers(6, 1, WIDTH), (0,))}})
    with pytest.raises(ErasureError, match="before the norm of the text entry text.*needs maps from after it"):
        applied(node, reader, raw)


def test_a_map_of_the_new_family_is_refused_by_a_u_net(node, demo):
    with pytest.raises(ErasureError, match="after the norm of the text entry text.*needs maps from before it"):
        applied(node, demo, words())


@pytest.mark.parametrize("method", ["UCE", "RECE", "SPEED", "Double Projections"])
def test_a_new_family_in_closed_form(node, reader, sample, close, method):
    """Rows are taken behind the norm, and the map equals the same edit of the weights."""
    inputs = {
        "model": reader[0],
        "clip": reader[1],
        "concepts": "star -> circle",
        "preserve": "heart",
        "method": method,
    }
    erased, adapter = node("MembraneErase", replace_with="", strength=1.0, templates="{}\na red {} on snow", **inputs)
    assert adapter.maps["text"].normed
    base, expected = sample(reader[0]), sample(edited(reader, adapter, 1.0))
    close(sample(erased), expected, base, 1e-4, seen=1e-4)


def test_uce_behind_a_norm_is_the_formula(node, reader, text):
    """Gandikota et al. 2024, eq. 7, naively in float64, on the rows as the layer gets them."""
    adapter = node("MembraneErase", model=reader[0], clip=reader[1], concepts="star -> circle", replace_with="",
                   preserve="heart", method="UCE", strength=1.0, templates="{}",
                   replacements="as published")[1]  # fmt: skip
    norm = reader[0].model.diffusion_model.cap_norm

    def rows(word):
        return norm(text(word)[0][0].float())[0].double().detach()

    c, n = rows("star")[1:], rows("circle")[1:]  # from the subject on, which is the first word
    r = torch.cat([rows(""), rows("heart")])
    system = c.T @ c + r.T @ r + 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    expected = (n - c).T @ c @ torch.linalg.inv(system)
    found = adapter.maps["text"].matrix().double()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture
def padding_reader(reader, monkeypatch):
    """The same, of a kind of model that puts zeros before the text when it prepares it, as Flux.2 does."""
    base, original = reader[0].model, type(reader[0].model).extra_conds

    def extra_conds(self, **kwargs):
        found = original(self, **kwargs)
        text = kwargs["cross_attn"]
        found["c_crossattn"] = comfy.conds.CONDRegular(torch.cat([torch.zeros_like(text[:, :3]), text], dim=1))
        return found

    monkeypatch.setattr(type(base), "extra_conds", extra_conds)
    monkeypatch.setattr(entries, "KEPT", Kept())  # what was encoded before was prepared in another way
    monkeypatch.setattr(base.diffusion_model, "cap_norm", nn.Identity())
    return reader


def test_rows_are_those_that_the_model_prepares(padding_reader):
    plain, found = (encode(padding_reader[1], ("a red star", "")), encode_for(*padding_reader, ("a red star", "")))
    for prompt in found.prompts:
        assert not found[prompt].rows[:3].any() and torch.equal(found[prompt].rows[3:], plain[prompt].rows)
        assert found[prompt].roles.tolist() == [PADDING] * 3 + plain[prompt].roles.tolist()
        assert found[prompt].ids[3:] == plain[prompt].ids
    assert subject(found["a red star"], plain["a red star"]) == 3 + subject(plain["a red star"], plain["a red star"])


# ---------------------------------------------------------------- a closed-form method


@dataclass(frozen=True)
class Strictness:
    """Share of a concept's row that is taken away."""

    share: float = 1.0


def taken_away(job, encoded, weight_gram=None, on_round=None):
    """E = -share Q Q^T, Q an orthonormal basis of the rows of the last subject tokens."""
    found = []
    for i, concept in enumerate(job.concepts):
        rows = [encoded[p].rows[subject(encoded[p], encoded[concept.text])] for k, p, _ in job.pairs() if k == i]
        q = torch.linalg.qr(torch.stack(rows).T.double())[0].float()
        found.append((-job.settings.share * q, q.T))
    on_round and on_round(1)
    a, b = (torch.cat(parts, dim=d) for parts, d in zip(zip(*found), (1, 0)))
    owners = tuple(i for i, (part, _) in enumerate(found) for _ in range(part.shape[1]))
    return TextMap(a, b, owners)


@pytest.fixture
def taking_away():
    registry.register(Method("Taking away", Strictness, taken_away))
    yield
    del registry.METHODS["Taking away"]


def test_a_new_method_on_the_node(node, demo, sample, taking_away):
    cls = host_library.node_class("MembraneErase")
    assert "Taking away" in cls.INPUT_TYPES()["required"]["method"][0]
    erased, adapter = node("MembraneErase", model=demo[0], clip=demo[1], concepts="star\nheart", replace_with="",
                           preserve="circle", method="Taking away", strength=1.0, preset="object")  # fmt: skip
    assert (adapter.card.method, adapter.card.concepts) == ("Taking away", ("star", "heart"))
    assert adapter.card.settings["share"] == 1.0 and set(adapter.maps["text"].concept) == {0, 1}
    star = node("CLIPTextEncode", clip=demo[1], text="star")[0][0][0][0, 1]
    assert (star + adapter.maps["text"].matrix([1.0, 0.0]) @ star).norm() < 1e-4 * star.norm()
    assert (sample(erased) - sample(demo[0])).norm() > 0.01 * sample(demo[0]).norm()
    name = node("MembraneSaveAdapter", adapter=adapter, filename_prefix="kinds/method").ui["text"][0]
    assert node("MembraneLoadAdapter", adapter_name=name)[0].card == adapter.card
