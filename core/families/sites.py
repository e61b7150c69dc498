"""Names of the layers that adapters change, in one spelling for all programs.

A site is a layer's path in the denoiser with its dots replaced by underscores and without a prefix, such as
down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k (diffusers) or
input_blocks_1_1_transformer_blocks_0_attn2_to_k (LDM, the host's own). A model knows its layers by both.
"""

import re

# of a denoiser inside a checkpoint, a pipeline, a PEFT wrapper, or of a program's flat LoRA names
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
PARAMETERS = (".weight", ".bias")

ATTENTION = re.compile(r"(?:^|_)attn([12])_to_(q|k|v|out_0)$")
ATTENTIONS = {"1": "self_attention", "2": "cross_attention"}
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "out_0": "out"}
ENDINGS = {
    "ff_net_0_proj": "feed_forward.up",
    "ff_net_2": "feed_forward.down",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
}


def site(name):
    """The site of a layer from any program's name of it; of a site, the site itself.

    Knows LDM, diffusers, PEFT, kohya and LyCORIS names, and those of diffusers' attention processors.
    """
    for parameter in PARAMETERS:
        name = name.removesuffix(parameter)
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    name = name.replace(".processor.", ".").replace(".", "_")
    # the output of an attention is a list of a linear layer and a dropout; some programs name only the list
    return name + "_0" if name.endswith("_to_out") else name


def group(site):
    """What a layer does: self_attention or cross_attention .query, .key, .value or .out, feed_forward.up or .down,
    proj_in, proj_out, or other."""
    found = ATTENTION.search(site)
    if found:
        return f"{ATTENTIONS[found[1]]}.{PROJECTIONS[found[2]]}"
    return next((name for ending, name in ENDINGS.items() if f"_{site}".endswith(f"_{ending}")), "other")
