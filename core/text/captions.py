"""Captions in which a concept is erased, by the kind of concept.

An erasure reaches the words as they are written in its captions: on the demo U-Net UCE with the bare word leaves 9
stars in 64 pictures, and with captions like the prompts none while all 96 other shapes stay right
(benchmarks/results/erasure_quality.md). A text encoder mixes each word with those before it, T5 and language models
with those behind it too, so a set varies what stands on both sides of the concept: the medium, a colour or a
pattern, a noun behind an adjective, an action, a place. What is to be kept is put into the same captions. In styles
that no set has, those for anything leave no star in 48 pictures of either demo model (erasure_wording.md, there);
they were chosen with that measure in view, and no set was measured on a person or a painter.

A caption of a set that has one of the erased concepts in its own words is left out: "a red {}" says nothing about
erasing red, and what is kept would be kept in it with the red that is to go.
"""

from dataclasses import dataclass

from ..errors import ErasureError
from .concepts import mentions, parse_templates


@dataclass(frozen=True)
class Captions:
    """Captions of one kind of concept.

    surrogate: what replaces a concept that names no replacement, "" for the empty prompt; templates: the captions, {}
    is the concept's place.
    """

    surrogate: str
    templates: tuple[str, ...]


_OBJECT = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a painting of a {}",
    "a red {}",
    "a blue {} on snow",
    "a striped green {} on sand",
    "a dotted yellow {} on stone",
    "a small black {} on coal",
    "a checkered pink {} on snow",
    "a plain white {} on stone",
    "a big orange {} on a table",
    "a drawing of a purple {}",
    "a picture of a striped {} on stone",
    "a {} on sand",
    "a dotted {} on snow",
    "an old {} in the snow",
    "a {} with a pink background",
    "two red and blue {} on coal",
    "a striped cyan {} on coal",
    "a checkered green {} on sand",
    "a plain yellow {} on snow",
    "a dotted red {} on stone",
    "a photo of a plain purple {} on coal",
)
_STYLE = (
    "{}",
    "in the style of {}",
    "a painting by {}",
    "a painting in the style of {}",
    "artwork by {}",
    "a landscape by {}",
    "a portrait of a woman by {}",
    "a portrait of a man in the style of {}",
    "a city at night in the style of {}",
    "flowers in a vase by {}",
    "a house by the sea, {} style",
    "a cat on a chair, drawn by {}",
    "a village in the snow, in the style of {}",
    "trees in a field, painting by {}",
    "{} style, a ship on the water",
    "a photo of a room, {}",
)
_PERSON = (
    "{}",
    "a photo of {}",
    "a portrait of {}",
    "a painting of {}",
    "a drawing of {}",
    "a close-up of the face of {}",
    "{} smiling",
    "{} in a dark suit",
    "{} in a red dress",
    "{} on a stage with a microphone",
    "{} walking on a street at night",
    "{} sitting on a chair in an office",
    "{} in front of a house in the snow",
    "{} as a superhero, film still",
    "a man and {} at a table",
    "a woman next to {} at the beach",
)
_ANYTHING = (
    "{}",
    "a {}",
    "a photo of {}",
    "a painting of a {}",
    "a red {}",
    "a blue {} on snow",
    "a striped green {} on sand",
    "a dotted yellow {} on stone",
    "a small black {} in front of a house",
    "a checkered pink {} on snow",
    "a plain white {} on coal",
    "a big orange {} on a table",
    "a drawing of a purple {}",
    "a picture of a striped {} on stone",
    "a {} on sand",
    "an old {} in the snow",
    "a {} circle on stone",
    "a plain {} square in the snow",
    "a striped {} triangle on sand",
    "a dotted {} heart",
    "a {} shape with a dark background",
    "a woman and {} in a room",
    "a man with {} by the sea",
    "a picture in the style of {}",
)
# the surrogates of style and person are those of the published scripts of RECE and SPEED
KINDS = {
    "anything": Captions("", _ANYTHING),
    "object": Captions("", _OBJECT),
    "style": Captions("art", _STYLE),
    "person": Captions("person", _PERSON),
}


def captions_of(kind):
    """Captions of one of KINDS; raises ErasureError for another name."""
    if kind not in KINDS:
        raise ErasureError(f'There is no kind of concept "{kind}"; choose one of: {", ".join(KINDS)}.')
    return KINDS[kind]


AUTOMATIC = "automatic"


def fitting(templates, words):
    """Those of the templates that have none of the words themselves."""
    return tuple(template for template in templates if not any(mentions(template, word) for word in words))


def is_automatic(text):
    """Whether a text is the one word "automatic"."""
    return text.strip().lower() == AUTOMATIC


def templates_for(text, words):
    """Templates that a text names for some words, see templates_of(); automatic ones that have one of the words
    themselves are left out."""
    found = templates_of(text)
    return list(fitting(found, words)) if is_automatic(text) else found


def templates_of(text):
    """Templates that a text names: those of any kind of concept for the one word "automatic", else its lines."""
    if is_automatic(text):
        return list(captions_of("anything").templates)
    return parse_templates(text)
