"""Which rows carry a concept, where the encoder spreads a word over others: T5 over all rows, a language model over all
rows behind it, and both over padding that the network attends to."""

from dataclasses import dataclass

import torch

from ..families.family import ALL
from .encoded import END, PADDING, START, TEMPLATE
from .rows import first_row

SIZE = 768.0  # mean squared length of a row of CLIP-L behind its last norm, which the published weights are made for


@dataclass(frozen=True)
class Pair:
    """Rows of a prompt with a concept, (n, d), and those that are to take their places, (n, d)."""

    targets: torch.Tensor
    replacements: torch.Tensor


def carriers(target, replacement, reach, pads):
    """Pair of two EncodedPrompts that differ in a concept.

    What both begin with carries nothing where a word reaches only the rows behind it (reach: one of REACHES). What both
    end with is aligned from the end; of what differs the last rows belong together, and where the concept has more
    rows than what replaces it, these all go to its first, or to the row that stands before its place. pads: whether
    padding counts.
    """
    old, new = [], []
    for a, b in zip(parts(target), parts(replacement)):
        for i, j in _aligned(_ids(target, a), _ids(replacement, b), reach):
            old.append(a[i])
            new.append(b[j])
    if pads:
        both = [(prompt.roles == PADDING).nonzero().flatten().tolist() for prompt in (target, replacement)]
        count = min(map(len, both))
        for found, padding in zip((old, new), both):
            found += [padding[round(k * (len(padding) - 1) / max(1, count - 1))] for k in range(count)]
    return Pair(target.rows[old], replacement.rows[new])


def parts(prompt):
    """The rows of a prompt that stand for tokens, by encoder where those of several stand one behind the other."""
    found, before = [[]], PADDING
    for i, role in enumerate(prompt.roles.tolist()):
        if role != PADDING:
            if before in (END, PADDING) and found[-1]:
                found.append([])
            found[-1].append(i)
        before = role
    return [part for part in found if part]


def _ids(prompt, part):
    return [prompt.ids[i] for i in part]


def _aligned(a, b, reach):
    """(place in a, place in b) of the rows that belong together, of token ids a and b."""
    known = any(i >= 0 for i in (*a, *b))
    head = tail = 0
    if known:
        shortest = min(len(a), len(b))
        while head < shortest and a[head] == b[head]:
            head += 1
        while tail < shortest - head and a[-1 - tail] == b[-1 - tail]:
            tail += 1
    middle = len(a) - head - tail, len(b) - head - tail
    pairs = [(i, i) for i in range(head)] if reach == ALL else []
    stand_in = head if middle[1] else max(0, min(head - 1, len(b) - 1))
    for i in range(middle[0]):
        j = middle[1] - (middle[0] - i)
        pairs.append((head + i, head + j if j >= 0 else stand_in))
    return pairs + [(len(a) - k, len(b) - k) for k in range(tail, 0, -1)]


def kept(prompt, reach, pads):
    """Rows (n, d) of a prompt that is to stay as it is: all but the fixed ones, and without padding where it does not
    count."""
    there = torch.ones(len(prompt.rows), dtype=torch.bool) if pads else prompt.roles != PADDING
    if reach != ALL:
        there[: first_row(prompt)] = False
    return prompt.rows[there]


def fixed(prompt, reach):
    """Rows (h, d) that stand before the words of every prompt and are the same in each, of any prompt.

    None where the words behind them reach them too.
    """
    head = first_row(prompt)
    rows = prompt.rows[:head]
    there = torch.tensor([role in (START, TEMPLATE) for role in prompt.roles[:head].tolist()], dtype=torch.bool)
    return rows[:0] if reach == ALL else rows[there]


def evened(rows):
    """Rows (n, d) that weigh as much as one together: a weight w of a row's square is a factor of its root."""
    return rows * max(1, len(rows)) ** -0.5


def scale(rows):
    """What rows, a sequence of (n, d), are to be multiplied by to be as long as those of CLIP on average.

    A map is linear, so that this changes no more than what an anchor weight or a threshold means: language models'
    rows are up to thousands of times longer than T5's.
    """
    count = sum(map(len, rows))
    total = sum(float(block.double().square().sum()) for block in rows)
    return (SIZE * count / total) ** 0.5 if total else 1.0
