"""Adversarial training: an adapter erases a concept from texts that are attacked while it is trained.

A minimax game, as AdvUnlearn (Zhang et al. 2024, arXiv 2405.15234, eq. 5) plays it on the text encoder and STEREO
(Srivatsan et al. 2025) before a fine-tuning. Each step computes, in latents of pictures that the unerased model made,

    erase    captions of the concept, goal e(surrogate) - eta (e(concept) - e(surrogate))
    attack   texts of a Bank, which are searched for while the adapter is trained; the same goal, of the picture's text
    replay   texts that were in the bank before; the same goal
    keep     preserved prompts and the empty one, goal e(text)

with e the prediction without the adapter, and minimises the mean square of e_on(text) - goal: the mean over the erase
rows, plus that over attack and replay, plus lambda times that over the keep rows.
"""

from collections import deque
from dataclasses import dataclass

import torch

from ..errors import ErasureError
from .conditions import replaced, rows_of, together
from .objectives import pushed_away

ERASED, ATTACKED, REPLAYED, KEPT = 6, 18, 3, 8  # rows of a step
RATE = 0.05  # of the attacks' Adam, in root mean squares of the concept's vectors
USES = (40, 70)  # of an attack until it is replayed
REMEMBERED = 256  # attacks that are replayed at most
STARTS = {"concept": 0.40, "caption": 0.20, "kept": 0.15, "empty": 0.12, "noise": 0.13}  # of attacks, with their shares
WHOLE = 0.6  # share of attacks in which all rows of the text are free, not one alone
EARLY = 8  # one row alone is one of the first, where the words stand
CLEAR = 0.3  # share of the noise levels, the lowest, that show the picture already: no attack is made there
PICTURES = 48  # that the unerased model draws of the concept, of its surrogates, and of what is kept
TOGETHER = 12  # rows that are computed in one call


# ---------------------------------------------------------------- the attacks


class Attack:
    """One text that is searched for: towards what the unerased model predicts for the concept.

    text: rows (T, d) or Conditions to start at; free: (T, 1) of ones where its vectors may change; rate: of Adam; uses:
    how many steps it takes before it ends.
    """

    def __init__(self, text, free, rate, uses):
        self.start, self.free, self.uses = text, free, uses
        self.vectors = rows_of(text).clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.vectors], lr=rate)

    @property
    def text(self):
        """The text as it is now, with a graph to the vectors."""
        return replaced(self.start, self.vectors)

    @property
    def ended(self):
        """The text as it is now, which changes no more."""
        return replaced(self.start, self.vectors.detach().clone())

    def step(self, gradient):
        """Takes one step of Adam against a gradient (T, d)."""
        self.vectors.grad = gradient * self.free
        self.optimizer.step()
        self.vectors.grad = None
        self.uses -= 1


class Bank:
    """The attacks that go on, and what is remembered of those that ended.

    texts: [Texts] with preserved prompts; rate: of the attacks, in root mean squares of the concept's vectors.
    """

    def __init__(self, texts, size=ATTACKED, rate=RATE):
        self.texts, self.size, self.rate = texts, size, rate
        self.attacks, self.remembered = [], deque(maxlen=REMEMBERED)

    def filled(self, generator):
        """The attacks of a step: those whose uses are over have ended, and others begin in their place."""
        self.remembered.extend(attack.ended for attack in self.attacks if attack.uses <= 0)
        self.attacks = [attack for attack in self.attacks if attack.uses > 0]
        while len(self.attacks) < self.size:
            self.attacks.append(self._begun(generator))
        return self.attacks

    def replayed(self, count, generator):
        """Some ended attacks, fewer while there are not as many."""
        order = torch.randperm(len(self.remembered), generator=generator)[:count]
        return [self.remembered[i] for i in order.tolist()]

    def start(self, kind, generator):
        """A text to start at, see STARTS."""
        texts = chosen(self.texts, generator)
        if kind in ("concept", "caption"):
            fitting = [found for found in self.texts if found.alone == (kind == "concept")]
            return chosen(fitting or self.texts, generator).concept
        if kind == "kept":
            return chosen(texts.preserved, generator)
        if kind == "empty":
            return texts.empty
        rows = rows_of(texts.concept)
        return replaced(texts.concept, torch.randn(rows.shape, generator=generator).to(rows) * size_of(rows))

    def _begun(self, generator):
        kinds, shares = list(STARTS), torch.tensor(list(STARTS.values()))
        text = self.start(kinds[int(torch.multinomial(shares, 1, generator=generator))], generator)
        rows, uses = rows_of(text), int(torch.randint(USES[0], USES[1] + 1, (), generator=generator))
        free = torch.ones(len(rows), 1).to(rows)
        if torch.rand((), generator=generator) >= WHOLE:
            free.zero_()
            free[early_row(len(rows), generator)] = 1
        return Attack(text, free, self.rate * size_of(rows_of(self.texts[0].concept)), uses)


