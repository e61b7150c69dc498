"""What stands in for a function of the host: of the base model, or the forward of a layer."""

from typing import ClassVar


class Patch:
    """Stands in for one function of an object of the host, as an object patch, which the host undoes by itself.

    function: its name. previous: what another pack had put there, which is called in its place then. erases: whether it
    belongs to an erasure, which is exchanged for another as a whole and taken away by without_stack(). lends: whether
    the network is lent something until a call is over, which a block that is computed again later would find gone.
    """

    function: ClassVar[str]
    erases: ClassVar[bool] = False
    lends: ClassVar[bool] = False

    def __init__(self, owner, previous=None):
        self.owner, self.previous = owner, previous

    @property
    def original(self):
        """What it stands in for: what was there before, or the class's own function."""
        return self.previous or getattr(type(self.owner), self.function).__get__(self.owner)

    def forget(self):
        """Gives back what it keeps on a device; it is made again when it is needed."""

    def __deepcopy__(self, memo):
        return self
