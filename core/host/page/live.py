"""What each row of a stack editor gets while a model samples, sent to the page and written to the log.

Once per conditioning, when the host prepares it; nothing happens per step and nothing waits for a device.
"""

import logging

from server import PromptServer

from ...adapters.row_openings import row_openings
from ...adapters.stack_json import Row

log = logging.getLogger("membrane")

EVENT = "membrane.gates"
LIMIT = 1000  # rows in an event
SHOWN = 12  # rows in a line of the log


def publish(stack, concepts, score, prompt_type, run):
    """Sends the openings of a conditioning to the editors its stack came from.

    concepts, score: as for row_openings(); prompt_type: the host's "positive" or "negative"; run: a dict that lives
    as long as one sampling, in which the openings of its prompts so far are kept.
    """
    if not any(isinstance(entry, Row) for entry in stack.entries):
        return
    known = run.setdefault("openings", {})
    negative = prompt_type == "negative"
    side = "negative" if negative else "positive"
    found = row_openings(stack, concepts, score, known.get("positive", []) if negative else None)
    if not found:
        return
    known[side] = _stronger(known.get(side, []), found)
    shown = ", ".join(f"{opening.row.adapter.describe()} {opening.value:.3g}" for opening in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    log.info("Membrane: for the %s prompt open: %s%s", side, shown, more)
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        for node, message in messages(known).items():
            server.send_sync(EVENT, {"node": node, **message}, server.client_id)


def messages(known):
    """{editor: {"positive": [[row, adapter, value], ...], "negative": [...]}} of the openings of a sampling."""
    editors = {}
    for side, found in known.items():
        for opening in found[:LIMIT]:
            row = opening.row
            sides = editors.setdefault(row.node, {"positive": [], "negative": []})
            sides[side].append([row.index, row.adapter.name, round(opening.value, 4)])
    return editors


def _stronger(before, found):
    """Of several prompts of one side, such as those of regions, the one that opens a row most counts."""
    best = {id(opening.row): opening for opening in before}
    for opening in found:
        old = best.get(id(opening.row))
        if old is None or abs(opening.value) > abs(old.value):
            best[id(opening.row)] = opening
    return list(best.values())
