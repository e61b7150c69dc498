"""What the pack's page elements ask the host: read-only, answered from the headers of files in the model folder.

GET /membrane/adapter?name=... says what an adapter's file is; POST /membrane/openings {"stack_json": ..., "text":
...} says which rows of a stack open by the words of a prompt; GET /membrane/report?filename=...&subfolder=... is the
page of an evaluation in the output folder. No model is loaded and nothing outside these two folders read.
"""

import asyncio
import functools
import json
from pathlib import Path

from server import PromptServer, web

from ...adapters.adapter import ErasureAdapter
from ...adapters.gates import openings_by_words
from ...adapters.stack_json import count, from_json
from ...errors import ErasureError
from ...formats.labels import label
from ..files.folders import adapter_path
from ..files.reports import report_path

LARGEST = 1 << 20  # bytes of a request
MOST = 2000  # rows of a stack
ALONE = {  # of a page that may show itself and nothing else: it runs no script and reads nothing of the host
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


def register():
    """Adds the routes to the host's server, where there is one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/membrane/adapter")(_answering(adapter))
        server.routes.post("/membrane/openings")(_answering(openings))
        server.routes.get("/membrane/report")(report)


async def adapter(request):
    """What one file says about itself."""
    name = request.query.get("name", "")
    return await asyncio.to_thread(_information, name)


async def openings(request):
    """How each row of a stack opens by the words of a text."""
    if (request.content_length or 0) > LARGEST:
        raise ErasureError(f"The stack and the prompt are larger than {LARGEST} bytes; shorten them.")
    data = bytearray()
    async for piece in request.content.iter_chunked(1 << 16):
        data += piece
        if len(data) > LARGEST:
            raise ErasureError(f"The stack and the prompt are larger than {LARGEST} bytes; shorten them.")
    try:
        asked = json.loads(data)
        text, stack_json = asked["text"], asked["stack_json"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = stack_json = None
    if not isinstance(text, str) or not isinstance(stack_json, str):
        raise ErasureError('The request holds no text and stack; expected {"stack_json": "...", "text": "..."}.')
    return await asyncio.to_thread(_openings, stack_json, text)


async def report(request):
    """The page of an evaluation, as a page."""
    try:
        path = report_path(request.query.get("filename", ""), request.query.get("subfolder", ""))
        text = await asyncio.to_thread(Path(path).read_text, encoding="utf-8", errors="replace")
    except ErasureError as error:
        return web.Response(text=str(error), status=404)
    return web.Response(text=text, content_type="text/html", headers=ALONE)


def _answering(ask):
    """A handler that answers in JSON, a user's mistake as {"error": its sentence}."""

    async def handler(request):
        try:
            return web.json_response(await ask(request))
        except ErasureError as error:
            return web.json_response({"error": str(error)}, status=400)

    return handler


def _information(name):
    found = label(adapter_path(name))
    card = found.card
    return {
        "name": name,
        "method": card.method,
        "concepts": list(card.concepts),
        "surrogates": list(card.surrogates),
        "family": found.family,
        "licence": found.licence,
        "size": found.size,
    }


def _openings(stack_json, text):
    @functools.cache
    def card_only(name):
        return ErasureAdapter(label(adapter_path(name)).card, name=name)

    rows = count(stack_json)  # before any file is opened
    if rows > MOST:
        raise ErasureError(f"The stack has {rows} rows; expected at most {MOST}, take some out.")
    stack = from_json(stack_json, card_only, "")
    return {
        "rows": [
            {"index": row.index, "adapter": row.adapter.describe(), "mode": row.mode, "value": round(value, 4)}
            for row, value in ((stack.entries[n], v) for n, v in openings_by_words(stack, text).items())
        ]
    }
