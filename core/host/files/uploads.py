"""Adapters that the page sends: files of a plain name that is free, looked into before they are there."""

import asyncio
import os

import folder_paths

from ...errors import ErasureError
from ...files import beside
from ...formats.labels import header, label
from .folders import CATEGORY, adapter_names, clean_prefix, not_saved

LARGEST = 1 << 32  # bytes of a file
ENDING = ".safetensors"
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(10))}
SIGNS = set('<>:"|?*/\\')  # that some file system cannot have in a name


def free_path(name):
    """Where an uploaded file is to lie: directly in the first model folder, under its own name.

    Raises ErasureError for a name with a folder in it, one that some system cannot have, another ending than
    .safetensors, and a name that is taken.
    """
    root, stem = folder_paths.get_folder_paths(CATEGORY)[0], name.removesuffix(ENDING)
    clean = clean_prefix(stem, "", root, f"models/{CATEGORY}")
    plain = clean == stem and not SIGNS & set(name) and not stem.startswith(".") and not stem.endswith(".")
    if not name.endswith(ENDING) or not plain or stem.split(".")[0].strip().lower() in DEVICES:
        raise ErasureError(f'The file name "{name}" cannot be taken; expected a plain one such as "star{ENDING}".')
    path = os.path.join(root, name)
    if os.path.lexists(path) or name in adapter_names():
        raise ErasureError(f'There is a file "{name}" in models/{CATEGORY} already; rename the new one.')
    return path


async def receive(name, pieces):
    """Writes a file from an asynchronous iterator of bytes; raises ErasureError, and leaves nothing, for one that is
    too large, that is no adapter in a safetensors file, or whose name is not free."""
    path = free_path(name)
    try:
        with beside(path) as temporary:
            await _write(name, pieces, temporary)
            await asyncio.to_thread(_require_adapter, name, temporary)
            with open(path, "xb"):
                pass  # the name is ours, and no file that came meanwhile is replaced
    except FileExistsError:
        raise ErasureError(f'There is a file "{name}" in models/{CATEGORY} already; rename the new one.') from None
    except OSError as error:
        raise not_saved(name, error) from error


async def _write(name, pieces, path):
    size = 0
    with open(path, "wb") as file:
        async for piece in pieces:
            size += len(piece)
            if size > LARGEST:
                raise ErasureError(f'The file "{name}" is larger than {LARGEST} bytes; put it into the folder by hand.')
            await asyncio.to_thread(file.write, piece)


def _require_adapter(name, path):
    try:
        known = header(path) is not None and label(path)
    except ErasureError:
        known = False
    if not known:
        raise ErasureError(f'"{name}" is no erasure adapter in a safetensors file, or is damaged; nothing was saved.')
