"""The pack's model folder, models/erasure_adapters, and names inside it."""

import hashlib
import os
import re
import time
from dataclasses import replace

import folder_paths

from ...errors import ErasureError
from ...formats import registry

CATEGORY = "erasure_adapters"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}
DEEPEST = 20  # folders in each other
LONGEST = 200  # bytes of one part of a file's path; file systems take 255
TIMES = ("year", "month", "day", "hour", "minute", "second")
DATES = {"yyyy": "year", "MM": "month", "dd": "day", "hh": "hour", "mm": "minute", "ss": "second"}
LARGEST_TEXT = 1 << 24  # bytes of a text file


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
    known = (folder for folders, _ in folder_paths.folder_names_and_paths.values() for folder in folders)
    if not any(_is_inside(path, folder) for folder in (folder_paths.models_dir, *known)):
        raise ErasureError(
            f'The {what} "{name}" is a link that leads outside the model folders; put the file itself there, or name '
            "its folder in extra_model_paths.yaml."
        )
    return path


def _is_inside(path, folder):
    """Whether a path lies in a folder, links of both followed."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    try:
        return os.path.commonpath((path, folder)) == folder
    except ValueError:  # another drive
        return False


def dated(prefix):
    """A prefix with the time in place of %year%, %month%, %day%, %hour%, %minute% and %second%, as the host's own
    saving nodes replace them, and of %date:yyyy-MM-dd%, as its page does."""
    now = time.localtime()
    values = {name: f"{value:02}" for name, value in zip(TIMES, now)}

    def pattern(found):
        return re.sub("|".join(DATES), lambda part: values[DATES[part[0]]], found[1])

    prefix = re.sub("%date:([^%]*)%", pattern, prefix)
    return re.sub(f"%({'|'.join(TIMES)})%", lambda found: values[found[1]], prefix)


def clean_prefix(prefix, default, root, where):
    """A user's prefix of a file name as a path below a folder, with forward slashes; raises ErasureError otherwise.

    default: instead of an empty one; where: what the folder is called in the message.
    """
    clean = os.path.normpath((dated(prefix.strip()) or default).replace("\\", "/")).replace("\\", "/")
    parts = clean.split("/")
    if os.path.isabs(clean) or ".." in parts or ":" in clean or parts[-1] in ("", "."):
        raise ErasureError(
            f'The file name "{prefix}" points outside {where} or names no file; '
            'give a name or a subfolder and a name, such as "objects/star".'
        )
    if not clean.isprintable() or len(parts) > DEEPEST or any(len(part.encode()) > LONGEST for part in parts):
        raise ErasureError(
            f'The file name "{prefix}" has more than {DEEPEST} parts, more than {LONGEST} bytes in one, or characters '
            "that cannot be shown; give a shorter or simpler one."
        )
    if not _is_inside(os.path.join(root, os.path.dirname(clean)), root):
        raise ErasureError(f'The file name "{prefix}" leads outside {where} through a link; choose another subfolder.')
    return clean


def not_saved(name, error):
    """The ErasureError for a file that could not be written."""
    return ErasureError(
        f'The file "{name}" could not be saved ({error.strerror or error}), and what was there before is unchanged; '
        "make room or choose a folder that can be written to."
    )


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
    clean = clean_prefix(prefix, "erasure", root, f"models/{category}")
    folder, stem = os.path.split(os.path.join(root, clean))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise not_saved(clean, error) from error
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
    path = os.path.join(folder_paths.get_input_directory(), name)
    if not _is_inside(path, folder_paths.get_input_directory()):
        raise ErasureError(
            f'The text file "{name}" is a link that leads outside the input folder; put the file itself there.'
        )
    if os.path.getsize(path) > LARGEST_TEXT:
        raise ErasureError(
            f'The text file "{name}" has {os.path.getsize(path)} bytes; expected at most {LARGEST_TEXT}, shorten it.'
        )
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ErasureError(f'The text file "{name}" is not UTF-8 text; save it again as UTF-8.') from error
