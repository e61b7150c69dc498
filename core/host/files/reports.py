"""Report files in the host's output folder: numbered like pictures, whole or not at all, found again to go on."""

import os

import folder_paths

from ...errors import ErasureError
from ...files import write_whole
from ...measures.record import Record
from .folders import clean_prefix, not_saved

LARGEST = 1 << 28  # bytes of a record that is read to go on from


def report_path(filename, subfolder=""):
    """Where the page of an evaluation lies, by the names the host has for it; raises ErasureError when there is none.

    Only an .html that lies in the output folder, beside the .json it was written from, is one.
    """
    root = os.path.realpath(folder_paths.get_output_directory())
    path = os.path.realpath(os.path.join(root, subfolder, filename)) if "\0" not in filename + subfolder else ""
    inside = path.startswith(os.path.join(root, "")) and path.endswith(".html")
    if not (inside and os.path.isfile(path) and os.path.isfile(f"{path.removesuffix('.html')}.json")):
        raise ErasureError(f"There is no report {filename!r} in the output folder; run Evaluate Erasure again.")
    return path


class Place:
    """A pair of files <prefix>_00001_.json and .html that does not exist yet."""

    def __init__(self, prefix):
        root = folder_paths.get_output_directory()
        clean = clean_prefix(prefix, "evaluation", root, "the output folder")
        try:
            os.makedirs(os.path.join(root, os.path.dirname(clean)), exist_ok=True)
        except OSError as error:
            raise not_saved(clean, error) from error
        self.folder, self.stem, number, self.subfolder, _ = folder_paths.get_save_image_path(clean, root)
        self.name = f"{self.stem}_{number:05}_"

    def earlier(self, fits):
        """The newest Record of the same prefix for which fits(Record) is true, or None; its name becomes ours."""
        names = sorted(os.listdir(self.folder), reverse=True)
        for name in names:
            middle = name.removeprefix(f"{self.stem}_").removesuffix("_.json")
            path = os.path.join(self.folder, name)
            ours = name == f"{self.stem}_{middle}_.json" and middle.isdigit()
            if ours and os.path.isfile(path) and os.path.getsize(path) <= LARGEST:
                with open(path, encoding="utf-8", errors="replace") as file:
                    record = Record.from_json(file.read())
                if record is not None and fits(record):
                    self.name = name.removesuffix(".json")
                    return record
        return None

    def write(self, ending, text):
        """Writes <name>.<ending> and returns how the host names it."""
        try:
            write_whole(os.path.join(self.folder, f"{self.name}.{ending}"), text.encode("utf-8", "replace"))
        except OSError as error:
            raise not_saved(f"{self.name}.{ending}", error) from error
        return {"filename": f"{self.name}.{ending}", "subfolder": self.subfolder, "type": "output"}
