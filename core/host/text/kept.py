"""What was encoded lately, so that changing a strength or one word of many encodes nothing a second time."""

import weakref
from collections import OrderedDict

LIMIT = 512 * 1024 * 1024  # bytes of rows


class Kept:
    """Encoded prompts by the text encoder that they came from, the ones used last within a limit of bytes."""

    def __init__(self, limit=LIMIT):
        self.limit, self.size, self.known = limit, 0, OrderedDict()

    def get(self, clip, key):
        """What was kept, or None; key: hashable."""
        whole = _key(clip, key)
        if whole not in self.known:
            return None
        self.known.move_to_end(whole)
        return self.known[whole]

    def keep(self, clip, key, encoded):
        """Keeps an Encoded or EncodedPrompt and gives it back; not for an encoder whose state cannot be told."""
        whole, size = _key(clip, key), encoded.size
        if whole is None or size > self.limit:
            return encoded
        self.size += size - (self.known.pop(whole).size if whole in self.known else 0)
        self.known[whole] = encoded
        while self.size > self.limit:
            self.size -= self.known.popitem(last=False)[1].size
        return encoded

    @staticmethod
    def key_of(model):
        """What tells a MODEL with its patches from others: for rows that its layers have a part in."""
        return weakref.ref(model.model), getattr(model, "patches_uuid", None)


def _key(clip, key):
    """The key with the encoder and everything that changes what it gives; None where that cannot be told."""
    patcher = getattr(clip, "patcher", None)
    if not hasattr(patcher, "patches_uuid") or getattr(patcher, "forced_hooks", None) is not None:
        return None
    options = getattr(clip, "layer_idx", None), repr(getattr(clip, "tokenizer_options", None))
    return weakref.ref(clip.cond_stage_model), patcher.patches_uuid, options, key


KEPT = Kept()
