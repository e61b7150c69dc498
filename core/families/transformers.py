"""What the records of transformers share: their kinds of entries, and names of encoders."""

from .family import ALL, LATER, TextEntry

# names of encoders: a map made of one's rows is none of another's
T5, UMT5, CLIP_L = "T5-XXL", "UMT5-XXL", "CLIP-L"


def text(*readers, **more):
    """The main entry, which most transformers call the context; more: what else TextEntry says."""
    return TextEntry("text", "cross_attn", "c_crossattn", readers, **more)


def words(encoder, *readers, **more):
    """The main entry of a causal language model: what a word says is in all rows behind it."""
    return text(*readers, encoder=encoder, reach=LATER, **more)


def sentence(encoder, *readers, **more):
    """The main entry of a bidirectional encoder: what a word says is in all rows."""
    return text(*readers, encoder=encoder, reach=ALL, **more)


def pooled(reader, result="y", encoder=CLIP_L, **more):
    """The vector of a whole prompt, beside the rows."""
    return TextEntry("pooled", "pooled_output", result, (reader,), pooled=True, encoder=encoder, **more)
