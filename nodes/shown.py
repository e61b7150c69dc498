"""What a node shows on the page beside its outputs."""


def part(title, lines=(), links=(), warning=False):
    """A part of a node that the page draws under its widgets, all of it plain text.

    title: one line; lines: a text, or its lines; links: (label, address) pairs.
    """
    lines = lines.splitlines() if isinstance(lines, str) else list(lines)
    addresses = [{"label": label, "url": url} for label, url in links]
    return {"title": title, "level": "warning" if warning else "info", "lines": lines, "links": addresses}


def shown(result, *parts, **ui):
    """A node's outputs with the parts that the page draws; ui: what else the host gets, {name: list}."""
    return {"ui": {**ui, "membrane": list(parts)}, "result": tuple(result)}
