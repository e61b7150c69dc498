"""What the pack's page elements ask the host, answered from the headers of files in the model folder.

GET /membrane/adapter?name=... says what an adapter's file is; POST /membrane/openings {"stack_json": ..., "text":
...} says which rows of a stack open by the words of a prompt; GET /membrane/report?filename=...&subfolder=... is the
page of an evaluation in the output folder. POST /membrane/words {"concepts": ..., "surrogate": ..., "preserve": ...,
"templates": ..., "kind": ...}, each of which may be left out, says what is wrong with words while they are written, in
the sentences of a run. No model is loaded and nothing outside these two folders read. POST
/membrane/upload?name=... writes its body as a new adapter of that name, see files/uploads.py; nothing else is written.
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
from ...text.captions import captions_of, templates_of
from ...text.concepts import parse_concepts, parse_preserved, remarks
from ..files.folders import adapter_path
from ..files.reports import report_path
from ..files.uploads import receive

LARGEST = 1 << 20  # bytes of a request
MOST = 2000  # rows of a stack
BYTES = "application/octet-stream"
WORDS = ("concepts", "surrogate", "preserve", "templates", "kind")
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
        server.routes.post("/membrane/words")(_answering(words))
        server.routes.post("/membrane/upload")(_answering(upload))


async def adapter(request):
    """What one file says about itself."""
    name = request.query.get("name", "")
    return await asyncio.to_thread(_information, name)


async def openings(request):
    """How each row of a stack opens by the words of a text."""
    asked = await _asked(request, "The stack and the prompt are")
    try:
        text, stack_json = asked["text"], asked["stack_json"]
    except (KeyError, TypeError):
        text = stack_json = None
    if not isinstance(text, str) or not isinstance(stack_json, str):
        raise ErasureError('The request holds no text and stack; expected {"stack_json": "...", "text": "..."}.')
    return await asyncio.to_thread(_openings, stack_json, text)


async def words(request):
    """What is wrong with words, as far as they tell by themselves."""
    asked = await _asked(request, "The words are")
    if not isinstance(asked, dict) or not all(isinstance(asked.get(name, ""), str) for name in WORDS):
        raise ErasureError('The request holds no words; expected {"concepts": "...", "preserve": "..."}.')
    return {"hints": await asyncio.to_thread(_hints, *(asked.get(name, "") for name in WORDS))}


async def _asked(request, what):
    """The JSON of a request, None for what is none; raises ErasureError for one that is too large."""
    refusal = ErasureError(f"{what} larger than {LARGEST} bytes; shorten them.")
    if (request.content_length or 0) > LARGEST:
        raise refusal
    data = bytearray()
    async for piece in request.content.iter_chunked(1 << 16):
        data += piece
        if len(data) > LARGEST:
            raise refusal
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


async def upload(request):
    """Takes a new adapter's file."""
    if request.headers.get("Content-Type") != BYTES:  # which no form of another site can send
        raise ErasureError(f"The request holds no file; expected its bytes, as {BYTES}.")
    name = request.query.get("name", "")
    await receive(name, request.content.iter_chunked(1 << 20))
    return {"name": name}


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


def _hints(concepts, surrogate, preserve, templates, kind):
    """[{"level": "error" or "warning", "text"}] of words; a box that is still empty is no mistake."""
    found = []
    try:
        surrogate = surrogate.strip() or (captions_of(kind).surrogate if kind else "")
        parsed = parse_concepts(concepts, surrogate) if concepts.strip() else []
        found += [{"level": "warning", "text": text} for text in remarks(parsed, parse_preserved(preserve))]
        templates_of(templates)
    except ErasureError as error:
        found.insert(0, {"level": "error", "text": str(error)})
    return found


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
