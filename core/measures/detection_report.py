"""What detection found, as text, as data and as a plot."""

import numpy as np
from PIL import Image, ImageDraw

from .chart import BAR, GRID, INK, _fit, _font

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
    """[{...}] of each prompt in their order, as the JSON output holds them."""
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
        line = f"  {_cut(row['prompt'], width):{width}}  {row['score']:6.3f}"
        if calibration is not None:
            line += f"  z {row['z']:+6.1f}  {'memorised' if row['memorised'] else '-'}"
        if "bright_ending" in row:
            line += f"  bright ending {row['bright_ending']:.3f}"
        line += f"  (seeds {min(row['by_seed']):.2f} to {max(row['by_seed']):.2f})"
        lines.append(line.rstrip())
        if "words" in row:
            top = max((w["influence"] for w in row["words"]), default=0) or 1
            shares = (f"{w['word']} {w['influence'] / top:.0%}" for w in row["words"][:WORDS_SHOWN])
            lines.append(f"    depends most on: {', '.join(shares)}")
    if calibration is not None:
        count = sum(row["memorised"] for row in found)
        if found:
            lines.append(f"{count} of {len(found)} above p99, the score that 1 % of ordinary prompts exceed.")
        lines.append(
            f"Calibration: {len(calibration.scores)} prompts, mean {calibration.mean:.3f}, standard deviation "
            f"{calibration.std:.3f}, p99 {calibration.p99:.3f} ({source})"
        )
    else:
        lines.append(f"No verdict, only a ranking: {source}")
    return "\n".join(lines)


def _cut(text, length):
    return text if len(text) <= length else text[: length - 3] + "..."


def plot(found, calibration=None, width=900, height=520):
    """Curves of each prompt over the steps, RGB (height, width, 3) float32 in [0, 1]; the dashed line is p99.

    Red: above p99, or the highest when there is no calibration; the first of them are named at their end.
    """
    picture = Image.new("RGB", (width, height), "white")
    draw, font, large = ImageDraw.Draw(picture), _font(14), _font(18)
    left, right, top, bottom = 56, width - 250, 48, height - 48
    draw.text((14, 12), "How far the text moves the prediction, step by step", INK, large)
    steps = max((len(row["curve"]) for row in found), default=1)
    high = max([v for row in found for v in row["curve"]] + [calibration.p99 if calibration else 0, 1e-9]) * 1.08

    def x(step):
        return left + (right - left) * (step / (steps - 1) if steps > 1 else 0.5)

    def y(value):
        return bottom - (bottom - top) * value / high

    for i in range(6):
        value = high * i / 5
        draw.line((left, y(value), right, y(value)), GRID)
        draw.text((left - 8, y(value)), f"{value:.1f}", INK, font, anchor="rm")
    for step in range(0, steps, max(1, -(-steps // 10))):
        draw.text((x(step), bottom + 8), str(step + 1), INK, font, anchor="ma")
    draw.text(((left + right) / 2, height - 8), "step", INK, font, anchor="mb")
    order = sorted(range(len(found)), key=lambda i: -found[i]["score"])
    marked = [i for i in order if found[i].get("memorised")] if calibration else order[:1]
    for i in reversed(order):
        colour = BAR if i in marked else CALM
        points = [(x(step), y(value)) for step, value in enumerate(found[i]["curve"])]
        if len(points) > 1:
            draw.line(points, colour, 2 if i in marked else 1)
        for px, py in points:
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
    if calibration is not None:
        for start in range(left, right, 12):
            draw.line((start, y(calibration.p99), min(start + 7, right), y(calibration.p99)), INK)
        draw.text((left + 4, y(calibration.p99) - 2), "p99 of ordinary prompts", INK, font, anchor="lb")
    _names(
        draw, font, found, [*marked, *(i for i in order if i not in marked)][:NAMED], marked, y, right + 8, width - 8
    )
    return np.asarray(picture, np.float32) / 255


def _names(draw, font, found, chosen, marked, y, left, right):
    """Prompts beside the ends of their curves, moved apart where they would cover each other."""
    at = None
    for i in sorted(chosen, key=lambda i: y(found[i]["curve"][-1])):
        wanted = y(found[i]["curve"][-1])
        at = wanted if at is None else max(wanted, at + 17)
        draw.text((left, at), _fit(draw, found[i]["prompt"], font, right - left), BAR if i in marked else INK, font,
                  anchor="lm")  # fmt: skip
