"""Which rows of an encoded prompt count, for the methods and measures that take some of them."""

from .encoded import END, START, TEMPLATE, WORD


def first_row(prompt):
    """Index of the first row that is not the same for every prompt: behind padding, start token and template."""
    roles = prompt.roles.tolist()
    if WORD in roles or prompt.head:
        return roles.index(WORD) if WORD in roles else min(prompt.head, len(roles) - 1)
    return next((i for i, role in enumerate(roles) if role not in (START, TEMPLATE)), 0)


def after_start(prompt):
    """Rows (T', d) without what is the same before every prompt."""
    return prompt.rows[first_row(prompt) :]


def counted(prompt):
    """Rows (T', d) from the first word to the first end token: padding only repeats it."""
    roles = prompt.roles.tolist()
    last = roles.index(END) if END in roles else _last_word(roles)
    return prompt.rows[first_row(prompt) : last + 1]


def subject(prompt, word):
    """Index of the last row of a word in a prompt; both are EncodedPrompts.

    For an empty word, and for one that the prompt does not hold, that of the last word, which is the row before the
    first end token (the published rule of UCE and SPEED, attention-mask sum minus 2).
    """
    roles, found = prompt.roles.tolist(), []
    for ids in filter(None, (tuple(word.words), tuple(word.inside))):
        ends = range(len(ids) - 1, len(prompt.ids))
        found += [end for end in ends if roles[end] == WORD and prompt.ids[end - len(ids) + 1 : end + 1] == ids]
    return max(found, default=_last_word(roles))


def last_of(prompt, head):
    """Index of the last row of a prompt's words that another one, head, has as well: where the head ends in it."""
    words = [i for i, role in enumerate(prompt.roles.tolist()) if role == WORD]
    count = head.roles.tolist().count(WORD)
    return words[count - 1] if 0 < count <= len(words) else _last_word(prompt.roles.tolist())


def _last_word(roles):
    """Index of the last word, or of what stands before the place of the words where there is none."""
    if WORD in roles:
        return len(roles) - 1 - roles[::-1].index(WORD)
    stop = next((i for i, role in enumerate(roles) if role not in (START, TEMPLATE)), len(roles))
    return max(0, stop - 1)


def aligned(target, replacement, first_target, first_replacement):
    """Rows of two prompts from the last subject token on, as many of each (UCE's published alignment).

    target, replacement: EncodedPrompts; the two places: of their subjects. For contexts of one length T, with f the
    later of the two places, T - f rows are taken from each.
    """
    a, b = target.rows, replacement.rows
    count = min(len(a), len(b)) - max(first_target, first_replacement)
    if len(a) != len(b):
        count = min(len(a) - first_target, len(b) - first_replacement)
    return a[first_target : first_target + count], b[first_replacement : first_replacement + count]


def side_by_side(target, replacement, start=0):
    """Rows of two prompts from a place on, as many of each."""
    count = min(len(target.rows), len(replacement.rows))
    return target.rows[start:count], replacement.rows[start:count]
