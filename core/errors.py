"""The errors a user meets."""


class ErasureError(ValueError):
    """Something the user can put right: one sentence with the thing, what was found, what was expected, what to do."""

    __module__ = "membrane"  # newer hosts show it; the pack's own module name is a path
