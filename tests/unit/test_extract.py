"""From whole weights to an adapter: the change to its digits, and a report that knows a wrong base model."""

import numpy as np
import pytest
import torch
from membrane.core.erasers.extract import BaseLayer, extract
from membrane.core.errors import ErasureError
from membrane.core.formats.weights import EditedWeights

D = 24
ATTENTIONS = [f"down_blocks_{i}_attentions_0_transformer_blocks_0_attn2" for i in range(3)]
KEY_VALUE = [f"{attention}_to_{part}" for attention in ATTENTIONS for part in "kv"]
LDM = {name: f"input_blocks_{3 * i + 1}_1_transformer_blocks_0_attn2_to_{name[-1]}" for i, name in enumerate(KEY_VALUE)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(seed=0):
    """{site: (weight, bias)} of a network with wide and tall layers, convolutions and norms."""
    layers = {
        "conv_in": (randn(16, 4, 3, 3, seed=seed + 50), randn(16, seed=seed + 51)),
        "down_blocks_0_attentions_0_proj_in": (randn(16, 16, 1, 1, seed=seed + 52), None),
        "down_blocks_0_attentions_0_transformer_blocks_0_norm2": (randn(16, seed=seed + 53), randn(16, seed=seed + 54)),
        "conv_out": (randn(4, 16, 3, 3, seed=seed + 55), randn(4, seed=seed + 56)),
    }
    return layers | {name: (randn(16 + 8 * i, D, seed=seed + i), None) for i, name in enumerate(KEY_VALUE)}


def base(layers, dtype=torch.float32):
    """The protocol's table, with LDM spellings leading; weights rounded to a type, read as float32."""

    def reader(tensors):
        return lambda: tuple(t if t is None else t.to(dtype).float() for t in tensors)

    table = {}
    for name, tensors in layers.items():
        layer = BaseLayer(LDM.get(name, name), reader(tensors))
        table |= {name: layer, layer.site: layer}
    return table


def closed_form(layers, rank=1, seed=90, size=0.3):
    """K and V of W (I + A B), and the A B."""
    e = size * randn(D, rank, seed=seed) @ randn(rank, D, seed=seed + 1) / D
    return {(name, "weight"): layers[name][0] @ (torch.eye(D) + e) for name in KEY_VALUE}, e


def whole(layers, changes=()):
    """All tensors of a network, some of them changed."""
    kinds = ("weight", "bias")
    tensors = {(n, kind): t for n, both in layers.items() for kind, t in zip(kinds, both) if t is not None}
    return EditedWeights(tensors | dict(changes), "unet.pt", "weights", True)


def product(change):
    return change.scale * torch.einsum("or,r...->o...", change.up.double(), change.down.double())


@pytest.mark.parametrize("rank", [1, 3])
def test_a_closed_form_edit_comes_back_with_its_rank(rank):
    layers = unet()
    tensors, e = closed_form(layers, rank)
    adapter, report = extract(
        base(layers), EditedWeights(tensors, "star.safetensors", "UCE"), ("star",), "SD15", energy=1 - 1e-6
    )
    assert adapter.card.method == "UCE" and adapter.card.concepts == ("star",) and adapter.card.family == "SD15"
    assert adapter.name == "" and adapter.maps.get("text") is None  # it is in no file yet
    assert set(adapter.low_rank) == {LDM[name] for name in KEY_VALUE}
    for name in KEY_VALUE:
        change, expected = adapter.low_rank[LDM[name]], (layers[name][0] @ e).double()
        assert change.rank == rank and change.scale == 1
        assert (product(change) - expected).norm() < 2e-3 * expected.norm()
    assert "6 layers compared, 6 changed, 0 equal" in report and f"Rank {rank} to {rank}" in report
    assert "of an edit of this very model" in report and "WARNING" not in report


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 4, 3, 3), (16, 9, 1, 1)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_factors_are_the_naive_decompositions(shape, energy):
    falling = torch.linspace(0.2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1)) ** 3
    weight, delta = randn(*shape), 0.1 * randn(*shape, seed=1) * falling
    adapter, report = extract(
        {"x": BaseLayer("x", lambda: (weight, None))},
        EditedWeights({("x", "weight"): weight + delta}, "f"),
        energy=energy,
    )
    matrix = ((weight + delta) - weight).flatten(1).double().numpy()
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    rank = int(np.argmax(share >= energy - 1e-13)) + 1
    change = adapter.low_rank["x"]
    assert change.rank == rank
    assert change.down.shape == ((rank, *shape[1:]) if shape[2:] != (1, 1) else (rank, shape[1]))
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert np.linalg.norm(product(change).flatten(1).numpy() - best) < 1.5e-3 * np.linalg.norm(matrix)
    assert f"discarded {max(0, 1 - share[rank - 1]):.3%} of the squared change" in report


def test_max_rank_is_kept_and_reported():
    layers = unet()
    tensors, _ = closed_form(layers, 6)
    adapter, report = extract(base(layers), EditedWeights(tensors, "f"), max_rank=2)
    assert {change.rank for change in adapter.low_rank.values()} == {2}
    assert "6 layers need more than max_rank 2 for the energy asked for" in report


