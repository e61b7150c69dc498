"""What every kind of delta can be asked, and the list of all kinds."""

from dataclasses import dataclass
from typing import ClassVar

OPEN = -1  # gate of what is not gated


@dataclass(frozen=True, eq=False)
class Term:
    """A delta in a plan: its strength is `factor`, times what its gate says.

    gate: number of the plan's gate, or OPEN. gates: for a text map one for each of its columns. paired: whether the
    published SPM code's cross terms between adapters are wanted.
    """

    delta: "Delta"
    factor: float = 1.0
    gate: int = OPEN
    gates: tuple[int, ...] = ()
    paired: bool = False


class Delta:
    """One change of a model. A kind is a subclass with all its paths, in a file of its own, registered in one line.

    kind: its name, in adapters and files. of_text: whether its places are text entries instead of sites of layers.
    last: whether it acts on a weight after all others, as masks do; what is not last adds to the weight, in any order.

    A kind of layers has a `shape`, that of the weight it changes, and says what it adds to such a weight; that is
    enough to run it. One that is of low rank says so, and runs beside the layers without touching a weight.
    """

    kind: ClassVar[str]
    of_text: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def difference(self, weight, strength=1.0):
        """What it adds to a weight at a strength: float32, of the weight's shape."""
        raise AttributeError(f"{type(self).__name__} must say what it adds to a weight")

    def on(self, device):
        """What changes weights on a device, made once: anything with changed()."""
        return self

    def changed(self, weight, strength):
        """A changed copy of a weight of any type; strength: a number or a tensor of one."""
        return (weight.float() + self.difference(weight, strength)).to(weight.dtype)

    def low_rank(self):
        """The same as a LowRank, which runs beside the layer; None for a kind that is not of low rank."""
        return None

    def parts(self):
        """{name: tensor} for a file; of_parts() makes the delta of them again."""
        raise AttributeError(f"{type(self).__name__} must say what it is stored as")

    @classmethod
    def of_parts(cls, parts):
        """The delta of what parts() gave; raises ErasureError where they do not fit together."""
        raise AttributeError(f"{cls.__name__} must say how it is read")


KINDS = {}  # {kind: class}, in the order in which they act


def register(cls):
    """Adds a kind of delta; a class decorator."""
    KINDS[cls.kind] = cls
    return cls
