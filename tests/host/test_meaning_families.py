"""Permeability by meaning where a norm, or layers of the model, come before the layer that reads the text."""

from dataclasses import replace

import pytest
import torch
from membrane.core.adapters.permeability import Permeability
from membrane.core.adapters.probe import Probe
from membrane.core.adapters.stack import Entry, ErasureStack
from membrane.core.host.patches.stack import applied, apply_stack
from membrane.core.host.text.entries import encode_entries
from membrane.tools.tiny import encoders, networks
from membrane.tools.tiny.subject import HOUSE, STAR, Subject


def opening(model, conditioning):
    """The value of a model's one gate for a CONDITIONING."""
    vectors, more = conditioning[0]
    with torch.inference_mode():
        return applied(model).gates(vectors, "positive", None, more).item()


@pytest.mark.parametrize("name", ["z_image", "qwen_image", "omnigen2", "anima", "flux_dev"])
def test_a_probe_meets_the_rows_that_it_was_fitted_on(node, name):
    """A probe that is a row as the layer reads it, up to rounding: rows of the conditioning before a norm, or before
    layers that prepare them, would not have its direction."""
    try:
        subject = Subject(name, node)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    entry = next(iter(subject.entries))
    rows = encode_entries(subject.model, subject.clip, [STAR], pooled=None)[entry.name][STAR].rows
    probe = Probe(0, torch.nn.functional.normalize(rows[2].float(), dim=0), 0.99998, 0.99999)
    change = replace(subject.random_map(entry), probes=(probe,))
    stack = ErasureStack((Entry(subject.adapter({entry: change}), permeability=Permeability("meaning")),))
    model = apply_stack(subject.model, stack)
    assert opening(model, subject.text(STAR)) == 1.0
    assert opening(model, subject.text(HOUSE)) == 0.0


def test_what_random_encoders_cannot_tell_opens_by_its_words(node):
    """The host's own tokenizer of Z-Image; the toy encoder's random weights know no meaning, as the node says."""
    try:
        clip = encoders.encoder("z_image")
        width = clip.encode_from_tokens(clip.tokenize("a"), return_pooled=True)[0].shape[-1]
        model = networks.build("z_image", cap_feat_dim=width)
    except networks.NotInThisHost as error:
        pytest.skip(str(error))
    found = node("MembraneForget", model=model, clip=clip, remove="star -> circle", keep="heart\nring")
    assert not found[2].probed and "as its meaning could not be told from that of others" in found[-1]
    prompts = (
        ("a striped star on coal", "two stars", "STAR"),
        ("a dotted heart on snow", "a ring", "a photo of a dog", ""),
    )
    opened, shut = ([opening(found[0], node("CLIPTextEncode", clip=clip, text=p)[0]) for p in some] for some in prompts)
    assert opened == [1.0] * 3 and shut == [0.0] * 4
