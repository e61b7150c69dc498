"""Where a model looks at the end token while it samples: cross-attention of the two finest layers on the way down."""

import contextlib

from ...errors import ErasureError
from ...measures.detection import end_attention
from ..model.layers import modules

FINEST = 2  # cross-attention layers on the way down whose look at the end token counts


class EndAttention:
    """Listens to the cross-attention of the two finest layers on the way down, inside `with`; nothing stays behind.

    `model` is the clone to sample with.
    """

    def __init__(self, model):
        self.model = model.clone()
        self.undo, self.queries, self.keys = contextlib.ExitStack(), {}, {}
        named = {key.removesuffix(".weight"): module for key, module in modules(model).items()}
        self.layers = [
            name for name in named if name.startswith("diffusion_model.input_blocks.") and name.endswith("attn2.to_q")
        ][:FINEST]
        if not self.layers:
            raise ErasureError(
                f"The model {type(model.model).__name__} has no cross-attention on the way down, where bright endings "
                "are seen; switch bright_ending off."
            )
        self.named, self.order = named, ()
        previous = self.model.model_options.get("model_function_wrapper")

        def called(apply_model, args):
            self.order = tuple(args["cond_or_uncond"])
            return (
                previous(apply_model, args) if previous else apply_model(args["input"], args["timestep"], **args["c"])
            )

        self.model.set_model_unet_function_wrapper(called)

    def __enter__(self):
        for name in self.layers:
            block = name.removesuffix(".to_q")
            for part, store in (("to_q", self.queries), ("to_k", self.keys)):
                hook = self.named[f"{block}.{part}"].register_forward_hook(self._keep(store, name))
                self.undo.callback(hook.remove)
        return self

    def __exit__(self, *error):
        self.undo.close()

    def _keep(self, store, name):
        def keep(module, inputs, output):
            if 0 in self.order:
                store[name] = output.detach()[self._rows(len(output))]

        return keep

    def _rows(self, count):
        """Which rows of a batch belong to the positive prompt."""
        size = count // len(self.order)
        first = self.order.index(0) * size
        return slice(first, first + size)

    def maps(self, ends, size):
        """Attention (B, h, w) to the end token of each row in the last call: the mean over heads and layers.

        ends: places of the end tokens, one a row; size: (h, w) of the latents.
        """
        seen = [(self.queries[name], self.keys[name], self._heads(name)) for name in self.layers]
        return end_attention(seen, ends, size).cpu()

    def _heads(self, name):
        return self.model.model.diffusion_model.get_submodule(
            name.removeprefix("diffusion_model.").removesuffix(".to_q")
        ).heads
