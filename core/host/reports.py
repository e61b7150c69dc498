"""Report files in the host's output folder: numbered like pictures, whole or not at all, found again to go on."""

import os

import folder_paths

from ..errors import ErasureError
from ..evaluation.record import Record, write_whole


class Place:
    """A pair of files <prefix>_00001_.json and .html that does not exist yet."""

    def __init__(self, prefix):
        root = folder_paths.get_output_directory()
        clean = os.path.normpath(prefix.strip() or "evaluation").replace("\\", "/")
        if os.path.isabs(clean) or clean.split("/")[0] == ".." or ":" in clean or "\0" in clean:
            raise ErasureError(
                f'The file name "{prefix}" points outside the output folder; '
                'give a name or a subfolder and a name, such as "evaluation/star".'
            )
        self.folder, self.stem, number, self.subfolder, _ = folder_paths.get_save_image_path(clean, root)
        os.makedirs(self.folder, exist_ok=True)
        self.name = f"{self.stem}_{number:05}_"

    def earlier(self, fits):
        """The newest Record of the same prefix for which fits(Record) is true, or None; its name becomes ours."""
        names = sorted(os.listdir(self.folder), reverse=True)
        for name in names:
            middle = name.removeprefix(f"{self.stem}_").removesuffix("_.json")
            if name == f"{self.stem}_{middle}_.json" and middle.isdigit():
                with open(os.path.join(self.folder, name), encoding="utf-8", errors="replace") as file:
                    record = Record.from_json(file.read())
                if record is not None and fits(record):
                    self.name = name.removesuffix(".json")
                    return record
        return None

    def write(self, ending, text):
        """Writes <name>.<ending> and returns how the host names it."""
        write_whole(os.path.join(self.folder, f"{self.name}.{ending}"), text.encode("utf-8"))
        return {"filename": f"{self.name}.{ending}", "subfolder": self.subfolder, "type": "output"}
