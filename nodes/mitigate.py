"""Holding memorised pictures back while sampling, without gradients."""

from ..core.errors import ErasureError
from ..core.host.patches.mitigation import reweight_tokens, switch_guidance
from . import inputs
from .labels import labelled

DYNAMIC, DELAYED, OPPOSITE, TOKENS = "dynamic guidance", "delayed guidance", "opposite guidance", "token re-weighting"
METHODS = (DYNAMIC, DELAYED, OPPOSITE, TOKENS)
PUBLISHED_DYNAMIC = 1.0  # guidance scale until the text's pull first grows again
PUBLISHED_OPPOSITE = -2.0, 0.35  # until timestep 650


class MembraneMitigateMemorization:
    TITLE = "Mitigate Memorization (experimental)"
    DESCRIPTION = (
        "Makes it less likely that a prompt draws a memorised picture, by changing the guidance at the beginning or "
        "what the attention leans on. Nothing is trained and no weight changes. The evidence is thin: look at your "
        "pictures."
    )
    SEARCH_ALIASES = ["memorised pictures", "replication", "CFG schedule", "attraction basin", "dynamic guidance"]
    CATEGORY = "membrane/memorisation"
    EXPERIMENTAL = True
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model to sample with; the one that came in stays as it is.",)
    FUNCTION = "mitigate"

    @classmethod
    def INPUT_TYPES(cls):
        return labelled({
            "required": {
                "model": inputs.model("The model; put LoRAs, IP-Adapters and erasures before this node."),
                "method": inputs.choice(
                    METHODS, DYNAMIC, "dynamic: guidance 1 until the text's pull first grows again, told for each "
                    "picture. delayed: scale_before until a point. opposite: guidance -2 for the first 35 %. token "
                    "re-weighting: attention without padding and with a stronger start token.",
                ),
                "strength": inputs.number(
                    1.0, 0.0, 1.0, 0.01, "1 is as published, 0 leaves the model as it is.", round=0.0001
                ),
                "scale_before": inputs.number(
                    0.0, -30.0, 30.0, 0.1, "delayed guidance: the CFG scale before the point; 0 is the negative prompt "
                    "alone. Published: 0.", round=0.0001,
                ),
                "until": inputs.number(
                    0.5, 0.0, 1.0, 0.01, "delayed guidance: the point, as a part of the schedule like start_percent of "
                    "other nodes; 0.5 is timestep 500 of 1000. Published: 0.5, for strongly memorised sets 0.3 to 0.4.",
                    round=0.0001,
                ),
                "start_token": inputs.number(
                    1.25, 0.0, 10.0, 0.05, "token re-weighting: factor on the start token's attention logits. "
                    "Published: 1.1 to 1.5.", round=0.0001,
                ),
            },
        })  # fmt: skip

    def mitigate(self, model, method, strength, scale_before, until, start_token):
        if method == DYNAMIC:
            return (switch_guidance(model, PUBLISHED_DYNAMIC, None, strength),)
        if method == DELAYED:
            return (switch_guidance(model, scale_before, until, strength),)
        if method == OPPOSITE:
            return (switch_guidance(model, *PUBLISHED_OPPOSITE, strength),)
        if method == TOKENS:
            return (reweight_tokens(model, start_token, strength),)
        raise ErasureError(f'There is no method "{method}"; choose one of: {", ".join(METHODS)}.')


NODES = [MembraneMitigateMemorization]
