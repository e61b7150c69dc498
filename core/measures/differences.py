"""How much two pictures of one seed differ, in words."""

SAME = 1 / 255  # mean difference of the channels below which an eye sees nothing
BIG = 0.1  # a part of a picture that differs by more is another thing


def changed_share(before, after):
    """Part of a picture's points (H, W, 3) in [0, 1] whose colours differ by more than BIG on average, in [0, 1]."""
    return float(((after - before).abs().mean(-1) > BIG).float().mean())


def changed_lines(before, after):
    """A sentence for each pair of pictures (B, H, W, 3) in [0, 1]: the same, or how much of it changed."""
    lines = []
    for number, (one, other) in enumerate(zip(before, after), 1):
        name = "The picture" if len(before) == 1 else f"Picture {number}"
        share, mean = changed_share(one, other), float((other - one).abs().mean())
        if mean < SAME:
            lines.append(f"{name} is the same with the erasure: the prompt does not ask for what was erased.")
        else:
            lines.append(f"{name} differs in {100 * share:.0f} % of its area (mean {mean:.3f} of 1).")
    return lines
