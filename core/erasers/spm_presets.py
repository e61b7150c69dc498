"""Published numbers of Latent Anchoring for a kind of concept (SPM, appendix C.1), and the layers that it may train."""

from dataclasses import replace

from .spm import Settings

CUSTOM = "custom"
PRESETS = {
    CUSTOM: {},
    "object": {"steps": 3000, "eta": 1.0, "lam": 1000.0},
    "style": {"steps": 3000, "eta": 1.0, "lam": 1000.0},
    "nudity": {"steps": 15000, "eta": 3.0, "lam": 100.0},
}
AS_SET = "as set"
QUALITIES = {
    AS_SET: {},
    # measured on both demo models (benchmarks/training_dit.py): at a tenth of this rate and with the published
    # anchoring of 1000, 200 steps erase nothing
    "quick": {"steps": 200, "lr": 1e-2, "lam": 10.0, "warmup": 20, "cycles": 1, "rollout_steps": 10},
    "normal": {"steps": 600, "lr": 3e-3, "lam": 10.0, "warmup": 60, "cycles": 1, "rollout_steps": 10},
    "thorough": {"steps": 3000, "lr": 1e-4, "warmup": 500, "cycles": 3, "rollout_steps": 30},  # SPM's own
}
CROSS, SELF = (
    tuple(f"{kind}.{part}" for part in ("query", "key", "value", "out"))
    for kind in ("cross_attention", "self_attention")
)
TEXT = (
    *(f"text_attention.{part}" for part in ("qkv", "query", "key", "value")),
    "cross_attention.key",
    "cross_attention.value",
)
LAYERS = {  # by groups of sites; all that the family of the model says when empty
    "all": (),
    "attention": CROSS + SELF,
    "cross-attention": CROSS,
    "text keys and values": ("cross_attention.key", "cross_attention.value"),
    "text attention": TEXT,
    "text attention and feed-forward": (*TEXT, "text_feed_forward.down"),
    "shared attention": ("joint_attention.qkv",),
}


def settings_of(preset, quality=AS_SET, **given):
    """The given Settings, with the published numbers of a preset in place of theirs, those of a quality in place of
    both, and the warm-up no longer than a fifth of all steps."""
    settings = replace(Settings(**given), **{**PRESETS[preset], **QUALITIES[quality]})
    return replace(settings, warmup=min(settings.warmup, settings.steps // 5))
