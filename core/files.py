"""Files that appear whole or not at all: written beside their place, then renamed."""

import contextlib
import os
import uuid

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


@contextlib.contextmanager
def beside(path):
    """The path of a file to write in place of one; without an error it takes that one's place at the end.

    After an error, Cancel among them, what was there before stays as it was and nothing is left beside it.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_whole(path, data):
    """Writes a file of bytes. Raises OSError where there is no room or no permission."""
    with beside(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def save_whole(tensors, path, metadata):
    """Writes a safetensors file of {name: tensor}, on any device and in any layout, and a map of strings.

    Raises OSError where there is no room or no permission.
    """
    with beside(path) as temporary:
        with open(temporary, "wb"):
            mode = os.stat(temporary).st_mode  # what new files get here; safetensors makes them private
        try:
            save_file({key: _own(tensor) for key, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error
        os.chmod(temporary, mode)


def _own(tensor):
    """A contiguous copy on the CPU; safetensors writes no two tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
