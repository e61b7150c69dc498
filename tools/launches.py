"""What a step of a network asks of its device, counted where there is none: kernels, copies and waits.

A network is moved to torch's "meta" device, which has shapes but no numbers. So everything that would have to cross
from the processor to a graphics card, or wait for one, can be told from what would not, on any machine.
"""

import contextlib
import sys
from collections import Counter

import torch
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2")
GATES = "membrane_gates"
NO_KERNEL = (
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
)


class Launches:
    """Counts, inside `with`, by names of operators: `kernels` on the meta device, `copies` to it, `waits` for it.

    An operator that reads tensors of two devices copies one of them, and so does an index that is a list of numbers.
    Views are no kernels.
    """

    def __init__(self):
        self.kernels, self.copies, self.waits = Counter(), Counter(), Counter()
        self.modes = _Operators(self), _Sequences(self)

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def totals(self):
        """{"kernels", "copies", "waits": number}."""
        return {kind: getattr(self, kind).total() for kind in ("kernels", "copies", "waits")}


class _Operators(TorchDispatchMode):
    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, target = func.overloadpacket.__name__, torch.device(kwargs.get("device") or META)
        on = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and _stored(x)}
        if META.type not in on:
            if "device" in kwargs and target == META and name not in NO_KERNEL:
                (self.counted.copies if name == "_to_copy" else self.counted.kernels)[name] += 1
            return func(*args, **kwargs)
        back = target != META
        if name in WAITS or back or (name.startswith("index") and _by_mask(args)):
            self.counted.waits[name] += 1
        elif len(on) > 1:
            self.counted.copies[name] += 1
        elif not func.is_view and name not in NO_KERNEL:
            self.counted.kernels[name] += 1
        # there are no numbers to hand out
        if name == "_local_scalar_dense":
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        if name == "_to_copy" and back:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        return func(*args, **kwargs)


def _stored(x):
    """Whether a tensor is one that would be copied: a number of no dimensions on the processor is an argument."""
    return x.device != torch.device("cpu") or x.dim() > 0


def _by_mask(args):
    """Whether an index is a mask, of which the device has to say how many it marks."""
    return any(x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor))


class _Sequences(TorchFunctionMode):
    """Sees what no operator shows: torch makes a tensor of a list on the processor and copies it."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if args[0].device == META and any(isinstance(place, (list, range)) for place in places):
                self.counted.copies["list as index"] += 1
        elif name in ("tensor", "as_tensor") and torch.device(kwargs.get("device") or "cpu") == META:
            self.counted.copies[name] += 1
        return func(*args, **kwargs)


def sides(model, texts, pictures=1, device=META):
    """What the host makes of a positive and a negative text for a MODEL, as a call of the network gets it: {name:
    tensor}, the rows of the positive first.

    texts: what `extra_conds` gets of each, {"cross_attn": (1, T, d), ...}; pictures: number of rows of each side;
    device: what the host says that it samples on.
    """
    noise, prepared = torch.zeros(1, 4, 8, 8), []
    for side, text in zip(("positive", "negative"), texts):
        prepared.append(model.model.extra_conds(**text, noise=noise, prompt_type=side, device=device))
    found = {}
    for name in prepared[0]:
        each = [side[name].process_cond(batch_size=pictures, device=device, area=None) for side in prepared]
        found[name] = each[0].concat(each[1:])
    return found


def moved(call, device):
    """A call of sides() with its tensors on a device, but for the gates, which a step gets on the processor."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and name != GATES else value
        for name, value in call.items()
    }


def on_meta(model, latent, call):
    """The Launches of the third step of a loaded MODEL on the meta device: what is made once is there by then. Its
    weights are lost. latent: (C, ...); call: see sides()."""
    model.model.to(META)
    rows = max(len(value) for value in call.values() if isinstance(value, torch.Tensor))
    x, t = torch.zeros(rows, *latent, device=META), torch.full((rows,), 0.5, device=META)
    try:
        for _ in range(3):
            # a mask marks everything: there are no numbers to tell how much
            with Launches() as counted, torch.no_grad(), _config.patch(meta_nonzero_assume_all_nonzero=True):
                model.model.apply_model(x, t, transformer_options={}, **moved(call, META))
    finally:
        model.model.to_empty(device="cpu")  # so that the host can unload it
    return counted


@contextlib.contextmanager
def plain_attention():
    """While it lasts, the host takes torch's own attention, as on a graphics card; that for small memories asks the
    device how much is free."""
    import comfy.ldm.modules.attention as attention

    names = ("optimized_attention", "optimized_attention_masked")
    networks = [module for name, module in sys.modules.items() if name.startswith("comfy.ldm.")]
    before = [(module, name, getattr(module, name)) for module in networks for name in names if hasattr(module, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, attention.attention_pytorch)
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)
