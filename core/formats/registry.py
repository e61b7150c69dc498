"""All formats: which one a file has, by its keys and metadata and never by its name."""

from ..errors import ErasureError
from . import containers, kohya, native, peft, refused, weights

LORAS = (kohya, peft)  # the first that recognises a file reads it


def load(path):
    """ErasureAdapter of a file of any format that holds one; raises ErasureError for everything else."""
    contents = containers.read(path)
    reader = _reader(contents)
    if reader:
        return reader.parse(contents)
    if weights.recognises(contents):
        found = weights.parse(contents)
        raise ErasureError(
            f'"{found.name}" holds whole weights of {len(found.layers())} layers (format: {found.source}), not what '
            "an erasure changed; use Extract Erasure Adapter with the base model it was made from."
        )
    raise refused.other(contents)


def load_weights(path):
    """EditedWeights of a file with whole weights; raises ErasureError for everything else."""
    contents = containers.read(path)
    if _reader(contents):
        raise ErasureError(
            f'"{contents.name}" is an erasure adapter or a LoRA already and holds no whole weights; '
            "use Load Erasure Adapter."
        )
    if weights.recognises(contents):
        return weights.parse(contents)
    raise refused.other(contents)


def _reader(contents):
    """The module that reads an adapter's format, or None; raises ErasureError for what only looks like an adapter."""
    if native.recognises(contents):
        return native
    error = refused.look_alike(contents)
    if error:
        raise error
    return next((reader for reader in LORAS if reader.recognises(contents)), None)
