"""Pictures for the page, in the host's temp folder, which it empties when it starts."""

import os

import folder_paths
import numpy as np
from PIL import Image

FAST = 1  # compression: these files are looked at and thrown away


def shown_pictures(pictures, name):
    """Writes pictures (B, H, W, 3) in [0, 1] as <name>_00001_.png ...; how the host names each, for the page."""
    root = folder_paths.get_temp_directory()
    height, width = pictures.shape[1:3]
    folder, stem, number, subfolder, _ = folder_paths.get_save_image_path(name, root, width, height)
    found = []
    for picture in pictures.numpy():
        file = f"{stem}_{number:05}_.png"
        image = Image.fromarray((picture * 255).clip(0, 255).round().astype(np.uint8))
        image.save(os.path.join(folder, file), compress_level=FAST)
        found.append({"filename": file, "subfolder": subfolder, "type": "temp"})
        number += 1
    return found
