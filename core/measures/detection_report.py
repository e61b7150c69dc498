"""What detection found, as text, as data and as a plot."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .chart import BAR, GRID, INK, fitted, font_of

CALM, WORDS_SHOWN, NAMED = "#7f98b0", 6, 12


def verdict(score, calibration):
    """True for a memorised picture, None when there is nothing to judge by."""
    return None if calibration is None else score > calibration.p99


def suspicious(traces, calibration, most):
    """Indices of the prompts to look at more closely, the highest first: those above p99, or the `most` highest when
    there is no calibration."""
    order = sorted(range(len(traces)), key=lambda i: -traces[i].score)
    if calibration is None:
        return order[:most]
    return [i for i in order if traces[i].score > calibration.p99]


def rows(traces, calibration=None, endings=None, words=None):
    """A dictionary for each prompt, in their order, as the JSON output holds them.

    traces: Trace of each prompt; endings: bright ending of each, or None; words: {place of a prompt: its words with
    their influence}. Each has prompt, score, by_seed and curve; with a calibration z and memorised; and bright_ending
    and words where they were measured.
    """
    found = []
    for i, trace in enumerate(traces):
        row = {"prompt": trace.prompt, "score": trace.score, "by_seed": trace.by_seed, "curve": trace.curve}
        if calibration is not None:
            row |= {"z": calibration.z(trace.score), "memorised": verdict(trace.score, calibration)}
        if endings is not None:
            row["bright_ending"] = endings[i]
        if words and i in words:
            row["words"] = [{"word": w.text, "influence": w.influence} for w in words[i]]
        found.append(row)
    return found


def report(found, settings, calibration=None, source=""):
    """Rows as text, the highest score first. source: where the calibration comes from, or why there is none."""
    lines = []
    if found:
        lines.append(
            f"How far the text moves the prediction: first {settings['first_steps']} of {settings['steps']} steps, "
            f"{settings['seeds']} seeds, CFG {settings['cfg']:g}"
        )
    width = min(60, max((len(row["prompt"]) for row in found), default=0))
    for row in sorted(found, key=lambda row: -row["score"]):
        lines += _row_lines(row, width, calibration is not None)
    if calibration is None:
        return "\n".join([*lines, f"No verdict, only a ranking: {source}"])
    if found:
        count = sum(row["memorised"] for row in found)
        lines.append(f"{count} of {len(found)} above p99, the score that 1 % of ordinary prompts exceed.")
    lines.append(
        f"Calibration: {len(calibration.scores)} prompts, mean {calibration.mean:.3f}, standard deviation "
        f"{calibration.std:.3f}, p99 {calibration.p99:.3f} ({source})"
    )
    return "\n".join(lines)


def _row_lines(row, width, judged):
    line = f"  {_cut(row['prompt'], width):{width}}  {row['score']:6.3f}"
    if judged:
        line += f"  z {row['z']:+6.1f}  {'memorised' if row['memorised'] else '-'}"
    if "bright_ending" in row:
        line += f"  bright ending {row['bright_ending']:.3f}"
    line += f"  (seeds {min(row['by_seed']):.2f} to {max(row['by_seed']):.2f})"
    yield line.rstrip()
    if "words" in row:
        top = max((w["influence"] for w in row["words"]), default=0) or 1
        shares = (f"{w['word']} {w['influence'] / top:.0%}" for w in row["words"][:WORDS_SHOWN])
        yield f"    depends most on: {', '.join(shares)}"


def _cut(text, length):
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class _Axes:
    """Where steps and values lie in a picture. right: of the axes, names follow; high: the value at the top."""

    left: int
    right: int
    top: int
    bottom: int
    steps: int
    high: float

    def x(self, step):
        return self.left + (self.right - self.left) * (step / (self.steps - 1) if self.steps > 1 else 0.5)

    def y(self, value):
        return self.bottom - (self.bottom - self.top) * value / self.high

    def draw(self, draw, font):
        for i in range(6):
            value = self.high * i / 5
            draw.line((self.left, self.y(value), self.right, self.y(value)), GRID)
            draw.text((self.left - 8, self.y(value)), f"{value:.1f}", INK, font, anchor="rm")
        for step in range(0, self.steps, max(1, -(-self.steps // 10))):
            draw.text((self.x(step), self.bottom + 8), str(step + 1), INK, font, anchor="ma")


def plot(found, calibration=None, width=900, height=520):
    """Curves of each prompt over the steps, RGB (height, width, 3) float32 in [0, 1]; the dashed line is p99.

    Red: above p99, or the highest when there is no calibration; the first of them are named at their end.
    """
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), font_of(14)
    steps = max((len(row["curve"]) for row in found), default=1)
    high = max([v for row in found for v in row["curve"]] + [calibration.p99 if calibration else 0, 1e-9]) * 1.08
    axes = _Axes(56, width - 250, 48, height - 48, steps, high)
    draw.text((14, 12), "How far the text moves the prediction, step by step", INK, font_of(18))
    axes.draw(draw, font)
    draw.text(((axes.left + axes.right) / 2, height - 8), "step", INK, font, anchor="mb")
    order = sorted(found, key=lambda row: -row["score"])
    coloured = [(row, bool(row.get("memorised")) if calibration else row is order[0]) for row in order]
    for row, red in reversed(coloured):
        _curve(draw, axes, row["curve"], red)
    if calibration is not None:
        _threshold(draw, axes, calibration.p99, font)
    named = sorted(coloured, key=lambda one: not one[1])[:NAMED]
    _names(draw, font, axes, named, width - 8)
    return np.asarray(picture, np.float32) / 255


def _curve(draw, axes, curve, red):
    colour, points = BAR if red else CALM, [(axes.x(step), axes.y(value)) for step, value in enumerate(curve)]
    if len(points) > 1:
        draw.line(points, colour, 2 if red else 1)
    for x, y in points:
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), colour)


def _threshold(draw, axes, value, font):
    """A dashed line at p99."""
    y = axes.y(value)
    for start in range(axes.left, axes.right, 12):
        draw.line((start, y, min(start + 7, axes.right), y), INK)
    draw.text((axes.left + 4, y - 2), "p99 of ordinary prompts", INK, font, anchor="lb")


def _names(draw, font, axes, named, right):
    """Prompts beside the ends of their curves, moved apart where they would cover each other."""
    at, left = None, axes.right + 8
    for row, red in sorted(named, key=lambda one: axes.y(one[0]["curve"][-1])):
        wanted = axes.y(row["curve"][-1])
        at = wanted if at is None else max(wanted, at + 17)
        draw.text((left, at), fitted(draw, row["prompt"], font, right - left), BAR if red else INK, font, anchor="lm")