def early_row(count, generator):
    """The number of one of a text's first rows, without the very first where there are others: CLIP's start token."""
    return int(torch.randint(1, min(count, EARLY + 1), (), generator=generator)) if count > 1 else 0


def size_of(rows):
    """The root mean square of text vectors."""
    return rows.square().mean().sqrt().item()


def chosen(things, generator):
    """One of some things."""
    return things[int(torch.randint(len(things), (), generator=generator))]


# ---------------------------------------------------------------- the pictures


def pictures_of(denoiser, prompts, empty, settings, path, generator):
    """Clean latents (n, C, h, w) that the unerased model makes of n prompts, with the guidance of roll-outs."""
    found = []
    for first in range(0, len(prompts), TOGETHER):
        some = prompts[first : first + TOGETHER]
        x = path.beginning(torch.randn(len(some), *settings.channels, *settings.size, generator=generator))
        for i, level in enumerate(path.levels):
            told = torch.full((len(some),), level)
            seen = denoiser.predict(x, told, together(some), on=False)
            if settings.rollout_cfg != 1:
                off = denoiser.predict(x, told, together([empty] * len(some)), on=False)
                seen = off + settings.rollout_cfg * (seen - off)
            x = path.clean(x, seen) if i + 1 == len(path.levels) else path.after(x, seen, i)
        found.append(x)
    return torch.cat(found)


# ---------------------------------------------------------------- a step


@dataclass(frozen=True, eq=False)
class Row:
    """What is computed for one text in one noised picture.

    x: latents (1, C, h, w) at a level (1,); text: what the adapter is asked with; concept, surrogate: the texts of the
    goal, None where the text itself is kept; weight: of its mean square in what is minimised; attack: the Attack that
    the text is of.
    """

    x: torch.Tensor
    level: torch.Tensor
    text: object
    concept: object = None
    surrogate: object = None
    weight: float = 1.0
    attack: Attack | None = None


def errors_of(denoiser, rows, eta):
    """(errors (n,) with a graph, the sum over attacks of their mean squares to what the unerased model predicts for the
    concept) of Rows."""
    x, levels = torch.cat([row.x for row in rows]), torch.cat([row.level for row in rows])
    erased = [i for i, row in enumerate(rows) if row.concept is not None]
    with torch.no_grad():
        first = [row.text if row.concept is None else row.concept for row in rows]
        goal = denoiser.predict(x, levels, together(first), on=False)
        wanted = goal.clone()
        if erased:
            others = together([rows[i].surrogate for i in erased])
            goal[erased] = pushed_away(
                wanted[erased], denoiser.predict(x[erased], levels[erased], others, on=False), eta
            )
    found = denoiser.predict(x, levels, together([row.text for row in rows]), on=True)
    attacked = [i for i, row in enumerate(rows) if row.attack is not None]
    return mean_squares(found - goal), mean_squares(found[attacked] - wanted[attacked]).sum()


def mean_squares(difference):
    """Mean squares (n,) of (n, ...)."""
    return difference.square().flatten(1).mean(dim=1)