def test_a_whole_network_with_few_changes():
    layers = unet()
    tensors, _ = closed_form(layers)
    edited = whole(layers, dict(list(tensors.items())[:2]))
    calls = []
    adapter, report = extract(base(layers), edited, on_progress=calls.append)
    assert set(adapter.low_rank) == {LDM[name] for name in KEY_VALUE[:2]}
    assert "10 layers compared, 2 changed, 8 equal" in report
    assert "8 of 10 layers equal the connected model's (80%), as of an edit" in report and "WARNING" not in report
    assert calls == list(range(1, 11))


@pytest.mark.parametrize(("base_type", "edited_type"), [("float16", "float32"), ("float32", "float16")])
def test_rounding_is_no_change_and_costs_no_rank(base_type, edited_type):
    layers = unet()
    tensors, _ = closed_form(layers, 2)
    edited = whole(layers, dict(list(tensors.items())[:2]))
    edited = EditedWeights(
        {key: t.to(getattr(torch, edited_type)) for key, t in edited.tensors.items()}, "f", whole=True
    )
    adapter, report = extract(base(layers, getattr(torch, base_type)), edited, energy=1.0)
    assert set(adapter.low_rank) == {LDM[name] for name in KEY_VALUE[:2]}
    assert all(change.rank == 2 for change in adapter.low_rank.values())
    assert "8 different by rounding only" in report


@pytest.mark.parametrize("base_type", [torch.float32, torch.float16, torch.bfloat16])
def test_training_in_bfloat16_keeps_only_what_moved(base_type):
    """ESD: the base model was rounded to bfloat16 before a few of its numbers moved."""
    layers, moved = unet(), {}
    for i, name in enumerate(KEY_VALUE):
        weight = layers[name][0].bfloat16()
        weight[:2] += (0.2 * randn(2, D, seed=70 + i)).bfloat16()
        moved[name, "weight"] = weight
    adapter, report = extract(base(layers, base_type), EditedWeights(moved, "esd", "ESD"), energy=1.0)
    assert {change.rank for change in adapter.low_rank.values()} == {2}
    assert "WARNING" not in report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pruned_network_becomes_masks(dtype):
    """ConceptPrune writes a whole U-Net, in float16, with some weights of its feed-forward layers set to 0."""
    layers, marks, pruned = unet(), {}, {}
    for i, name in enumerate(KEY_VALUE[:3]):
        marks[name] = randn(*layers[name][0].shape, seed=30 + i) > 1.6
        pruned[name, "weight"] = layers[name][0].masked_fill(marks[name], 0.0)
    pruned["conv_out", "bias"] = layers["conv_out"][1] - 0.5
    edited = whole(layers, pruned)
    edited = EditedWeights({key: t.to(dtype) for key, t in edited.tensors.items()}, "unet.pt", whole=True)
    adapter, report = extract(base(layers), edited)
    assert set(adapter.masks) == {LDM[name] for name in marks} and set(adapter.low_rank) == {"conv_out"}
    for name, expected in marks.items():
        assert torch.equal(adapter.masks[LDM[name]].marks(), expected) and adapter.masks[LDM[name]].kept is None
    assert "3 layers have " in report and "of their weights set to 0: a mask each" in report
    assert "as of an edit of this very model" in report and "WARNING" not in report


def test_a_file_of_pruned_layers_alone():
    layers = unet()
    name = KEY_VALUE[0]
    mark = randn(*layers[name][0].shape, seed=30) > 1.6
    edited = EditedWeights({(name, "weight"): layers[name][0].masked_fill(mark, 0.0)}, "pruned.pt")
    adapter, report = extract(base(layers), edited)
    assert not adapter.low_rank and torch.equal(adapter.masks[LDM[name]].marks(), mark)
    assert "Rank" not in report and "as of training from this very model" in report


def test_convolutions_biases_and_norms():
    layers = unet()
    changes = {
        ("conv_in", "weight"): layers["conv_in"][0] + 0.1 * torch.einsum("o,ihw->oihw", randn(16), randn(4, 3, 3)),
        ("conv_in", "bias"): layers["conv_in"][1] + 0.5,
        ("conv_out", "bias"): layers["conv_out"][1] - 0.5,
        ("down_blocks_0_attentions_0_transformer_blocks_0_norm2", "weight"): randn(16, seed=9),
    }
    adapter, report = extract(base(layers), whole(layers, changes))
    assert set(adapter.low_rank) == {"conv_in", "conv_out"}
    change = adapter.low_rank["conv_in"]
    assert change.down.shape == (1, 4, 3, 3) and torch.allclose(change.bias, torch.full((16,), 0.5))
    only_bias = adapter.low_rank["conv_out"]
    assert torch.allclose(only_bias.bias, torch.full((4,), -0.5)) and not product(only_bias).any()
    assert only_bias.down.shape == (1, 16, 3, 3)
    assert "cannot express them: 1 layers (down_blocks_0_attentions_0_transformer_blocks_0_norm2)" in report


