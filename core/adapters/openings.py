"""How far each adapter of a stack opens for each prompt, before any sampling."""

from dataclasses import dataclass

from ..errors import ErasureError
from .permeability import gate_values
from .plan import channels_of


@dataclass(frozen=True)
class Opening:
    """One prompt, one adapter or one concept of a text map, and the value of its gate, strength included."""

    prompt: str
    adapter: str
    value: float


def openings(stack, encoded, concepts):
    """Openings of a stack for encoded prompts, prompt by prompt in the order of the stack.

    concepts: Concepts of what the stack's gates compare with, None when no gate follows the text. Time ranges do not
    count. Raises ErasureError for a stack in which nothing acts.
    """
    names, channels = channels_of(stack, concepts)
    if not channels:
        raise ErasureError("No adapter of the stack acts; switch one on or give it a strength other than 0.")
    score = concepts.match(encoded.vectors, [frozenset(ids) for ids in encoded.ids]) if concepts else None
    values = gate_values(channels, score).expand(len(encoded.prompts), -1).tolist()
    return [
        Opening(prompt, name, value) for prompt, row in zip(encoded.prompts, values) for name, value in zip(names, row)
    ]


def openings_report(found):
    """The openings as text: each prompt, below it its adapters."""
    width = max(len(opening.adapter) for opening in found)
    lines, before = [], None
    for opening in found:
        if opening.prompt != before:
            lines.append(opening.prompt)
            before = opening.prompt
        lines.append(f"  {opening.adapter:{width}}  {opening.value:6.3f}")
    return "\n".join(lines)
