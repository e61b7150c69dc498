"""The errors a user meets."""

LONGEST = 2000  # characters of a message; what a file calls its parts may be of any length


class ErasureError(ValueError):
    """Something the user can put right: one sentence with the thing, what was found, what was expected, what to do.

    Names out of files are part of it, so line breaks, control characters and half characters become question marks.
    """

    __module__ = "membrane"  # newer hosts show it; the pack's own module name is a path

    def __init__(self, text):
        text = "".join(c if c.isprintable() or c == "\u3000" else "?" for c in text)
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}")
