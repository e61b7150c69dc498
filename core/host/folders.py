"""The pack's model folder, models/erasure_adapters, and names inside it."""

import os

import folder_paths

from ..errors import ErasureError

CATEGORY = "erasure_adapters"
EXTENSIONS = {".safetensors"}


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
    clean = name.replace("\\", "/").strip("/")
    listed = {known.replace("\\", "/"): known for known in adapter_names()}
    path = folder_paths.get_full_path(CATEGORY, listed[clean]) if clean in listed else None
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(CATEGORY))
        raise ErasureError(
            f'The erasure adapter "{name}" was not found in {folders}; put the file there or choose another one.'
        )
    return path


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
