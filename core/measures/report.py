"""A record as text, as a picture and as one self-contained page."""

import html

import numpy as np
from PIL import Image, ImageDraw

from .chart import INK, _fit, _font
from .record import EMPTY, ERASE, NEIGHBOUR, TILE, UNRELATED, decoded_picture, distance_names, encoded_picture

TITLES = {
    ERASE: "to be erased",
    NEIGHBOUR: "neighbours, to be kept",
    UNRELATED: "unrelated, to be kept",
    EMPTY: "empty prompt",
}
HEAT = np.array([[0, 0, 0], [90, 20, 90], [200, 50, 50], [250, 160, 40], [255, 255, 220]], np.float32) / 255
HEAT_FULL = 0.5  # mean difference of the channels that is drawn brightest
WORST = 20  # prompts listed on the page


def drift_map(before, after):
    """Where two pictures (H, W, 3) differ: dark where they are the same, (H, W, 3) in [0, 1]."""
    amount = np.abs(after - before).mean(axis=-1) / HEAT_FULL
    at = amount.clip(0, 1) * (len(HEAT) - 1)
    low = np.floor(at).astype(int).clip(0, len(HEAT) - 2)
    return HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (at - low)[..., None]


def percent(share):
    """A share as people read it, with its counts."""
    return f"{100 * share['right'] / share['of']:.1f} % ({share['right']} of {share['of']})" if share else "-"


def number(found, digits=3):
    """An estimate with its interval."""
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})" if found else "-"


def report(record, found):
    """A record and its summary as text."""
    names = distance_names(record)
    lines = []
    for name in names:
        lines.append(f"Distance {name}: what changed between both models, same prompts and noise")
        for stratum, values in found["strata"].items():
            value = values[name]
            lines.append(
                f"  {TITLES[stratum]:24} integrity {number(value['integrity'])}  mean {number(value['mean'])}  "
                f"median {value['median']:.3f}  p95 {value['p95']:.3f}  another seed {value['ceiling']:.3f}  "
                f"{value['prompts']} prompts, {value['count']} pairs"
            )
        first = next(iter(found["strata"].values()))[name]
        lines.append(f"  numerical noise {first['floor']:.2g}")
    lines.append("Teacher-forced drift (1: as much as the prompt itself does), mean over the noise levels")
    for stratum, values in found["strata"].items():
        if values["drift"]:
            levels = values["drift"]
            mean = sum(level["value"] for level in levels) / len(levels)
            each = ", ".join(f"{level['value']:.2f} at {level['sigma']:.2g}" for level in levels)
            lines.append(f"  {TITLES[stratum]:24} {mean:.3f}: {each}")
    lines += _score_lines(found["scores"])
    if not record.finished:
        lines.append("Not finished: run it again with the same inputs, it goes on from here.")
    return "\n".join(lines)


def _score_lines(found):
    if found is None:
        return []
    lines = [f"Classifier; erased: {', '.join(found['erased_classes'])}"]
    for key, title in (
        ("erased", "still recognised"), ("synonym", "still recognised, in other words"), ("kept", "others right"),
    ):  # fmt: skip
        if found[key]:
            lines.append(f"  {title:33} {percent(found[key])}, before {percent(found[f'{key}_before'])}")
    lines.append(f"  {'harmonic mean':33} {100 * found['harmonic']:.1f}")
    return lines


# ---------------------------------------------------------------- the grid


