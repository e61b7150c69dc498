"""An evaluation as one page of HTML that needs nothing beside it."""

import html

import numpy as np

from . import svg
from .record import EMPTY, ERASE, NEIGHBOUR, TITLES, UNRELATED, encoded_picture
from .render_grid import pair_of
from .render_text import number, percent
from .verdict import verdict

WORST = 20  # prompts listed on the page
SCORES = {
    "erased": "erased concept recognised",
    "synonym": "the same, asked for in other words",
    "kept": "other classes right",
}
COLOURS = {ERASE: "#d0604a", NEIGHBOUR: "#4a9a6c", UNRELATED: "#5a86c8", EMPTY: "#888888"}  # seen on light and dark
STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #5c5c5c; --paper: #fff; --line: #ddd; --panel: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --quiet: #a8a8a8; --paper: #17181a; --line: #3a3c40; --panel: #222428 } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1180px; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em }
.verdict { font-size: 1.15em; background: var(--panel); border-left: 4px solid #d0604a; padding: .7em 1em;
  margin: 1em 0 }
.verdict p { margin: .15em 0 } summary { cursor: pointer; font-size: 1.2em; font-weight: 600; margin-top: 1.6em }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .6em 0 } th, td { padding: .25em .8em; text-align: left;
  border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 18px }
figure { margin: 0; display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px }
figure img { width: 100%; image-rendering: pixelated; display: block; border-radius: 3px }
figure span { font-size: 12px; color: var(--quiet) } figcaption { grid-column: 1 / -1; order: -1; font-size: 14px;
  overflow-wrap: anywhere } .note { color: var(--quiet); max-width: 70ch }
