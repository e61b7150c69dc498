"""What an attack on an erased model knows of the host: its weights that read the text, and its words."""

import torch

from ...adapters.permeability import gate_values
from ...errors import ErasureError
from ..patches.stack import applied
from .layers import context_width, plain_key
from .weights import cross_attention_weights


def attack_grams(original, edited, on_layer=lambda done: None):
    """(S', X), each (d, d) float64: sum_l W'_l^T W'_l and sum_l W'_l^T W_l over the layers that read the text.

    W: of the original MODEL, W': of the edited one with everything on it, gates fully open. Of adapters that are
    combined as the published SPM code does, the cross terms are left out.
    """
    width = context_width(original)
    if context_width(edited) != width:
        raise ErasureError(
            f"The original model reads text vectors of width {width}, the erased one of width "
            f"{context_width(edited)}; compare two models of the same family."
        )
    square, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    text, layers = _opened(edited, width)
    before, after = cross_attention_weights(original), cross_attention_weights(edited)
    for i, ((_, plain), (key, weight)) in enumerate(zip(before, after)):
        weight = weight.double()
        for up, down in layers.get(key, ()):
            weight = weight + up @ down
        weight = weight @ text
        square += weight.T @ weight
        cross += weight.T @ plain.double()
        on_layer(i + 1)
    return square, cross


def _opened(model, width):
    """(P (d, d), {key: [(up, down)]}) of what a stack does to text and layers while the model runs, in float64."""
    text, layers = torch.eye(width, dtype=torch.float64), {}
    found = applied(model)
    if found is None:
        return text, layers
    plan = found.plan
    score = torch.ones(1, len(plan.concepts.names)) if plan.concepts else None
    gates = torch.cat([gate_values(plan.channels, score)[0], torch.ones(1)]).double()  # the last one is for OPEN
    if plan.text is not None:
        text = text + (plan.text.a.double() * gates[plan.text.channel]) @ plan.text.b.double()
    for key, layer in plan.layers.items():
        if layer.down.dim() == 2 and isinstance(key, str):
            up = layer.up.double() * gates[list(layer.channel)]
            layers.setdefault(plain_key(key), []).append((up, layer.down.double()))
    return text, layers


def words_near(clip, concept, count):
    """The `count` whole words of a CLIP whose token embeddings are closest to those of a concept, the closest first.

    None of them is one of the concept's own words or contains one.
    """
    tokens = clip.tokenize(concept)
    name = next(iter(tokens))
    tokenizer = getattr(clip.tokenizer, f"clip_{name}", clip.tokenizer)
    vocabulary = getattr(tokenizer, "inv_vocab", None)
    table = next(
        (w for k, w in clip.cond_stage_model.state_dict().items() if k.endswith("token_embedding.weight")), None
    )
    if vocabulary is None or table is None:
        raise ErasureError(
            f"The text encoder {type(clip.cond_stage_model).__name__} shows no vocabulary to search in; "
            "switch the text-only search off."
        )
    own = concept.lower().split()
    words = {i: v.removesuffix("</w>") for i, v in vocabulary.items() if v.endswith("</w>") and i < len(table)}
    plain = {i: word.lower() for i, word in words.items() if len(word) > 2 and word.isascii() and word.isalpha()}
    usable = [i for i, word in plain.items() if not any(part in word for part in own)]
    special = {t[0] for t in clip.tokenize("")[name][0]}
    wanted = [t[0] for t in tokens[name][0] if isinstance(t[0], int) and t[0] not in special]
    if not wanted:
        raise ErasureError("No concept to look for was given; write the word that was erased.")
    table = torch.nn.functional.normalize(table.float().cpu(), dim=1)
    order = (table[usable] @ table[wanted].T).amax(dim=1).argsort(descending=True)
    return [words[usable[i]] for i in order[:count].tolist()]
