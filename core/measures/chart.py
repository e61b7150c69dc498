"""Charts drawn with Pillow, which every host has."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, BAR, GRID = "#222222", "#c2543d", "#dddddd"


def font_of(size):
    """Pillow's own font in a size of so many pixels."""
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def bar_chart(title, bars, width=900):
    """Horizontal bars with labels: bars is [(label, value >= 0)], values shown as percent.

    Returns an RGB array (height, width, 3), float32 in [0, 1], as the host's IMAGE without its batch.
    """
    line, top, margin = 26, 48, 14
    picture = Image.new("RGB", (width, top + line * len(bars) + margin), "white")
    draw = ImageDraw.Draw(picture)
    font, large = font_of(15), font_of(18)
    draw.text((margin, 12), title, INK, large)
    labels = [fitted(draw, label, font, width // 2) for label, _ in bars]
    left = margin + min(width // 2, max(int(draw.textlength(label, font)) for label in labels)) + 10
    right = width - 80
    largest = max(max(value for _, value in bars), 1e-9)
    for i, (label, (_, value)) in enumerate(zip(labels, bars)):
        y = top + i * line
        draw.text((margin, y + 3), label, INK, font)
        draw.line((left, y + line - 2, right, y + line - 2), GRID)
        draw.rectangle((left, y + 4, left + max(1, round((right - left) * value / largest)), y + line - 7), BAR)
        draw.text((right + 8, y + 3), f"{value:.1%}", INK, font)
    return np.asarray(picture, np.float32) / 255


def fitted(draw, text, font, width):
    """The text, cut with dots where it is longer than width pixels."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
