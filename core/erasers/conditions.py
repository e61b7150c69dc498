"""What a network is called with for a prompt, where that is more than one block of text vectors."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Conditions:
    """All that the host gives a network for one prompt.

    given: {name: tensor (1, ...), or what else the host passes}; main: name of the text's rows (1, T, d); pooled:
    {name: width} of vectors (1, >= width) whose first columns are a pooled text, such as SDXL's, behind which the sizes
    of the picture stand.
    """

    given: dict
    main: str
    pooled: dict = field(default_factory=dict)

    @property
    def mean(self):
        """The mean (d,) of the text's rows, the same however long the text is."""
        return self.given[self.main].float().flatten(0, -2).mean(dim=0)

    def noised(self, draw):
        """The same with draw(vectors) in place of all text vectors, the rows as one block and each pooled vector."""
        found = dict(self.given)
        found[self.main] = draw(self.given[self.main])
        for name, width in self.pooled.items():
            vector = self.given[name]
            found[name] = torch.cat([draw(vector[:, :width]), vector[:, width:]], dim=1)
        return Conditions(found, self.main, self.pooled)

    def fits(self, other):
        """Whether both can be computed in one batch: the same names, and tensors of the same shapes."""
        if self.given.keys() != other.given.keys():
            return False
        return all(_alike(value, other.given[name]) for name, value in self.given.items())


def _alike(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape
    return isinstance(one, int | float | str | bool | None) and type(one) is type(other) and one == other


def together(texts):
    """A batch of texts as a Denoiser gets it: vectors (T, d) as one tensor (n, T, d), Conditions as a list."""
    return torch.stack(list(texts)) if isinstance(texts[0], torch.Tensor) else list(texts)


def rows_of(text):
    """The vectors (T, d) of a text: those themselves, or the rows of Conditions."""
    return text if isinstance(text, torch.Tensor) else text.given[text.main][0]


def replaced(text, rows):
    """A text with other vectors (T, d) in place of its own."""
    if isinstance(text, torch.Tensor):
        return rows
    return Conditions({**text.given, text.main: rows[None]}, text.main, text.pooled)


def batches(texts):
    """[(rows, {name: tensor (n, ...)})] of Conditions, those side by side in one batch where they fit."""
    groups = []
    for row, text in enumerate(texts):
        if groups and texts[groups[-1][-1]].fits(text):
            groups[-1].append(row)
        else:
            groups.append([row])
    return [(rows, _joined([texts[row].given for row in rows])) for rows in groups]


def _joined(given):
    return {
        name: torch.cat([one[name] for one in given]) if isinstance(value, torch.Tensor) else value
        for name, value in given[0].items()
    }


def likeness(texts, concept):
    """Cosines (n,) of texts with a concept, each -1 to 1.

    Of vectors (T, d), of all their numbers, as in SPM, eq. 6. Of Conditions, which differ in length, of their means
    less the mean of all: rows of T5 and of language models have a direction in common that says nothing.
    """
    if isinstance(concept, torch.Tensor):
        return torch.nn.functional.cosine_similarity(torch.stack(list(texts)).flatten(1), concept.flatten()[None])
    means = torch.stack([text.mean for text in texts])
    centre = means.mean(dim=0)
    return torch.nn.functional.cosine_similarity(means - centre, (concept.mean - centre)[None])