class Game:
    """The steps of a training, one after the other.

    denoiser: see Denoiser; parameters: of its adapter; texts: [Texts] with preserved prompts; settings: Settings; path:
    of the noise levels.
    """

    def __init__(self, denoiser, parameters, texts, settings, path):
        if any(found.preserved is None for found in texts):
            raise ErasureError("Adversarial training needs prompts to preserve; write some, one per line.")
        self.denoiser, self.parameters, self.texts, self.settings = denoiser, parameters, texts, settings
        self.path, self.bank = path, Bank(texts)
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            self.concept, self.surrogate, self.kept = (
                self._drawn([(found, getattr(found, name)) for found in texts], generator)
                if name != "preserved"
                else self._drawn([(texts[0], prompt) for prompt in texts[0].preserved], generator)
                for name in ("concept", "surrogate", "preserved")
            )

    def _drawn(self, prompts, generator):
        """[(Texts, the prompt, its picture (1, C, h, w))], PICTURES of them, of (Texts, prompt) in turn."""
        order = torch.randperm(len(prompts), generator=generator).tolist()
        some = [prompts[order[i % len(order)]] for i in range(PICTURES)]
        empty = self.texts[0].empty
        latents = pictures_of(
            self.denoiser, [prompt for _, prompt in some], empty, self.settings, self.path, generator
        )  # fmt: skip
        return [(found, prompt, x[None]) for (found, prompt), x in zip(some, latents)]

    def __call__(self, generator):
        """(erase loss, anchor loss) of a step, as numbers; the parameters have the gradients of what is minimised, and
        the attacks went on by a step."""
        rows, erase, anchor = self.rows(generator), 0.0, 0.0
        for first in range(0, len(rows), TOGETHER):
            some = rows[first : first + TOGETHER]
            errors, towards = errors_of(self.denoiser, some, self.settings.eta)
            attacks = [row.attack for row in some if row.attack is not None]
            searched = torch.autograd.grad(towards, [a.vectors for a in attacks], retain_graph=True) if attacks else ()
            weights = torch.tensor([row.weight for row in some]).to(errors)
            kept = torch.tensor([row.concept is None for row in some])
            (errors * weights * torch.where(kept, self.settings.lam, 1.0)).sum().backward(inputs=self.parameters)
            each = (errors * weights).detach()
            erase, anchor = erase + each[~kept].sum().item(), anchor + each[kept].sum().item()
            for attack, gradient in zip(attacks, searched):
                attack.step(gradient)
        return erase, anchor

    def rows(self, generator):
        """The Rows of a step."""
        attacks = self.bank.filled(generator)
        replayed = self.bank.replayed(REPLAYED, generator)
        attacked = [(attack.text, attack) for attack in attacks] + [(text, None) for text in replayed]
        found = []
        for _ in range(ERASED):
            texts, _, picture = chosen(chosen([self.concept, self.surrogate], generator), generator)
            found.append(self._erased(picture, texts.concept, texts, 0.0, 1 / ERASED, None, generator))
        for text, attack in attacked:
            texts, _, picture = chosen(self.concept, generator)
            found.append(self._erased(picture, text, texts, CLEAR, 1 / len(attacked), attack, generator))
        for i in range(KEPT):
            texts, prompt, picture = chosen(self.concept if i == 0 else self.kept, generator)
            text = texts.empty if i == 0 else prompt  # the other side of the guidance, whatever is in the picture
            found.append(Row(*self._noised(picture, 0.0, generator), text, weight=1 / KEPT))
        return found

    def _erased(self, picture, text, texts, low, weight, attack, generator):
        noised = self._noised(picture, low, generator)
        return Row(*noised, text, texts.concept, texts.surrogate, weight, attack)

    def _noised(self, picture, low, generator):
        """(latents, level (1,)) of a picture, at a level that is not among the lowest share `low`."""
        level = self.path.drawn(low, generator)
        noise = torch.randn(picture.shape, generator=generator)
        return self.path.noised(picture, noise, level), level
