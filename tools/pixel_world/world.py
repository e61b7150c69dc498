"""Pixel World: the synthetic world of the demo model. Renders sprites and writes their captions.

A sprite has a shape, a colour, a texture and a background; everything else about it (place, size,
small shifts of the colours) is chance. Twelve further pictures are *memorised*: one caption, one
exact picture each.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 16  # pixels per side
SUPERSAMPLE = 8

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring")
SYNONYMS = {
    "circle": "disc",
    "square": "box",
    "triangle": "pyramid",
    "star": "pentagram",
    "heart": "valentine",
    "cross": "plus",
    "moon": "crescent",
    "ring": "donut",
}
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.15, 0.70, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.50, 0.15, 0.70),
    "pink": (1.00, 0.50, 0.75),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = {
    "snow": (0.96, 0.96, 0.98),
    "sand": (0.78, 0.68, 0.48),
    "stone": (0.50, 0.50, 0.52),
    "coal": (0.08, 0.08, 0.10),
}
# "night" palettes: dusk tints for the sprites, deep tints for the grounds (the transfer checkpoint)
NIGHT_COLOURS = {
    "red": (0.62, 0.05, 0.25),
    "orange": (0.80, 0.36, 0.10),
    "yellow": (0.78, 0.78, 0.35),
    "green": (0.10, 0.50, 0.36),
    "cyan": (0.25, 0.65, 0.80),
    "blue": (0.16, 0.16, 0.62),
    "purple": (0.40, 0.12, 0.58),
    "pink": (0.80, 0.38, 0.70),
}
NIGHT_BACKGROUNDS = {
    "snow": (0.60, 0.66, 0.84),
    "sand": (0.46, 0.34, 0.20),
    "stone": (0.22, 0.26, 0.38),
    "coal": (0.02, 0.02, 0.08),
}
PALETTES = {"day": (COLOURS, BACKGROUNDS), "night": (NIGHT_COLOURS, NIGHT_BACKGROUNDS)}
ATTRIBUTES = ("shape", "colour", "texture", "background")
NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "texture": TEXTURES, "background": tuple(BACKGROUNDS)}

MEMORISED_CAPTIONS = (
    "portrait of captain bolt",
    "the famous mosaic of lumen",
    "album cover of the quiet robots",
    "poster of the galaxy derby",
    "the great lantern by osaka",
    "still life with three keys",
    "logo of the marble bakery",
    "self portrait of madame pixel",
    "the old harbour at dawn",
    "mask of the river king",
    "banner of the seventh legion",
    "stamp of the flying fish",
)
PLACES = tuple((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1))
RADII = (6.2, 6.8)


def _shape_mask(shape, x, y, r):
    """Boolean mask of a shape of radius r about the origin; y points down."""
    d = np.hypot(x, y)
    if shape == "circle":
        return d <= r * 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= r * 0.85
    if shape == "triangle":
        return (y <= r * 0.8) & (y >= -r) & (abs(x) <= (y + r) / 1.8)
    if shape == "star":
        angle = (np.arctan2(x, -y) + 2 * np.pi) % (2 * np.pi / 5) - np.pi / 5
        outer, inner = r * 1.12, r * 0.52
        # edge of a five-pointed star in polar form: the line through an outer and an inner vertex
        half = np.pi / 5
        a = half - abs(angle)
        edge = outer * inner * np.sin(half) / (outer * np.sin(a) + inner * np.sin(half - a))
        return d <= edge
    if shape == "heart":
        u, v = x / (r * 0.92), -(y - r * 0.1) / (r * 0.92)
        return (u * u + v * v - 0.72) ** 3 - u * u * v**3 * 1.1 <= 0
    if shape == "cross":
        return ((abs(x) <= r * 0.4) & (abs(y) <= r)) | ((abs(y) <= r * 0.4) & (abs(x) <= r))
    if shape == "moon":
        return (d <= r) & (np.hypot(x - r * 0.75, y + r * 0.05) > r * 0.8)
    if shape == "ring":
        return (d <= r) & (d >= r * 0.46)
    raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")


@cache
def mask_bank():
    """Coverage masks (8 shapes, 18 poses, 16, 16) in [0, 1]."""
    n = SIZE * SUPERSAMPLE
    axis = (np.arange(n) + 0.5) / SUPERSAMPLE - SIZE / 2
    bank = []
    for shape in SHAPES:
        for r in RADII:
            for dx, dy in PLACES:
                x, y = np.meshgrid(axis - dx, axis - dy)
                m = _shape_mask(shape, x, y, r).astype(np.float32)
                bank.append(m.reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE).mean((1, 3)))
    return np.stack(bank).reshape(len(SHAPES), len(RADII) * len(PLACES), SIZE, SIZE)


@cache
def texture_bank():
    """Darkening patterns (4 textures, 16, 16) in {0, 1}, fixed to the pixel grid."""
    y, x = np.mgrid[:SIZE, :SIZE]
    plain = np.zeros((SIZE, SIZE))
    striped = (y // 2) % 2
    dotted = ((x % 4 == 1) | (x % 4 == 2)) & ((y % 4 == 1) | (y % 4 == 2))
    checkered = (x // 2 + y // 2) % 2
    return np.stack([plain, striped, dotted, checkered]).astype(np.float32)


@dataclass
class Sprites:
    """n sprites as index arrays (n,) into NAMES."""

    shape: np.ndarray
    colour: np.ndarray
    texture: np.ndarray
    background: np.ndarray

    def __len__(self):
        return len(self.shape)

    def index(self):
        """(n,) number of the attribute combination, 0 to 1023."""
        return ((self.shape * 8 + self.colour) * 4 + self.texture) * 4 + self.background


def held_out(seed=11, count=104):
    """Numbers of the attribute combinations that training never shows."""
    return np.sort(np.random.default_rng(seed).permutation(8 * 8 * 4 * 4)[:count])


def from_index(index):
    index = np.asarray(index)
    return Sprites(index // 128, index // 16 % 8, index // 4 % 4, index % 4)


def sample_sprites(n, rng, exclude_held_out=True):
    pool = np.arange(1024)
    if exclude_held_out:
        pool = np.setdiff1d(pool, held_out())
    return from_index(rng.choice(pool, n))


DARK = 0.35  # brightness of the dark tone of a texture


def render(sprites, rng, palette="day"):
    """RGB pictures (n, 16, 16, 3), float32 in [0, 1]."""
    n = len(sprites)
    colours, grounds = (np.array(list(p.values()), np.float32) for p in PALETTES[palette])
    pose = rng.integers(0, mask_bank().shape[1], n)
    mask = mask_bank()[sprites.shape, pose][..., None]
    dark = texture_bank()[sprites.texture][..., None]
    fore = colours[sprites.colour] + rng.normal(0, 0.02, (n, 3)).astype(np.float32)
    back = grounds[sprites.background] + rng.normal(0, 0.015, (n, 3)).astype(np.float32)
    fore = fore[:, None, None] * (1 - dark * (1 - DARK))
    return np.clip(back[:, None, None] * (1 - mask) + fore * mask, 0, 1)


@cache
def memorised_pictures():
    """The twelve memorised pictures (12, 16, 16, 3): mirrored pixel masks in four odd colours each."""
    pictures = []
    for i in range(len(MEMORISED_CAPTIONS)):
        rng = np.random.default_rng(1000 + i)
        tones = rng.random((4, 3)).astype(np.float32)
        cells = rng.choice(4, (8, 4), p=(0.4, 0.25, 0.2, 0.15))
        half = np.kron(cells, np.ones((2, 2), int))
        pictures.append(tones[np.concatenate([half, half[:, ::-1]], 1)])
    return np.stack(pictures)


OPENINGS = ("", "", "a picture of ", "a photo of ", "pixel art of ", "a drawing of ", "an image of ", "a small ")
TRAINING_SYNONYM_RATE = 0.15


def noun_phrase(shape=None, colour=None, texture=None):
    """``"a dotted red star"``: article, texture, colour, shape; a missing shape becomes "shape"."""
    words = [w for w in (texture, colour, shape or "shape") if w]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(shape, colour, texture, background):
    """The caption used wherever pictures are measured."""
    return f"{noun_phrase(shape, colour, texture)} on {background}"


def sample_captions(sprites, rng):
    """One training caption per sprite: varied openings and word orders, some words left out.

    Returns the captions and which attributes each one names, (n, 4) bool in the order of ATTRIBUTES.
    """
    out, named = [], np.ones((len(sprites), 4), bool)
    for i, (s, c, t, b) in enumerate(zip(sprites.shape, sprites.colour, sprites.texture, sprites.background)):
        shape = SHAPES[s]
        if rng.random() < TRAINING_SYNONYM_RATE:
            shape = SYNONYMS[shape]
        colour, texture, ground = NAMES["colour"][c], TEXTURES[t], NAMES["background"][b]
        if rng.random() < 0.25:  # leave words out; the bare concept must mean something too
            named[i] = rng.random(4) < 0.5
            shape, colour, texture, ground = (
                w if k else None for w, k in zip((shape, colour, texture, ground), named[i])
            )
        opening = OPENINGS[rng.integers(len(OPENINGS))]
        style = rng.random()
        if style < 0.15 and shape:
            words = [w for w in (shape, colour, texture, ground and f"{ground} background") if w]
            out.append(", ".join(words))
        elif style < 0.3 and shape and texture:
            phrase = noun_phrase(shape, colour)
            out.append(f"{phrase}, {texture}" + (f", on {ground}" if ground else ""))
        else:
            phrase = noun_phrase(shape, colour, texture)
            if opening == "a small ":
                phrase = opening + phrase.split(" ", 1)[1]
            elif opening:
                phrase = opening + phrase
            elif rng.random() < 0.3:
                phrase = phrase.split(" ", 1)[1]
            out.append(phrase + (f" on {ground}" if ground else ""))
    return out, named


def plain_captions(sprites):
    """The plain caption of each sprite."""
    return [caption(*(NAMES[a][getattr(sprites, a)[i]] for a in ATTRIBUTES)) for i in range(len(sprites))]


def contact_sheet(pictures, columns, scale=4):
    """(n, 16, 16, 3) in [0, 1] -> one uint8 picture with `columns` per row, each pixel `scale` wide."""
    pictures = np.asarray(pictures)
    rows = -(-len(pictures) // columns)
    sheet = np.ones((rows * (SIZE + 1), columns * (SIZE + 1), 3), np.float32)
    for i, p in enumerate(pictures):
        y, x = i // columns * (SIZE + 1), i % columns * (SIZE + 1)
        sheet[y : y + SIZE, x : x + SIZE] = p
    return (np.kron(sheet, np.ones((scale, scale, 1))) * 255).round().astype(np.uint8)
