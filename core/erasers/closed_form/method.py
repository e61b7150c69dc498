"""What a closed-form method is, and the list of all methods."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """One way to compute text maps from the rows of encoded prompts, in a file of its own, registered in one line.

    name: on the node and on the card. settings: dataclass of what it can be told, its defaults those of the published
    code. solve(job, encoded, weight_gram, on_round): TextMap of a Job at one text entry; encoded: Encoded of the job's
    prompts there; weight_gram: S (d, d), the sum of W^T W of the layers that read the main entry, None at others and
    for jobs that do not need it; on_round(done): called after each of rounds(settings). needs_gram(job): whether a job
    does. presets: {kind of concept: settings}, those of the published scripts. by_preserved: whether a preserved prompt
    weighs 1 / the number of them in a preset. finds_surrogate: whether it replaces a concept by itself in a preset.
    """

    name: str
    settings: type
    solve: Callable
    needs_gram: Callable = lambda job: False
    presets: dict[str, dict] = field(default_factory=dict)
    by_preserved: bool = False
    finds_surrogate: bool = False
    rounds: Callable = lambda settings: 1


METHODS = {}  # {name: Method}, in the order of the node's list


def register(method):
    """Adds a method."""
    METHODS[method.name] = method