def test_a_projection_may_be_linear_here_and_a_convolution_there():
    layers = unet()
    name = "down_blocks_0_attentions_0_proj_in"
    delta = 0.1 * randn(16, 1) @ randn(1, 16)
    edited = EditedWeights({(name, "weight"): layers[name][0].flatten(1) + delta}, "f")
    change = extract(base(layers), edited)[0].low_rank[name]
    assert change.down.shape == (1, 16) and torch.allclose(product(change).float(), delta, atol=1e-3)


# files as the published scripts write them


def float32_uce(layers):
    """K and V of UCE's script: every layer by an inverse in float32, of text vectors as long as CLIP's."""
    old, new, kept = (29 / D**0.5 * randn(count, D, seed=seed) for count, seed in ((3, 1), (3, 2), (5, 3)))
    inverse = torch.inverse(0.5 * torch.eye(D) + old.T @ old + kept.T @ kept)
    return {
        (n, "weight"): (0.5 * layers[n][0] + (layers[n][0] @ new.T) @ old + (layers[n][0] @ kept.T) @ kept) @ inverse
        for n in KEY_VALUE
    }


def filtered_speed(layers):
    """V of a null-space edit whose protected space differs a little from layer to layer, in float32."""
    target, anchor = (29 / D**0.5 * randn(1, D, seed=seed) for seed in (1, 2))
    changes = {}
    for i, name in enumerate(n for n in KEY_VALUE if n.endswith("v")):
        kept = torch.linalg.qr(torch.cat([randn(5, D, seed=3), 0.05 * randn(1, D, seed=60 + i)]).T)[0]
        editable = target - (target @ kept[:, : 5 + i % 2]) @ kept[:, : 5 + i % 2].T
        solved = torch.linalg.inv(target.T @ editable + torch.eye(D))
        weight = layers[name][0]
        changes[name, "weight"] = weight + weight @ (anchor - target).T @ editable @ solved
    return changes


@pytest.mark.parametrize(("edit", "method"), [(float32_uce, "UCE"), (filtered_speed, "SPEED")])
def test_published_files_are_edits_of_this_very_model(edit, method):
    layers = unet()
    _, report = extract(base(layers), EditedWeights(edit(layers), f"star.{method}", method))
    assert "one map of the text, as of an edit of this very model" in report and "WARNING" not in report
    _, report = extract(base(fine_tuned(layers)), EditedWeights(edit(layers), f"star.{method}", method))
    assert "WARNING" in report and "another base model" in report


# the wrong base model


def fine_tuned(layers, share=0.1):
    """The network after a fine-tune of everything."""
    return {
        name: tuple(t if t is None else t + share * randn(*t.shape, seed=200 + i) for t in both)
        for i, (name, both) in enumerate(layers.items())
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_partial_file_of_another_base_model(dtype):
    layers = unet()
    tensors = {key: t.to(dtype) for key, t in closed_form(fine_tuned(layers))[0].items()}
    _, report = extract(base(layers), EditedWeights(tensors, "star.safetensors", "UCE"))
    warning = next(line for line in report.split("\n") if line.startswith("WARNING"))
    assert "all of the 6 layers differ by" in warning and "made from another base model" in warning


def test_a_whole_network_of_another_base_model():
    layers = unet()
    _, report = extract(base(layers), whole(fine_tuned(layers)))
    assert "WARNING: only 0 of 10 layers equal the connected model's (0%)" in report


def test_layers_of_no_connected_model():
    edited = EditedWeights({("a", "weight"): randn(2, 2), ("b", "weight"): randn(2, 2)}, "f.pt")
    with pytest.raises(ErasureError, match=r'"f.pt" holds 2 layers \(a, b\), none of which .*its 10 layers are'):
        extract(base(unet()), edited)


def test_layers_the_model_lacks_are_counted():
    layers = unet()
    tensors = closed_form(layers)[0] | {("unheard_of", "weight"): randn(2, 2)}
    assert "does not have them: 1 layers (unheard_of)" in extract(base(layers), EditedWeights(tensors, "f"))[1]


def test_another_family_is_named():
    name = KEY_VALUE[0]
    model = {name: BaseLayer(name, lambda: (torch.zeros(320, 768), None))}
    with pytest.raises(
        ErasureError, match=r"is 640 x 2048 \(Stable Diffusion XL\) .* 320 x 768 \(Stable Diffusion 1\)"
    ):
        extract(model, EditedWeights({(name, "weight"): torch.zeros(640, 2048)}, "f"))


def test_a_bias_where_the_model_has_none():
    with pytest.raises(ErasureError, match="the bias of .* is 16 in it and missing in the model"):
        extract(base(unet()), EditedWeights({(KEY_VALUE[0], "bias"): randn(16)}, "f"))


def test_numbers_that_are_not_finite():
    tensors = {(KEY_VALUE[0], "weight"): torch.full((16, D), float("nan"))}
    with pytest.raises(ErasureError, match='"f" holds numbers that are not finite in down_blocks_0'):
        extract(base(unet()), EditedWeights(tensors, "f"))


def test_nothing_changed():
    layers = unet()
    with pytest.raises(
        ErasureError, match="no change that an adapter can hold: of the 10 layers .* 0 differ by more than"
    ):
        extract(base(layers), whole(layers))
