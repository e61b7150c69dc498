"""All families, and which of them a model is of."""

from . import cross_attention, flux, joint_attention, qwen, sd3, unet, z_image
from .family import OTHER, Family

FILES = unet, flux, z_image, qwen, sd3, cross_attention, joint_attention
# what a model that is of no known family is tried as: the rows that most transformers call the context
UNKNOWN = joint_attention.UNKNOWN
# the same for one with the blocks of a U-Net
UNKNOWN_UNET = Family("", "unknown", (), (unet.TEXT,), unet.ROLES, unet.TRAINED, marks=("input_blocks",))
FAMILIES = [found for file in FILES for found in vars(file).values() if isinstance(found, Family) and found.name]
# those told by marks before the others of the same configuration
FAMILIES.sort(key=lambda family: not family.marks)


def register(family):
    """Adds a family; one that is registered later is looked at first."""
    FAMILIES.insert(0, family)


def family_of(names, has=lambda mark: False):
    """The Family of a model configuration; names: of its class and of those it is derived from, nearest first.

    has(mark): whether the network has a module of this name. UNKNOWN or UNKNOWN_UNET where no family is known.
    """
    for name in names:
        for family in FAMILIES:
            if name in family.configs and all(map(has, family.marks)):
                return family
    return UNKNOWN_UNET if all(map(has, UNKNOWN_UNET.marks)) else UNKNOWN


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
