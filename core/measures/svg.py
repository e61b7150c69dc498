"""Charts of a page as SVG, without any script."""

import html

import numpy as np

WIDTH, HEIGHT = 560, 320
LEFT, TOP, RIGHT, BOTTOM = 56, 30, 26, 46  # pixels around the axes


def place(x, y):
    """Pixels of a point of the axes, x and y in [0, 1] from the lower left."""
    return LEFT + x * (WIDTH - LEFT - RIGHT), TOP + (1 - y) * (HEIGHT - TOP - BOTTOM)


def points(places):
    """Pixels as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def ticks(largest):
    """[(height in [0, 1], label)] of round numbers from 0 to the largest."""
    step = 10 ** np.floor(np.log10(max(largest, 1e-9)))
    step *= next(f for f in (0.2, 0.5, 1, 2, 5) if largest / (f * step) <= 5)
    return [(v / largest, f"{v:g}") for v in np.arange(0, largest + step / 2, step).round(10) if v <= largest]


def axes(title, x_title, ticks_x, ticks_y):
    """Parts of a chart: its title, its horizontal title, and [(place in [0, 1], label)] along both axes."""
    parts = [f'<text x="{LEFT}" y="16" style="font-weight:600">{html.escape(title)}</text>']
    for x, label in ticks_x:
        px, py = place(x, 0)
        parts.append(f'<line x1="{px}" y1="{py}" x2="{px}" y2="{py + 4}"/>')
        parts.append(f'<text x="{px}" y="{py + 17}" text-anchor="middle">{label}</text>')
    for y, label in ticks_y:
        px, py = place(0, y)
        parts.append(f'<line x1="{px}" y1="{py}" x2="{place(1, y)[0]}" y2="{py}"/>')
        parts.append(f'<text x="{px - 6}" y="{py + 4}" text-anchor="end">{label}</text>')
    middle = place(0.5, 0)[0]
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_title)}</text>')
    return parts


def legend(entries):
    """[(title, colour)] at the upper right."""
    return "".join(
        f'<circle cx="{WIDTH - 190}" cy="{44 + 17 * i}" r="5" fill="{colour}"/>'
        f'<text x="{WIDTH - 180}" y="{48 + 17 * i}">{title}</text>'
        for i, (title, colour) in enumerate(entries)
    )


def chart(parts):
    """The parts as one picture."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(parts)}</svg>'
