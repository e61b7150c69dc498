"""Checks of the repository: skipped tests, ComfyUI releases, translations, readers of foreign files."""
