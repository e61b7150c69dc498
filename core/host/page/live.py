"""What each row of a stack editor gets while a model samples, sent to the page and written to the log.

Once per conditioning, when the host prepares it; nothing happens per step and nothing waits for a device.
"""

import logging

from server import PromptServer

from ...adapters.gates import by_entry
from ...adapters.stack_json import Row
from ..patches.conditioning import LISTENERS

log = logging.getLogger("membrane")

EVENT = "membrane.gates"
LIMIT = 1000  # rows in an event
SHOWN = 12  # rows in a line of the log


def register():
    """Tells the page from now on; a second call changes nothing."""
    if publish not in LISTENERS:
        LISTENERS.append(publish)


def publish(stack, gates, run, side):
    """Sends the openings of a sampling to the editors its stack came from.

    gates: of the stack; run: {"positive", "negative": values (rows, K) or None} of the sampling so far; side: of these,
    the one that has just become known.
    """
    sides = {name: _of_rows(stack, gates, run[name]) for name in ("positive", "negative") if run[name] is not None}
    found = sides[side]
    if not found:
        return
    shown = ", ".join(f"{row.adapter.describe()} {value:.3g}" for row, value in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    log.info("Membrane: for the %s prompt open: %s%s", side, shown, more)
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        for node, message in messages(sides).items():
            server.send_sync(EVENT, {"node": node, **message}, server.client_id)


def _of_rows(stack, gates, values):
    """[(row of an editor, its opening)] of a stack."""
    openings = ((stack.entries[number], value) for number, value in by_entry(gates, values).items())
    return [(entry, value) for entry, value in openings if isinstance(entry, Row)]


def messages(sides):
    """{editor: {"positive": [[row, adapter, value], ...], "negative": [...]}} of the openings of a sampling."""
    editors = {}
    for side, found in sides.items():
        for row, value in found[:LIMIT]:
            known = editors.setdefault(row.node, {"positive": [], "negative": []})
            known[side].append([row.index, row.adapter.name or row.adapter.describe(), round(value, 4)])
    return editors
