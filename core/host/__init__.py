"""The only part of Membrane that imports the host (comfy, folder_paths, server)."""
