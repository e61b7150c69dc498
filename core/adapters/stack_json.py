"""An erasure stack as JSON text: what the stack editor keeps, and what people share.

{"membrane_stack": 1, "entries": [{"adapter": "star.safetensors", "enabled": true, "strength": 1.0,
  "start_percent": 0.0, "end_percent": 1.0, "permeability": {"mode": "automatic", "factor": 1.0, "threshold": 0.0,
  "negative": "same as positive", "top_k": 1}}]}; only "adapter" must be there.

Words may stand in the place of an adapter: {"words": "star -> circle", "keep": "heart", "kind": "object", ...}; only
"words" must be there. They are computed when the stack is applied, see written.py.
"""

import json
from dataclasses import asdict, dataclass, field, fields

from ..errors import ErasureError
from .permeability import Permeability
from .stack import Entry, ErasureStack
from .written import Written

VERSION = 1
NUMBERS = ("strength", "start_percent", "end_percent")
DIGITS = 15
SHARED = ("enabled", *NUMBERS, "permeability")
WORDS = ("words", "keep", "kind")


@dataclass(frozen=True)
class Row(Entry):
    """An entry that remembers which row of which editor it came from, so that the row can show what it does.

    node: the host's id of the editor; index: of the row, from 0. Neither counts when entries are compared.
    """

    node: str = field(default="", compare=False)
    index: int = field(default=0, compare=False)


def to_json(stack):
    """The stack as text, one entry a line; raises ErasureError for adapters that are not in a file."""
    lines = []
    for entry in stack.entries:
        if not (entry.adapter.name or isinstance(entry.adapter, Written)):
            raise ErasureError(
                f"The adapter {entry.adapter.describe()} was computed in the graph and is in no file yet; "
                "save it with Save Erasure Adapter and load it from there."
            )
        spec = {**_named(entry.adapter), "enabled": entry.enabled}
        spec |= {name: getattr(entry, name) for name in NUMBERS} | {"permeability": asdict(entry.permeability)}
        lines.append(json.dumps(spec))
    inside = ",".join(f"\n  {line}" for line in lines)
    return f'{{"membrane_stack": {VERSION}, "entries": [{inside}\n]}}'


def _named(adapter):
    if isinstance(adapter, Written):
        return {name: value for name in WORDS if (value := getattr(adapter, name)) or name == "words"}
    return {"adapter": adapter.name}


def names(text):
    """Names of the adapters' files in a stack text, in order."""
    return [spec["adapter"] for spec in _entries(text) if "adapter" in spec]


def count(text):
    """How many entries a stack text has."""
    return len(_entries(text))


def from_json(text, load, node=None):
    """The stack of a text; load: adapter name -> ErasureAdapter. Empty text is an empty stack.

    node: id of the editor that holds the text, whose entries are then Rows. Raises ErasureError for text that is not
    such a stack, naming the entry and the field.
    """
    return ErasureStack(tuple(_entry(i, spec, load, node) for i, spec in enumerate(_entries(text), 1)))


def _entries(text):
    if not text.strip():
        return []
    try:
        stack = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise ErasureError(
            f"The stack is not valid JSON ({error}); correct it there or undo the last change."
        ) from error
    version = stack.get("membrane_stack") if isinstance(stack, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ErasureError(
            'The stack text lacks "membrane_stack"; expected {"membrane_stack": 1, "entries": [...]}, '
            "as the stack editor writes it."
        )
    if version > VERSION:
        raise ErasureError(f"The stack is of version {version}, and this pack reads up to {VERSION}; update Membrane.")
    entries = stack.get("entries", [])
    if not isinstance(entries, list):
        raise ErasureError('The "entries" of the stack are no list; expected [{"adapter": "name"}, ...].')
    for i, spec in enumerate(entries, 1):
        _require_named(i, spec)
    return entries


def _require_named(i, spec):
    """Raises ErasureError for an entry that is neither a file nor words, or both, and for fields it cannot have."""
    where = f"Entry {i} of the stack"
    words = isinstance(spec, dict) and "words" in spec
    if words and "adapter" in spec:
        raise ErasureError(f'{where} has both "adapter" and "words"; leave out one of the two.')
    if not isinstance(spec, dict) or not isinstance(spec.get("words" if words else "adapter"), str):
        raise ErasureError(f'{where} names no adapter; expected {{"adapter": "name", ...}}.')
    _require_known(where, spec, (*WORDS, *SHARED) if words else ("adapter", *SHARED))


def _whole(digits):
    """A whole number that numbers of other types can hold too."""
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _entry(i, spec, load, node):
    where = f"Entry {i} of the stack ({spec['adapter'] if 'adapter' in spec else 'words'})"
    enabled = spec.get("enabled", True)
    if not isinstance(enabled, bool):
        raise ErasureError(f'{where} has "enabled": {enabled!r}; expected true or false.')
    numbers = {name: spec[name] for name in NUMBERS if name in spec}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ErasureError(f'{where} has "{name}": {value!r}; expected a number.')
    permeability = spec.get("permeability", {})
    if not isinstance(permeability, dict):
        raise ErasureError(f'{where} has "permeability": {permeability!r}; expected {{"mode": ..., ...}}.')
    _require_known(
        f"The permeability of {where[0].lower()}{where[1:]}", permeability, [f.name for f in fields(Permeability)]
    )
    adapter = load(spec["adapter"]) if "adapter" in spec else _written(where, spec)
    try:
        settings = {**numbers, "permeability": Permeability(**permeability), "enabled": enabled}
        return Entry(adapter, **settings) if node is None else Row(adapter, **settings, node=node, index=i - 1)
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error


def _written(where, spec):
    given = {name: spec[name] for name in WORDS if name in spec}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ErasureError(f'{where} has "{name}": {value!r}; expected a text.')
    try:
        return Written.of(**given)
    except ErasureError as error:
        raise ErasureError(f"{where}: {error}") from error


def _require_known(where, spec, known):
    unknown = [name for name in spec if name not in known]
    if unknown:
        raise ErasureError(f'{where} has the field "{unknown[0]}"; expected only {", ".join(known)}.')
