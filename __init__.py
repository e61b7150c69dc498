"""Membrane: erases concepts from diffusion models inside ComfyUI.

@title: Membrane
@nickname: Membrane
@description: Load, stack, compute and measure concept erasure: SPM-style adapters, UCE and RECE in closed form.
"""

import sys

# pytest imports this file too, as a package of any name; only a host has its folders loaded by now
if __package__ and "folder_paths" in sys.modules:
    from .core.host.files.folders import register
    from .core.host.page import live, routes, saving
    from .core.host.text.known_tokens import watch
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    register()
    watch()
    routes.register()
    live.register()
    saving.watch()
    WEB_DIRECTORY = "./web"
    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
