"""Pictures of an evaluation, side by side in one picture."""

import numpy as np
from PIL import Image, ImageDraw

from .chart import INK, fitted, font_of
from .record import TILE, TITLES, decoded_picture

QUIET = "#444444"
HEAT = np.array([[0, 0, 0], [90, 20, 90], [200, 50, 50], [250, 160, 40], [255, 255, 220]], np.float32) / 255
HEAT_FULL = 0.5  # mean difference of the channels that is drawn brightest
LEFT, GAP, HEAD, CAPTION = 96, 8, 34, 40  # pixels around the pictures of a block
ROWS = ("original", "erased", "difference")


def drift_map(before, after):
    """Where two pictures (H, W, 3) differ: dark where they are the same, (H, W, 3) in [0, 1]."""
    amount = np.abs(after - before).mean(axis=-1) / HEAT_FULL
    at = amount.clip(0, 1) * (len(HEAT) - 1)
    low = np.floor(at).astype(int).clip(0, len(HEAT) - 2)
    return HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (at - low)[..., None]


def pair_of(shown):
    """{"original", "erased", "difference": picture (H, W, 3) in [0, 1]} of a pair that a record keeps."""
    before, after = (decoded_picture(shown[name]) for name in ROWS[:2])
    return dict(zip(ROWS, (before, after, drift_map(before, after))))


def grid(record, tile=TILE):
    """Original above erased above where they differ, a column a kept pair, a block a stratum: (H, W, 3) in [0, 1]."""
    blocks = {}
    for shown in record.pictures:
        blocks.setdefault(shown["stratum"], []).append(shown)
    if not blocks:
        return np.ones((tile, tile, 3), np.float32)
    width = LEFT + max(len(pairs) for pairs in blocks.values()) * (tile + GAP)
    height = HEAD + len(ROWS) * (tile + GAP) + CAPTION
    sheet = Image.new("RGB", (max(width, 360), height * len(blocks)), "white")
    for i, (stratum, pairs) in enumerate(blocks.items()):
        _block(sheet, i * height, TITLES[stratum], pairs, tile)
    return np.asarray(sheet, np.float32) / 255


def _block(sheet, top, title, pairs, tile):
    """The pairs of a stratum on a sheet, from a height on."""
    draw, font, small, line = ImageDraw.Draw(sheet), font_of(14), font_of(12), tile + GAP
    draw.text((10, top + 8), title, INK, font_of(18))
    top += HEAD
    for row, label in enumerate(ROWS):
        draw.text((10, top + row * line + tile // 2 - 8), label, INK, font)
    for column, shown in enumerate(pairs):
        x, below = LEFT + column * line, top + len(ROWS) * line
        for row, picture in enumerate(pair_of(shown).values()):
            sheet.paste(_tile(picture, tile), (x, top + row * line))
        for i, text in enumerate(_two_lines(draw, shown["prompt"] or "(empty)", small, tile)):
            draw.text((x, below + 15 * i), text, QUIET, small)


def _two_lines(draw, text, font, width):
    """The text in two lines of at most so many pixels, cut with dots."""
    words, first = text.split(), ""
    while words and draw.textlength(f"{first} {words[0]}".strip(), font) <= width:
        first = f"{first} {words.pop(0)}".strip()
    if not first:
        return fitted(draw, text, font, width), ""
    return first, fitted(draw, " ".join(words), font, width)


def attack_sheet(rows, tile=TILE):
    """Rows [(label, second line, pictures (n, H, W, 3) in [0, 1])] as one picture (H, W, 3) in [0, 1]."""
    left, gap, columns = 300, 8, max(len(pictures) for _, _, pictures in rows)
    sheet = Image.new("RGB", (left + columns * (tile + gap), len(rows) * (tile + gap) + gap), "white")
    draw, bold, font = ImageDraw.Draw(sheet), font_of(16), font_of(13)
    for i, (label, second, pictures) in enumerate(rows):
        top = gap + i * (tile + gap)
        draw.text((12, top + tile // 2 - 22), fitted(draw, label, bold, left - 24), INK, bold)
        draw.text((12, top + tile // 2 + 2), fitted(draw, second, font, left - 24), QUIET, font)
        for column, picture in enumerate(pictures):
            sheet.paste(_tile(picture, tile), (left + column * (tile + gap), top))
    return np.asarray(sheet, np.float32) / 255


def _tile(picture, tile):
    """A picture (H, W, 3) in [0, 1] as an image that fits a square of so many pixels."""
    image = Image.fromarray((np.asarray(picture).clip(0, 1) * 255).round().astype(np.uint8))
    scale = tile / max(image.size)
    fit = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(fit, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
