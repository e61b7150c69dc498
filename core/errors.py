"""The errors a user meets."""


class ErasureError(ValueError):
    """Something the user can put right: one sentence with the thing, what was found, what was expected, what to do."""