def grid(record, tile=TILE):
    """Original above erased above where they differ, a column a kept pair, a block a stratum: (H, W, 3) in [0, 1]."""
    blocks = {}
    for pair in record.pictures:
        blocks.setdefault(pair["stratum"], []).append(pair)
    if not blocks:
        return np.ones((tile, tile, 3), np.float32)
    left, gap, head, caption = 96, 8, 34, 40
    columns = max(len(pairs) for pairs in blocks.values())
    width = left + columns * (tile + gap)
    block = head + 3 * (tile + gap) + caption
    sheet = Image.new("RGB", (max(width, 360), block * len(blocks)), "white")
    draw, font, small, bold = ImageDraw.Draw(sheet), _font(14), _font(12), _font(18)
    for i, (stratum, pairs) in enumerate(blocks.items()):
        top = i * block
        draw.text((10, top + 8), TITLES[stratum], INK, bold)
        for row, label in enumerate(("original", "erased", "difference")):
            draw.text((10, top + head + row * (tile + gap) + tile // 2 - 8), label, INK, font)
        for column, pair in enumerate(pairs):
            x = left + column * (tile + gap)
            before, after = (decoded_picture(pair[name]) for name in ("original", "erased"))
            for row, picture in enumerate((before, after, drift_map(before, after))):
                sheet.paste(_tile(picture, tile), (x, top + head + row * (tile + gap)))
            below = top + head + 3 * (tile + gap)
            first, second = _two_lines(draw, pair["prompt"] or "(empty)", small, tile)
            draw.text((x, below), first, "#444444", small)
            draw.text((x, below + 15), second, "#444444", small)
    return np.asarray(sheet, np.float32) / 255


def _two_lines(draw, text, font, width):
    """The text in two lines of at most so many pixels, cut with dots."""
    words, first = text.split(), ""
    while words and draw.textlength(f"{first} {words[0]}".strip(), font) <= width:
        first = f"{first} {words.pop(0)}".strip()
    if not first:
        return _fit(draw, text, font, width), ""
    return first, _fit(draw, " ".join(words), font, width)


# ---------------------------------------------------------------- the page

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 2em auto; max-width: 1180px;
  padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; margin: .6em 0 } th, td { padding: .25em .8em; text-align: left;
  border-bottom: 1px solid #ddd } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.pairs { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0; width: 160px }
figure img { width: 160px; image-rendering: pixelated; display: block; margin-bottom: 4px; border-radius: 3px }
figcaption { font-size: 12px; color: #555 } .note { color: #666; max-width: 70ch }
.lines { display: flex; flex-wrap: wrap; gap: 28px } svg text { font: 12px system-ui, sans-serif; fill: #444 }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: 12.5px }
"""
COLOURS = {ERASE: "#c2543d", NEIGHBOUR: "#3f7d58", UNRELATED: "#4a6fa5", EMPTY: "#888888"}


def page(record, found):
    """A record and its summary as one HTML page that needs nothing beside it."""
    names = distance_names(record)
    parts = ["<h1>Erasure, measured</h1>"]
    if not record.finished:
        parts.append('<p class="note"><b>Not finished.</b> Queue the node again with the same inputs to go on.</p>')
    parts += [_scores_table(found["scores"])]
    for name in names:
        parts.append(_distance_table(name, found["strata"]))
    parts.append('<div class="lines">')
    parts += [_drift_chart(found["strata"]), *([_spread_chart(record, names[0])] if names else [])]
    parts.append("</div>")
    parts += [_pairs(record, stratum) for stratum in found["strata"]]
    if names:
        parts.append(_worst(record, names[0]))
    parts.append(f"<h2>Settings</h2>{_settings(record.configuration)}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>Erasure, measured</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(head, rows):
    def cells(kind, values):
        return "".join(f"<{kind}{' class=n' if i else ''}>{html.escape(v)}</{kind}>" for i, v in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _scores_table(found):
    if found is None:
        return ""
    rows = [
        [title, percent(found[f"{key}_before"]), percent(found[key])]
        for key, title in (
            ("erased", "erased concept recognised"), ("synonym", "the same, asked for in other words"),
            ("kept", "other classes right"),
        ) if found[key]
    ]  # fmt: skip
    rows.append(["harmonic mean", "", f"{100 * found['harmonic']:.1f}"])
    names = html.escape(", ".join(found["erased_classes"]))
    return f"<h2>What a classifier sees</h2><p>Erased: {names}</p>{_table(['', 'original', 'erased'], rows)}"


def _distance_table(name, strata):
    rows = [
        [TITLES[stratum], number(v[name]["integrity"]), number(v[name]["mean"]), f"{v[name]['median']:.3f}",
         f"{v[name]['p95']:.3f}", f"{v[name]['floor']:.2g}", f"{v[name]['ceiling']:.3f}",
         f"{v[name]['prompts']} / {v[name]['count']}"]
        for stratum, v in strata.items()
    ]  # fmt: skip
    head = ["prompts", "integrity", "mean distance", "median", "p95", "floor", "another seed", "prompts / pairs"]
    note = (
        "Integrity: 1 is untouched, 0 is as different as another seed. In brackets: 95 % bootstrap interval over the "
        "prompts. Low is wanted in the first row, 1 in the others."
    )
    return f'<h2>Distance: {html.escape(name)}</h2>{_table(head, rows)}<p class="note">{note}</p>'


def _axes(width, height, title, x_title, y_title, ticks_x, ticks_y):
    left, top, right, bottom = 56, 30, 26, 46
    inner = width - left - right, height - top - bottom

    def place(x, y):
        return left + x * inner[0], top + (1 - y) * inner[1]

    parts = [f'<text x="{left}" y="16" style="font-weight:600">{html.escape(title)}</text>']
    for x, label in ticks_x:
        px, py = place(x, 0)
        parts.append(f'<line x1="{px}" y1="{py}" x2="{px}" y2="{py + 4}" stroke="#999"/>')
        parts.append(f'<text x="{px}" y="{py + 17}" text-anchor="middle">{label}</text>')
    for y, label in ticks_y:
        px, py = place(0, y)
        parts.append(f'<line x1="{px}" y1="{py}" x2="{px + inner[0]}" y2="{py}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{px - 6}" y="{py + 4}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{left + inner[0] / 2}" y="{height - 8}" text-anchor="middle">{html.escape(x_title)}</text>')
    parts.append(f'<text x="12" y="{top - 16}" style="fill:#888">{html.escape(y_title)}</text>')
    return parts, place


def _legend(strata, width):
    return "".join(
        f'<circle cx="{width - 190}" cy="{44 + 17 * i}" r="5" fill="{COLOURS[s]}"/>'
        f'<text x="{width - 180}" y="{48 + 17 * i}">{TITLES[s]}</text>'
        for i, s in enumerate(strata)
    )


def _ticks(largest):
    step = 10 ** np.floor(np.log10(max(largest, 1e-9)))
    step *= next(f for f in (0.2, 0.5, 1, 2, 5) if largest / (f * step) <= 5)
    return [(v / largest, f"{v:g}") for v in np.arange(0, largest + step / 2, step).round(10) if v <= largest]


def _drift_chart(strata):
    curves = {s: v["drift"] for s, v in strata.items() if v["drift"]}
    if not curves:
        return ""
    width, height = 560, 320
    sigmas = [np.log(max(level["sigma"], 1e-3)) for c in curves.values() for level in c]
    low, high = min(sigmas), max(sigmas) + 1e-9
    largest = max(level["high"] for c in curves.values() for level in c) or 1.0
    first = next(iter(curves.values()))
    ticks = [((high - np.log(max(p["sigma"], 1e-3))) / (high - low), f"{p['sigma']:.2g}") for p in first]
    parts, place = _axes(
        width, height, "Teacher-forced drift", "noise level (sigma), sampling goes to the right",
        "", ticks, _ticks(largest),
    )  # fmt: skip
    for stratum, levels in curves.items():
        at = [(high - np.log(max(p["sigma"], 1e-3))) / (high - low) for p in levels]
        band = [place(x, p["high"] / largest) for x, p in zip(at, levels)]
        band += [place(x, p["low"] / largest) for x, p in zip(reversed(at), reversed(levels))]
        line = [place(x, p["value"] / largest) for x, p in zip(at, levels)]
        parts.append(f'<polygon points="{_points(band)}" fill="{COLOURS[stratum]}" opacity=".15"/>')
        parts.append(f'<polyline points="{_points(line)}" fill="none" stroke="{COLOURS[stratum]}" stroke-width="2"/>')
    return _svg(width, height, parts, _legend(curves, width))


def _spread_chart(record, name):
    """Every prompt's mean distance, sorted, over the distance of another seed."""
    width, height = 560, 320
    groups = {}
    for row in record.rows:
        groups.setdefault(row["stratum"], {}).setdefault(row["index"], []).append(row["distance"][name])
    ceiling = float(np.mean([row["ceiling"][name] for row in record.rows]))
    curves = {s: sorted(np.mean(v) for v in prompts.values()) for s, prompts in groups.items()}
    largest = max(ceiling, *(c[-1] for c in curves.values())) * 1.05 or 1.0
    parts, place = _axes(
        width, height, f"Distance of every prompt ({name})", "prompts, the least changed first", "",
        [(0, ""), (1, "")], _ticks(largest),
    )  # fmt: skip
    (x1, y), (x2, _) = place(0, ceiling / largest), place(1, ceiling / largest)
    parts.append(f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" stroke="#222" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x2}" y="{y - 5}" text-anchor="end">another seed</text>')
    for stratum, values in curves.items():
        for i, value in enumerate(values):
            px, py = place((i + 0.5) / len(values), value / largest)
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{COLOURS[stratum]}" opacity=".8"/>')
    return _svg(width, height, parts, "")


def _points(places):
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _svg(width, height, parts, legend):
    return f'<svg width="{width}" height="{height}" role="img">{"".join(parts)}{legend}</svg>'


def _pairs(record, stratum):
    pairs = [pair for pair in record.pictures if pair["stratum"] == stratum]
    if not pairs:
        return ""
    figures = []
    for pair in pairs:
        before, after = (decoded_picture(pair[name]) for name in ("original", "erased"))
        pictures = {
            "original": pair["original"],
            "erased": pair["erased"],
            "difference": encoded_picture(drift_map(before, after)),
        }
        images = "".join(
            f'<img alt="{name}" title="{name}" src="data:image/png;base64,{data}">' for name, data in pictures.items()
        )
        figures.append(f"<figure>{images}<figcaption>{html.escape(pair['prompt'] or '(empty)')}</figcaption></figure>")
    note = "original, erased, and where they differ (bright: much)"
    return (
        f'<h2>Pictures: {TITLES[stratum]}</h2><p class="note">{note}</p>'
        f'<div class="pairs">{"".join(figures)}</div>'
    )  # fmt: skip


def _worst(record, name):
    """The kept prompts that changed most."""
    groups = {}
    for row in record.rows:
        if row["stratum"] != ERASE:
            groups.setdefault((row["stratum"], row["prompt"]), []).append(row["distance"][name])
    if not groups:
        return ""
    order = sorted(groups.items(), key=lambda item: -np.mean(item[1]))[:WORST]
    rows = [[prompt or "(empty)", TITLES[stratum], f"{np.mean(values):.3f}"] for (stratum, prompt), values in order]
    return f"<h2>Most changed of what is to be kept</h2>{_table(['prompt', '', f'mean {name}'], rows)}"


def _settings(configuration):
    plain = {k: v for k, v in configuration.items() if k != "prompts"}
    text = "\n".join(f"{key}: {value}" for key, value in plain.items())
    return f"<pre>{html.escape(text)}</pre>"


def attack_sheet(rows, tile=TILE):
    """Rows [(label, second line, pictures (n, H, W, 3) in [0, 1])] as one picture (H, W, 3) in [0, 1]."""
    left, gap, columns = 300, 8, max(len(pictures) for _, _, pictures in rows)
    sheet = Image.new("RGB", (left + columns * (tile + gap), len(rows) * (tile + gap) + gap), "white")
    draw, bold, font = ImageDraw.Draw(sheet), _font(16), _font(13)
    for i, (label, second, pictures) in enumerate(rows):
        top = gap + i * (tile + gap)
        draw.text((12, top + tile // 2 - 22), _fit(draw, label, bold, left - 24), INK, bold)
        draw.text((12, top + tile // 2 + 2), _fit(draw, second, font, left - 24), "#444444", font)
        for column, picture in enumerate(pictures):
            sheet.paste(_tile(picture, tile), (left + column * (tile + gap), top))
    return np.asarray(sheet, np.float32) / 255


def _tile(picture, tile):
    """A picture (H, W, 3) in [0, 1] as an image that fits a square of so many pixels."""
    image = Image.fromarray((np.asarray(picture).clip(0, 1) * 255).round().astype(np.uint8))
    scale = tile / max(image.size)
    fit = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(fit, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
