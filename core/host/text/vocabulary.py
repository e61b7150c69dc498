"""The words of a text encoder's vocabulary."""

import torch

from ...errors import ErasureError


def vocabulary_of(clip, name):
    """{id: piece} of the encoder of that name in a tokenized text, None where its tokenizer shows none."""
    return getattr(getattr(clip.tokenizer, f"clip_{name}", clip.tokenizer), "inv_vocab", None)


def words_near(clip, concept, count):
    """The `count` whole words of a CLIP whose token embeddings are closest to those of a concept, the closest first.

    None of them is one of the concept's own words or contains one.
    """
    tokens = clip.tokenize(concept)
    name = next(iter(tokens))
    vocabulary = vocabulary_of(clip, name)
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
