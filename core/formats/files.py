"""Writing files that appear whole or not at all."""

import os
import uuid

from safetensors.torch import save_file


def save_whole(tensors, path, metadata):
    """Writes a safetensors file beside its place and renames it; a failure leaves what was there before."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