.lines { display: flex; flex-wrap: wrap; gap: 28px } svg { max-width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--quiet) } svg line { stroke: var(--line) }
svg line.other { stroke: var(--ink) }
pre { background: var(--panel); padding: .8em; overflow-x: auto; font-size: 12.5px }
@media (max-width: 600px) { body { margin: 1em auto; padding: 0 .7em } th, td { padding: .25em .5em } }
"""


def page(record, summary):
    """A Record and its Summary as HTML."""
    names, strata = summary.distance_names(), summary.strata
    parts = ["<h1>Erasure, measured</h1>", _verdict(record, summary)]
    if not record.finished:
        parts.append('<p class="note"><b>Not finished.</b> Queue the node again with the same inputs to go on.</p>')
    parts += [_pairs(record, stratum) for stratum in strata]
    tables = [_scores_table(summary.classified), *(_distance_table(name, strata) for name in names)]
    charts = [_drift_chart(strata), *(_spread_chart(record, name) for name in names[:1])]
    parts.append(_folded("The numbers", *tables, *(_worst(record, name) for name in names[:1])))
    parts.append(_folded("Charts", '<div class="lines">', *charts, "</div>"))
    parts.append(_folded("Settings", _settings(record.configuration)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Erasure, measured</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _verdict(record, summary):
    lines = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict(record, summary))
    return f'<div class="verdict">{lines}</div>' if lines else ""


def _folded(title, *parts):
    """Something that is opened by a click on its title."""
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>" if any(parts) else ""


# ---------------------------------------------------------------- tables


def _table(head, rows):
    def cells(kind, values):
        return "".join(f"<{kind}{' class=n' if i else ''}>{html.escape(v)}</{kind}>" for i, v in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _scores_table(classified):
    if classified is None:
        return ""
    scores = vars(classified.scores)
    found = [(title, scores[f"{key}_before"], scores[key]) for key, title in SCORES.items()]
    rows = [[title, percent(before), percent(after)] for title, before, after in found if after]
    rows.append(["harmonic mean", "", f"{100 * classified.scores.harmonic:.1f}"])
    names = html.escape(", ".join(classified.erased_classes))
    return f"<h2>What a classifier sees</h2><p>Erased: {names}</p>{_table(['', 'original', 'erased'], rows)}"


def _distance_table(name, strata):
    moved = {TITLES[stratum]: values.distances[name] for stratum, values in strata.items()}
    rows = [
        [title, number(m.integrity), number(m.mean), f"{m.median:.3f}", f"{m.p95:.3f}", f"{m.floor:.2g}",
         f"{m.ceiling:.3f}", f"{m.prompts} / {m.count}"]
        for title, m in moved.items()
    ]  # fmt: skip
    head = ["prompts", "integrity", "mean distance", "median", "p95", "floor", "another seed", "prompts / pairs"]
    note = (
        "Integrity: 1 is untouched, 0 is as different as another seed. In brackets: 95 % bootstrap interval over the "
        "prompts. Low is wanted in the first row, 1 in the others."
    )
    return f'<h2>Distance: {html.escape(name)}</h2>{_table(head, rows)}<p class="note">{note}</p>'


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


# ---------------------------------------------------------------- charts


def _drift_chart(strata):
    """Drift over the noise levels, a line with its interval for each kind of prompt; high noise on the left."""
    curves = {stratum: values.drift for stratum, values in strata.items() if values.drift}
    if not curves:
        return ""
    levels = [level for curve in curves.values() for level in curve]
    low, high = min(map(_log, levels)), max(map(_log, levels)) + 1e-9
    largest = max(level.high for level in levels) or 1.0

    def x(level):
        return (high - _log(level)) / (high - low)

    ticks = [(x(level), f"{level.sigma:.2g}") for level in next(iter(curves.values()))]
    title = "noise level (sigma), sampling goes to the right"
    parts = svg.axes("Teacher-forced drift", title, ticks, svg.ticks(largest))
    for stratum, curve in curves.items():
        band = [svg.place(x(level), level.high / largest) for level in curve]
        band += [svg.place(x(level), level.low / largest) for level in reversed(curve)]
        line = svg.points(svg.place(x(level), level.value / largest) for level in curve)
        parts.append(f'<polygon points="{svg.points(band)}" fill="{COLOURS[stratum]}" opacity=".15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[stratum]}" stroke-width="2"/>')
    return svg.chart([*parts, svg.legend([(TITLES[stratum], COLOURS[stratum]) for stratum in curves])])


def _log(level):
    return np.log(max(level.sigma, 1e-3))


def _spread_chart(record, name):
    """Every prompt's mean distance, sorted, over the distance of another seed."""
    groups = {}
    for row in record.rows:
        groups.setdefault(row["stratum"], {}).setdefault(row["index"], []).append(row["distance"][name])
    ceiling = float(np.mean([row["ceiling"][name] for row in record.rows]))
    curves = {stratum: sorted(np.mean(v) for v in prompts.values()) for stratum, prompts in groups.items()}
    largest = max(ceiling, *(curve[-1] for curve in curves.values())) * 1.05 or 1.0
    title = f"Distance of every prompt ({name})"
    parts = svg.axes(title, "prompts, the least changed first", [(0, ""), (1, "")], svg.ticks(largest))
    (x1, y), (x2, _) = svg.place(0, ceiling / largest), svg.place(1, ceiling / largest)
    parts.append(f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" class="other" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x2}" y="{y - 5}" text-anchor="end">another seed</text>')
    for stratum, values in curves.items():
        for i, value in enumerate(values):
            px, py = svg.place((i + 0.5) / len(values), value / largest)
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{COLOURS[stratum]}" opacity=".8"/>')
    return svg.chart(parts)


# ---------------------------------------------------------------- pictures


def _pairs(record, stratum):
    figures = [_figure(shown) for shown in record.pictures if shown["stratum"] == stratum]
    if not figures:
        return ""
    note = "The third picture shows where the other two differ (bright: much)."
    return f'<h2>Pictures: {TITLES[stratum]}</h2><p class="note">{note}</p><div class="pairs">{"".join(figures)}</div>'


def _figure(shown):
    pictures = {
        "original": shown["original"],
        "erased": shown["erased"],
        "difference": encoded_picture(pair_of(shown)["difference"]),
    }
    images = "".join(
        f'<span><img alt="{name}" src="data:image/png;base64,{data}">{name}</span>' for name, data in pictures.items()
    )
    return f"<figure>{images}<figcaption>{html.escape(shown['prompt'] or '(empty)')}</figcaption></figure>"
