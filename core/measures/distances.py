"""Distances between pictures of the same prompt and noise."""

import importlib
import importlib.util
import os

import torch

from ..errors import ErasureError

NONE, LPIPS, DREAMSIM = PERCEPTUAL = ("none", "LPIPS", "DreamSim")
PACKAGES = {LPIPS: "lpips", DREAMSIM: "dreamsim"}


def rms(a, b):
    """Root mean square difference of each pair: (B, ...), (B, ...) -> (B,) float64."""
    return (a.double() - b.double()).flatten(1).square().mean(dim=1).sqrt()


def cosine_distance(a, b):
    """1 - cosine of each pair of vectors: (B, d), (B, d) -> (B,) float64."""
    return 1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=1)


def perceptual(name):
    """A distance as a function of two batches of pictures, both (B, H, W, 3) in [0, 1], -> (B,) float64.

    name: LPIPS or DREAMSIM; both come from a package that is on this machine already.

    Raises ErasureError when the package is missing or would have to fetch its weights.
    """
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise ErasureError(
            f'The distance {name} needs the Python package "{package}", which this ComfyUI does not have; '
            'install it there yourself, or set perceptual to "none".'
        )
    return {LPIPS: _lpips, DREAMSIM: _dreamsim}[name]()


def _require_file(name, path):
    if not os.path.exists(path):
        raise ErasureError(
            f"The distance {name} needs its weights at {path}, and nothing is downloaded from here; put them there, or "
            'set perceptual to "none".'
        )


def _lpips():
    """LPIPS on AlexNet (Zhang et al. 2018), which takes pictures in [-1, 1]."""
    _require_file(LPIPS, os.path.join(torch.hub.get_dir(), "checkpoints", "alexnet-owt-7be5be79.pth"))
    model = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).train(False)

    def distance(a, b):
        with torch.no_grad():
            return model(*(x.permute(0, 3, 1, 2) * 2 - 1 for x in (a, b))).flatten().double()

    return distance


def _dreamsim():
    """DreamSim (Fu et al. 2023), which takes pictures of 224 x 224 in [0, 1]."""
    cache = os.path.join(torch.hub.get_dir(), "dreamsim")
    _require_file(DREAMSIM, cache)
    model, _ = importlib.import_module("dreamsim").dreamsim(pretrained=True, device="cpu", cache_dir=cache)

    def resized(x):
        return torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), (224, 224), mode="bicubic", antialias=True)

    def distance(a, b):
        with torch.no_grad():
            return model(resized(a).clamp(0, 1), resized(b).clamp(0, 1)).flatten().double()

    return distance
