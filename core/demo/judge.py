"""The independent judge of Pixel World: reads shape, colour, texture and background off a picture.

It never saw a picture that the demo model made; tools/pixel_world/classifier.py trained it on rendered ones.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, Module, ModuleDict, ReLU, Sequential

PATH = Path(__file__).resolve().parents[2] / "assets" / "pixel_world" / "classifier.safetensors"
SIZE = 16  # pixels per side
NONE = "none"  # the answer for pictures without one of the eight shapes
ANSWERS = {
    "shape": ("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring", NONE),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "background": ("snow", "sand", "stone", "coal"),
}


class Classifier(Module):
    """(B, 3, 16, 16) in [0, 1] -> {attribute: logits (B, answers)}."""

    def __init__(self):
        super().__init__()

        def stage(a, b, stride):
            return [Conv2d(a, b, 3, stride=stride, padding=1, bias=False), BatchNorm2d(b), ReLU()]

        self.body = Sequential(
            *stage(3, 32, 1),
            *stage(32, 32, 1),
            *stage(32, 64, 2),
            *stage(64, 64, 1),
            *stage(64, 96, 2),
            *stage(96, 96, 1),
            Flatten(),
            Linear(96 * 16, 192),
            ReLU(),
        )
        self.heads = ModuleDict({a: Linear(192, len(names)) for a, names in ANSWERS.items()})

    def forward(self, x):
        h = self.body(x * 2 - 1)
        return {a: head(h) for a, head in self.heads.items()}


def load():
    """The trained judge."""
    model = Classifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(PATH)).items()})
    return model.train(False)


@torch.no_grad()
def read(model, pictures):
    """Pictures (B, 16, 16, 3) in [0, 1] -> {attribute: answers (B,) as indices into ANSWERS}."""
    x = torch.as_tensor(np.asarray(pictures), dtype=torch.float32).permute(0, 3, 1, 2)
    parts = [model(chunk) for chunk in x.split(512)]
    return {a: torch.cat([p[a] for p in parts]).argmax(1).numpy() for a in ANSWERS}


def attribute_of(classes):
    """The attribute of which all classes are answers, or None."""
    return next((a for a, names in ANSWERS.items() if classes and set(classes) <= set(names)), None)


def sprites(pictures):
    """Pictures (B, H, W, 3) of any size in [0, 1] -> (B, 16, 16, 3), the mean of each part."""
    return F.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2), SIZE).permute(0, 2, 3, 1)
