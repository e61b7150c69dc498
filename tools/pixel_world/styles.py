"""Captions of the demo world in styles that no caption template of the pack has: held-out wording.

An erasure that holds only for captions like its own templates holds for nobody. Each style is a function of the four
words of a sprite; the demo models draw all of them rightly (benchmarks/results/erasure_wording.md counts it).
"""

from membrane.tools.pixel_world import world

IN_STYLE = "plain caption"  # the one style that benchmarks write templates in
GROUND = "ground"  # what a style calls the background


def _plain(shape, colour, texture, ground):
    return world.caption(shape, colour, texture, ground)


def _comma_list(shape, colour, texture, ground):
    return f"{shape}, {colour}, {texture}, {ground} background"


def _opening(shape, colour, texture, ground):
    return f"pixel art of {_plain(shape, colour, texture, ground)}"


def _upper_case(shape, colour, texture, ground):
    return f"{texture} {colour} {shape} on {ground}".upper()


def _word_first(shape, colour, texture, ground):
    return f"{world.noun_phrase(shape, colour)}, {texture}, on {ground}"


def _longer(shape, colour, texture, ground):
    return f"a small drawing, {_plain(shape, colour, texture, ground)}, {ground} background, pixel art"


def _emphasis(word):
    """The concept, which is one of the four words, in the host's brackets of emphasis."""

    def written(**words):
        return _plain(**words | {word: f"({words[word]}:1.3)"})

    return written


def _bare(word):
    def written(**words):
        return words[word]

    return written


def _synonym(shape, colour, texture, ground):
    return _plain(world.SYNONYMS[shape], colour, texture, ground)


def styles_of(attribute):
    """{style: function (shape, colour, texture, ground) -> caption} for erasing values of an attribute.

    Only shapes have synonyms in this world.
    """
    word = GROUND if attribute == "background" else attribute
    found = {
        IN_STYLE: _plain,
        "comma list": _comma_list,
        "other opening": _opening,
        "upper case": _upper_case,
        "other order": _word_first,
        "longer prompt": _longer,
        "emphasis": _emphasis(word),
        "bare word": _bare(word),
    }
    return found | ({"synonym": _synonym} if attribute == "shape" else {})


def captions_in(style, attribute, sprites):
    """The caption of each sprite in a style of styles_of(attribute)."""
    write = styles_of(attribute)[style]
    words = zip(*([world.NAMES[a][i] for i in getattr(sprites, a)] for a in world.ATTRIBUTES))
    return [write(**dict(zip(("shape", "colour", "texture", GROUND), each))) for each in words]
