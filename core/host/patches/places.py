"""The places of a MODEL that patches stand in: object patches, of which each place has one on top."""

import copy

from ...adapters.patch import Patch
from .kept import let_go


def _erases(patch):
    return isinstance(patch, Patch) and patch.erases


def foreign(model, name):
    """What another pack has put in a place of a MODEL, below an erasure's own patch; or None."""
    patch = model.object_patches.get(name)
    return patch.previous if _erases(patch) else patch


def put_below(patched, name, patch):
    """Puts a patch in a place of a MODEL, below an erasure, which may be exchanged later for another."""
    erasure = patched.object_patches.get(name)
    if _erases(erasure):
        patch.previous, erasure = erasure.previous, copy.copy(erasure)
        erasure.previous = patch
        patched.add_object_patch(name, erasure)
    else:
        patch.previous = erasure
        patched.add_object_patch(name, patch)


def without_stack(model):
    """A clone of a MODEL without the stack that acts on its text and layers; another pack's patches stay."""
    clone = model.clone()
    for name, patch in list(clone.object_patches.items()):
        if _erases(patch):
            if patch.previous is None:
                clone.object_patches.pop(name)
            else:
                clone.object_patches[name] = patch.previous
    let_go(clone)
    return clone
