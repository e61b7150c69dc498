"""Progress bars and Cancel, as the host does them."""

import comfy.model_management
import comfy.utils


class Progress:
    """A progress bar of `total` steps over several phases; raises when the user has pressed Cancel."""

    def __init__(self, total):
        self.bar, self.total, self.base = comfy.utils.ProgressBar(total), total, 0

    def at(self, done):
        """`done` steps of the current phase are finished."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update_absolute(min(self.base + done, self.total), self.total)

    def next_phase(self, finished):
        """A phase of `finished` steps is over."""
        self.base += finished
        self.at(0)
