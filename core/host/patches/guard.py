"""Puts the guard of core/erasers/guard.py on a MODEL: it looks at each picture while it is sampled."""

import logging
import math
import weakref
from collections import deque

import torch

from ...adapters.patch import Patch
from ...erasers.guard import Redrawn, features
from ...errors import ErasureError
from ..compat import guidance_of, predictions, prepared
from ..model.layers import denoiser
from .mitigation import mark
from .places import put_below
from .steps import APPLY_MODEL

log = logging.getLogger("membrane")
KEPT = 16  # calls of a network: a question takes a few, and whoever never asks a guard keeps no more
STRUCTURE = ("control", "control_apply_to_uncond", "gligen")  # of a conditioning: what draws beside the text


class Seen(Patch):
    """Stands in for the base model's `apply_model`: keeps what the middle block of a U-Net makes of a call's rows.

    calls: (x (rows, C, h, w), text (rows, T, d), features (rows, F)) of each since they were taken last.
    """

    function = APPLY_MODEL

    def __init__(self, base, layer):
        super().__init__(base)
        self.layer, self.calls = layer, deque(maxlen=KEPT)

    def __call__(self, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        found = []

        def see(module, inputs, output):
            with torch.no_grad():  # blocks add to what they gave in place afterwards
                found.append(features(output.detach()))

        hook = self.layer.register_forward_hook(see)
        try:
            return self.original(x, t, c_concat, c_crossattn, *args, **kwargs)
        finally:
            hook.remove()
            if len(found) == 1 and len(found[0]) == len(x) and c_crossattn is not None:
                self.calls.append((x.detach(), c_crossattn.detach(), found[0]))

    def taken(self, x, text):
        """Features (B, F) of pictures x (B, C, h, w) that were asked about with a text (1 or B, T, d) since they were
        taken last, or None; forgets all."""
        calls = self._all()
        for pictures, texts, found in calls:
            for own, said, rows in zip(*(part.split(len(x)) for part in (pictures, texts, found))):
                if own.shape == x.shape and said.shape[1:] == text.shape[1:]:
                    if torch.equal(own, x.to(own)) and torch.equal(said, text.to(said).expand_as(said)):
                        return rows
        return None

    def _all(self):
        calls = list(self.calls)
        self.calls.clear()
        return calls

    def first(self):
        """Features of the first call since they were taken last; forgets all. Raises ErasureError where the block did
        not see the whole batch."""
        calls = self._all()
        if not calls:
            raise ErasureError(
                "The guard sees nothing, because another node passes the middle of the network by or splits its batch; "
                "take that node out, or connect the model from before it."
            )
        return calls[0][2]


def watched(model):
    """(a clone of a MODEL with a U-Net, the Seen on it)."""
    patched = model.clone()
    seen = Seen(model.model, denoiser(model).middle_block[-1])
    put_below(patched, APPLY_MODEL, seen)
    return patched, seen


class Ranges:
    """Which level of a guard's Fitted looks at a noise level of a model's sampling.

    Called with noise levels (B,), it gives the number of the level for each, None for those too noisy and of unused
    levels.
    """

    def __init__(self, fitted, sampling):
        shares = [level.share for level in fitted.levels]
        self.middles = [math.log(max(float(sampling.percent_to_sigma(share)), 1e-9)) for share in shares]
        self.top = self.middles[0] + (self.middles[0] - self.middles[1]) / 2
        self.tells = [level.tells(fitted.threshold) for level in fitted.levels]

    def __call__(self, sigma):
        found = []
        for level in sigma.tolist():
            at = math.log(max(level, 1e-9))
            nearest = min(range(len(self.middles)), key=lambda i: abs(self.middles[i] - at))
            found.append(nearest if at <= self.top and self.tells[nearest] else None)
        return found


class Sampling:
    """What a guard knows of the sampling that is under way.

    ranges: Ranges; back: the noise level above which latents are gone back to; start: the noisy latents (B, C, h, w)
    that pictures are drawn anew from; sigmas: noise levels (B,) that the sampler asked about since then; fired (B,):
    which pictures showed the concept; looked: numbers of the levels at which the guard has asked about them; texts:
    prepared, by their names; scale: of the guidance. over(): called at its end.
    """

    def __init__(self, known, x, over, ranges, back):
        self.known, self.noise = weakref.ref(known, lambda ref: over()), x.detach().clone()
        self.ranges, self.back = ranges, back
        self.start, self.sigmas, self.looked, self.redrawn, self.texts = self.noise, [], set(), None, {}
        self.fired, self.scale = torch.zeros(len(x), dtype=torch.bool, device=x.device), 1.0

    def goes_on(self, known, x):
        """Whether a question about latents x under a mark() belongs to it."""
        return self.known() is known and self.noise.shape == x.shape

    def note(self, x, sigma):
        """Remembers a question about latents x at noise levels sigma (B,)."""
        if self.redrawn is None and self.sigmas and float(sigma.min()) >= self.back:
            self.start, self.sigmas = x.detach().clone(), []
        self.sigmas.append(sigma.detach())


class Guard:
    """A post-CFG function that looks at each picture and, once one shows the concept, follows a picture that is drawn
    anew with another text.

    fitted: Fitted; seen: the Seen of the same MODEL; empty, instead: CONDITIONINGs, the second None for the negative
    side in the concept's place; back: share of the schedule from which on pictures are drawn anew, 0 for all of it.
    """

    def __init__(self, fitted, seen, empty, instead, back):
        self.fitted, self.seen, self.empty, self.instead, self.back = fitted, seen, empty, instead, back
        self.sampling = None

    def __call__(self, args):
        x, sigma = args["input"], args["sigma"].expand(len(args["input"]))
        known = mark(args["cond"])
        if self.sampling is None or not self.sampling.goes_on(known, x):
            self.sampling = self._begun(args, known, x)  # what other patches keep lives as long as its noise
        now = self.sampling
        now.note(x, sigma)
        told = guidance_of(args)
        now.scale = now.scale if told is None else told  # as it was told before another patch changed the prediction
        if not bool(now.fired.all()):
            self._look(args, now, x, sigma)
        self.seen.calls.clear()
        if not bool(now.fired.any()):
            return args["denoised"]
        other = self._redrawn(args, now)
        self.seen.calls.clear()
        return torch.where(now.fired.view(-1, *[1] * (x.dim() - 1)), other.to(args["denoised"]), args["denoised"])

    def _begun(self, args, known, x):
        sampling = args["model"].model_sampling
        back = float(sampling.percent_to_sigma(self.back)) if self.back else math.inf
        return Sampling(known, x, self._over, Ranges(self.fitted, sampling), back)

    def _over(self):
        self.sampling = None

    # ------------------------------------------------------------ looking

    def _look(self, args, now, x, sigma):
        """Adds the pictures that show the concept now."""
        ranges = now.ranges(sigma)
        if not set(ranges) - {None}:
            return
        found = self.seen.taken(x, self._text(args, now, "empty")[0]["model_conds"]["c_crossattn"].cond)
        if found is None:
            if set(ranges) <= now.looked | {None}:
                return
            found = self._asked(args, now, x, sigma)
        now.looked |= set(ranges)
        before = int(now.fired.sum())
        for number in set(ranges) - {None}:
            scores = self.fitted.levels[number].score(found)
            own = torch.tensor([r == number for r in ranges], device=scores.device)
            now.fired |= (own & (scores > self.fitted.threshold)).to(now.fired.device)
        if int(now.fired.sum()) > before:
            log.info("Membrane: the guard draws %d of %d pictures anew.", int(now.fired.sum()), len(x))

    def _asked(self, args, now, x, sigma):
        """Features (B, F) by a question of the guard's own, with the empty text."""
        self.seen.calls.clear()
        with torch.no_grad():
            predictions(args["model"], [self._text(args, now, "empty")], x, sigma, args["model_options"])
        return self.seen.first()

    # ------------------------------------------------------------ drawing anew

    def _redrawn(self, args, now):
        """Predictions (B, C, h, w) of pictures that are drawn anew, where the sampling stands."""
        waiting = now.sigmas[-1:]
        if now.redrawn is None:
            now.redrawn, waiting = Redrawn(now.start), now.sigmas
        with torch.no_grad():
            for sigma in waiting:
                found = now.redrawn.at(sigma, lambda x, sigma: self._predicted(args, now, x, sigma))
        now.sigmas = now.sigmas[-1:]
        return found

    def _predicted(self, args, now, x, sigma):
        negative = args["uncond"] if args["uncond"] is not None and now.scale != 1 else None
        if negative is not None:
            negative = [{name: value for name, value in one.items() if name not in STRUCTURE} for one in negative]
        if self.instead is None:
            sides = [negative or self._text(args, now, "empty")]
        else:
            sides = [self._text(args, now, "instead"), *([negative] if negative else [])]
        found, *without = predictions(args["model"], sides, x, sigma, args["model_options"])
        return without[0] + (found - without[0]) * now.scale if without else found

    def _text(self, args, now, name):
        """A text as the host's samplers have it, prepared once a sampling; beside it what this network reads of a
        picture, as the prompt has it."""
        if name not in now.texts:
            beside = args["cond"][0]["model_conds"]
            beside = {key: beside[key] for key in ("c_concat",) if key in beside}
            found = prepared(args["model"], getattr(self, name), now.noise, positive=name == "instead")
            now.texts[name] = [{**one, "model_conds": {**one["model_conds"], **beside}} for one in found]
        return now.texts[name]

    def __deepcopy__(self, memo):  # clones of a model share its patches, and so what these have seen
        return self


def guard(model, fitted, empty, instead, back):
    """A clone of a MODEL with a U-Net that a Guard looks after; see there."""
    patched, seen = watched(model)
    patched.set_model_sampler_post_cfg_function(Guard(fitted, seen, empty, instead, back))
    return patched
