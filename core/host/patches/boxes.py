"""GLIGEN boxes: parts of a picture with words of their own, which GLIGEN's layers read instead of the network's.

A box holds the vector of its words' end token, as the text encoder gives it before any projection: the same kind of
vector that a map of the text takes from one place to another. So the map acts on the boxes where a step makes GLIGEN's
patch of them, with open gates, since nobody knows the words of a single vector.
"""

import inspect

import torch

from ...adapters.gates import gate_values

PATCH, MODULE = "middle_patch", "comfy.gligen"


class Boxes:
    """The boxes of samplings' conditionings; entries are (GLIGEN's MODEL, its list of boxes)."""

    def __init__(self):
        self.known = []

    def add(self, gligen):
        """Notes what a conditioning has under "gligen": (kind, MODEL, boxes)."""
        kind, model, boxes = gligen
        if kind == "position" and not any(model is m and boxes is b for m, b in self.known):
            self.known.append((model, boxes))

    def of(self, patch, shape, device):
        """The entry that the host made a patch of, for latents of a shape; None for one that nobody noted."""
        if len(self.known) == 1:
            return self.known[0]
        wanted = _objects(patch)
        for model, boxes in self.known:
            if torch.equal(_objects(model.model.set_position(shape, boxes, device)), wanted):
                return model, boxes
        return None


def _objects(patch):
    """What GLIGEN's layers read, which its patch holds."""
    return inspect.getclosurevars(patch).nonlocals["objs"]


def erased_boxes(options, known, part, gates, x):
    """Transformer options whose GLIGEN patch reads erased boxes; known: Boxes; part: TextPart; gates: (1, K) open ones
    of this step, or None; x: the latents of the call."""
    patches = options.get("patches", {}).get(PATCH, ())
    if not any(_of_gligen(patch) for patch in patches):
        return options
    made = [_erased(patch, known, part, gates, x) if _of_gligen(patch) else patch for patch in patches]
    return {**options, "patches": {**options["patches"], PATCH: made}}


def _of_gligen(patch):
    return getattr(patch, "__module__", None) == MODULE


def _erased(patch, known, part, gates, x):
    found = known.of(patch, x.shape, x.device)
    if found is None or any(box[0].shape[-1] != part.width for box in found[1]):
        return patch
    model, boxes = found
    boxes = [(part.erased(vector[:, None], gates)[:, 0], *place) for vector, *place in boxes]
    return model.model.set_position(x.shape, boxes, x.device)


def open_gates(plan):
    """Values (1, K) of a plan's gates for words that may be any; None without gates."""
    if not plan.gates:
        return None
    columns = 1 + max((column for gate in plan.gates if gate.reads_text for column in gate.concepts), default=-1)
    return gate_values(plan.gates, torch.ones(1, columns) if columns else None)
