"""All families, and which of them a model is of."""

from . import unet
from .family import OTHER, Family

FAMILIES = [unet.SDXL, unet.SD2, unet.SD1]

# what a model that is of no known family is tried as: the text of the conditioning, read by the cross-attention that
# U-Nets have
UNKNOWN = Family("", "unknown", (), (unet.TEXT,), unet.SD1.rows, unet.ROLES, unet.TRAINED)


def register(family):
    """Adds a family; one that is registered later is looked at first."""
    FAMILIES.insert(0, family)


def family_of(names):
    """The Family of a model configuration; names: of its class and of those it is derived from, nearest first.

    UNKNOWN where none is known.
    """
    for name in names:
        for family in FAMILIES:
            if name in family.configs:
                return family
    return UNKNOWN


def role(site):
    """What the layer at a site does, by the first family that knows it; "other" where none does."""
    found = (family.role(site) for family in FAMILIES)
    return next((role for role in found if role != OTHER), OTHER)


def by_text_width(width):
    """The Family whose text vectors are so wide, or None."""
    return next((family for family in FAMILIES if family.text_width and family.text_width == width), None)


def architecture(name):
    """(kohya's ss_base_model_version, modelspec.architecture) of a family by the host's name of it."""
    known = (row for family in FAMILIES for row in family.architectures)
    return next(
        ((version, title) for start, version, title in known if name.startswith(start)), ("", name or "unknown")
    )
