"""All formats: which one a file has, by its keys and metadata and never by its name."""

from ..errors import ErasureError
from . import containers, in_by_rank, kohya, lokr, minimal_masks, native, peft, refused, weights, z_erase

FORMATS = []


def register(kind):
    """Adds a Format; the first that recognises a file reads it."""
    FORMATS.append(kind)


register(native.FORMAT)
register(z_erase.FORMAT)  # whose keys are kohya's
register(lokr.FORMAT)
register(kohya.FORMAT)
register(in_by_rank.FORMAT)
register(peft.FORMAT)
register(minimal_masks.FORMAT)


def load(path):
    """ErasureAdapter of a file of any format that holds one; raises ErasureError for everything else."""
    contents = containers.read(path)
    found = format_of(contents)
    if found:
        return found.parse(contents)
    if weights.recognises(contents):
        edited = weights.parse(contents)
        raise ErasureError(
            f'"{edited.name}" holds whole weights of {len(edited.layers())} layers (format: {edited.source}), not what '
            "an erasure changed; use Extract Erasure Adapter with the base model it was made from."
        )
    raise refused.other(contents)


def load_weights(path):
    """EditedWeights of a file with whole weights; raises ErasureError for everything else."""
    contents = containers.read(path)
    if format_of(contents):
        raise ErasureError(
            f'"{contents.name}" is an erasure adapter or a LoRA already and holds no whole weights; '
            "use Load Erasure Adapter."
        )
    if weights.recognises(contents):
        return weights.parse(contents)
    raise refused.other(contents)


def format_of(contents):
    """The Format of an adapter's file, or None; raises ErasureError for what only looks like an adapter."""
    found = next((kind for kind in FORMATS if kind.recognises(contents)), None)
    error = None if found and found.declared else refused.look_alike(contents)
    if error:
        raise error
    return found
