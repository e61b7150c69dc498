"""Which prompts are sampled in one batch, and their conditionings as one.

A conditioning is the host's: a list of [text vectors (1, T, d), options], one for most prompts. Some options are
tensors with a row for each row of text, such as the pooled vector or the attention mask of a language model.
"""

import torch

# samplers whose pictures do not depend on what else is in the batch: they draw no noise and choose no step sizes
BATCHED = frozenset(
    "euler heun heunpp2 dpm_2 lms dpm_fast dpmpp_2m ipndm ipndm_v deis res_multistep gradient_estimation exp_heun_2_x0 "
    "ddim uni_pc uni_pc_bh2 euler_cfg_pp dpmpp_2m_cfg_pp res_multistep_cfg_pp gradient_estimation_cfg_pp".split()
)


def fitting(conditionings):
    """[[index]] of conditionings that join() can make one of, in the order of their first."""
    groups = {}
    for i, found in enumerate(conditionings):
        kind = _kind(found)
        groups.setdefault(("alone", i) if kind is None else kind, []).append(i)
    return list(groups.values())


def batches(conditionings, seeds, size, sampler):
    """[[(index of the conditioning, seed)]] of at most `size` rows which fit together; one row each for samplers that
    draw noise of their own."""
    size = size if sampler in BATCHED else 1
    groups = [[(i, seed) for i in group for seed in seeds] for group in fitting(conditionings)]
    return [rows[at : at + size] for rows in groups for at in range(0, len(rows), size)]


def join(conditionings):
    """One CONDITIONING of several that fit, with their rows one after the other: text and every option with rows."""
    if all(found is conditionings[0] for found in conditionings):
        return conditionings[0]
    parts = [found[0] for found in conditionings]
    options = dict(parts[0][1])
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = torch.cat([rest[name] for _, rest in parts])
    return [[torch.cat([vectors for vectors, _ in parts]), options]]


def _kind(found):
    """What two conditionings must have in common to be joined; None for one that fits no other."""
    (vectors, options), *more = found
    if more:
        return None
    rest = []
    for name, value in sorted(options.items()):
        if not isinstance(value, torch.Tensor):
            rest.append((name, value if isinstance(value, int | float | str | None) else id(value)))
        elif value.dim() and len(value) == len(vectors):
            rest.append((name, value.shape[1:]))
        else:
            return None  # whose rows these are is not known
    return vectors.shape[1:], tuple(rest)
