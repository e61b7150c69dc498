"""What a stack keeps on the device, in the hands of the host's memory management.

A host since March 2024 moves everything in a model's lists of patches that can be moved: to its device when it loads
the model, and away when it takes the model off again.
"""

import torch

from ...adapters.patch import Patch

NAME = "membrane"  # of the list, among the host's own such as attn1_patch, which nothing of the host calls


class Kept:
    """Gives back what patches keep on a device when the host takes the model off it; the next step makes it anew.

    patches: the Patches of one stack; device: the one the model runs on.
    """

    def __init__(self, patches, device):
        self.patches, self.device = list(patches), device

    def to(self, where):
        """Called by the host with a device, and with a type, which says nothing here."""
        if isinstance(where, torch.device) and where != self.device:
            for patch in self.patches:
                patch.forget()
        return self

    def __deepcopy__(self, memo):  # clones of a model share its patches, and so what these keep
        return self


def keep(patched):
    """Lists the erasure's patches of a MODEL where the host moves them."""
    found = [patch for patch in patched.object_patches.values() if isinstance(patch, Patch) and patch.erases]
    options = patched.model_options["transformer_options"] = dict(patched.model_options["transformer_options"])
    options["patches"] = options.get("patches", {}) | {NAME: [Kept(found, patched.load_device)]}


def let_go(patched):
    """Takes the list off a MODEL again."""
    options = patched.model_options["transformer_options"]
    if NAME in options.get("patches", {}):
        left = {name: patches for name, patches in options["patches"].items() if name != NAME}
        patched.model_options["transformer_options"] = {**options, "patches": left}
