"""Progress bars and Cancel, as the host does them."""

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from server import PromptServer

from ..compat import rgb_previewer, show_text


class Progress:
    """A progress bar of `total` steps over several phases; raises when the user has pressed Cancel."""

    def __init__(self, total):
        self.bar, self.total, self.base = comfy.utils.ProgressBar(total), total, 0

    def at(self, done, picture=None):
        """`done` steps of the current phase are finished; picture: what picture() gave, to show it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(min(self.base + done, self.total), self.total, picture)

    def picture(self, model, latents):
        """Latents (1, 4, h, w) as a preview in the way the user has chosen, a rough one when previews are off; None for
        a kind of latents that has none."""
        latent_format = model.model.latent_format
        previewer = latent_preview.get_previewer(model.load_device, latent_format) or rgb_previewer(latent_format)
        if previewer is None:
            return None
        with torch.no_grad():
            return previewer.decode_latent_to_preview_image("JPEG", latents.to(model.load_device))

    def say(self, text, node):
        """Shows a line of text on a node, where the host can."""
        server = getattr(PromptServer, "instance", None)
        if node is not None:
            show_text(server, text, node)

    def next_phase(self, finished):
        """A phase of `finished` steps is over."""
        self.base += finished
        self.at(0)
