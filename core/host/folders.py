"""The pack's model folder, models/erasure_adapters, and names inside it."""

import hashlib
import os
from dataclasses import replace

import folder_paths

from ..errors import ErasureError
from ..formats import registry

CATEGORY = "erasure_adapters"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}


def register():
    """Adds the category, keeping folders the user configured in extra_model_paths.yaml."""
    default = os.path.join(folder_paths.models_dir, CATEGORY)
    paths = list(folder_paths.folder_names_and_paths.get(CATEGORY, ([], set()))[0])
    if default not in paths:
        paths.append(default)
    folder_paths.folder_names_and_paths[CATEGORY] = (paths, set(EXTENSIONS))


def adapter_names():
    """Names of the files in the category, for a combo."""
    for folder in folder_paths.get_folder_paths(CATEGORY):
        os.makedirs(folder, exist_ok=True)
    return folder_paths.get_filename_list(CATEGORY)


def adapter_path(name):
    """Full path of a named file; either kind of slash is understood, nothing outside the category is."""
    return _named("erasure adapter", name, CATEGORY, adapter_names())


def lora_path(name):
    """Full path of a named LoRA in the host's folders, in the same way."""
    return _named("LoRA", name, "loras", folder_paths.get_filename_list("loras"))


def _named(what, name, category, known):
    clean = name.replace("\\", "/").strip("/")
    listed = {file.replace("\\", "/"): file for file in known}
    path = folder_paths.get_full_path(category, listed[clean]) if clean in listed else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(category))
        raise ErasureError(f'The {what} "{name}" was not found in {folders}; put the file there or choose another one.')
    return path


def signature(path):
    """A hash of a file's content, for IS_CHANGED."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stamp(path):
    """Size and time of a file, for IS_CHANGED where files are too large to be read each time."""
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"


def load_adapter(name):
    """The adapter in a file of the category, known by the name it has there."""
    return replace(registry.load(adapter_path(name)), name=name.replace("\\", "/"))


def new_adapter_path(prefix, category=CATEGORY):
    """Path and name of a file that does not exist yet: <category's first folder>/<prefix>_00001_.safetensors."""
    root = folder_paths.get_folder_paths(category)[0]
    os.makedirs(root, exist_ok=True)
    clean = os.path.normpath(prefix.strip() or "erasure").replace("\\", "/")
    if os.path.isabs(clean) or clean.split("/")[0] == ".." or ":" in clean or "\0" in clean:
        raise ErasureError(
            f'The file name "{prefix}" points outside models/{category}; '
            'give a name or a subfolder and a name, such as "objects/star".'
        )
    folder, stem = os.path.split(os.path.join(root, clean))
    if os.path.commonpath((os.path.realpath(folder), os.path.realpath(root))) != os.path.realpath(root):
        raise ErasureError(
            f'The file name "{prefix}" leads outside models/{category} through a link; choose another subfolder.'
        )
    os.makedirs(folder, exist_ok=True)
    number = 1
    while os.path.exists(path := os.path.join(folder, f"{stem}_{number:05}_.safetensors")):
        number += 1
    return path, os.path.relpath(path, root).replace("\\", "/")


def input_text_files():
    """Names of the text files in the host's input folder, for a combo."""
    folder = folder_paths.get_input_directory()
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        name for name in names if name.lower().endswith(".txt") and os.path.isfile(os.path.join(folder, name))
    )


def input_text_file(name):
    """Content of a named text file in the host's input folder."""
    if name not in input_text_files():
        raise ErasureError(
            f'The text file "{name}" was not found in {folder_paths.get_input_directory()}; '
            "put it there or choose another one."
        )
    try:
        with open(os.path.join(folder_paths.get_input_directory(), name), encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ErasureError(f'The text file "{name}" is not UTF-8 text; save it again as UTF-8.') from error
