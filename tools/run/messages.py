"""What the command line says to the person in front of it."""

import time


class Failure(Exception):
    """Ends the run with one sentence for the person in front of it."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def say(text):
    """Print one line at once."""
    print(text, flush=True)


class step:
    """Context manager that shows one line: what is done, then how long it took."""

    def __init__(self, text):
        self.text = text

    def __enter__(self):
        print(f"* {self.text} ... ", end="", flush=True)
        self.start = time.monotonic()

    def __exit__(self, kind, *_exc):
        say(f"{time.monotonic() - self.start:.0f} s" if kind is None else "stopped")
