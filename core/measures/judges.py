"""What tells whether a concept is in a picture, and the distances between pictures, as a user chooses them."""

from ..demo.judge import ANSWERS
from ..demo.judge import NONE as NO_SHAPE
from ..errors import ErasureError
from ..text.concepts import parse_lines
from . import distances
from .compare import built_in, by_pictures, by_vectors, demo_judge, zero_shot_judge

NONE, DEMO_WORLD, CLIP_VISION = CLASSIFIERS = ("none", "demo world", "CLIP vision")


def classes_of(classifier, names):
    """What a classifier chooses between: the lines of names; the demo world's shapes where nothing is named."""
    shapes = [name for name in ANSWERS["shape"] if name != NO_SHAPE]
    return parse_lines(names) or (shapes if classifier == DEMO_WORLD else [])


def judge_of(classifier, classes, class_vectors=None, image_vectors=None):
    """The chosen classifier as a function of pictures (B, H, W, 3) -> [class], or None.

    class_vectors(classes) -> (classes, d) and image_vectors(pictures, d) -> (B, d) are those of a CLIP, None where
    none is connected. Raises ErasureError when the classifier lacks something.
    """
    if classifier == NONE:
        return None
    if classifier == DEMO_WORLD:
        return demo_judge(classes)
    if image_vectors is None or class_vectors is None or len(classes) < 2:
        raise ErasureError(
            'The classifier "CLIP vision" needs clip_vision, the text encoder that belongs to it as class_clip, and at '
            "least two class names; connect and write them, or choose another classifier."
        )
    vectors = class_vectors(classes)
    return zero_shot_judge(classes, vectors, lambda pictures: image_vectors(pictures, vectors.shape[1]))


def distances_of(with_pictures, image_vectors=None, perceptual=distances.NONE):
    """{name: Distance} of what is connected: pixels where there are pictures of a VAE, what CLIP sees where there is
    image_vectors(pictures) -> (B, d), and a perceptual distance by its name."""
    found = built_in(with_pictures)
    if image_vectors is not None:
        found["CLIP vision"] = by_vectors(image_vectors)
    if perceptual != distances.NONE:
        found[perceptual] = by_pictures(distances.perceptual(perceptual))
    return found
