"""Names of the layers that adapters change, in one spelling for all programs.

A site is a layer's path in the denoiser with its dots replaced by underscores and without a prefix, such as
down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k (diffusers) or
input_blocks_1_1_transformer_blocks_0_attn2_to_k (LDM, the host's own). A model knows its layers by both.
"""

# of a denoiser inside a checkpoint, a pipeline, a PEFT wrapper, or of a program's flat LoRA names
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "lora_unet__",  # Wan Fun
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
PARAMETERS = (".weight", ".bias")


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
