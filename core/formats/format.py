"""What every file format of adapters can be asked."""

from collections.abc import Callable
from dataclasses import dataclass

from ..adapters.adapter import Card, ErasureAdapter
from .containers import Contents


@dataclass(frozen=True)
class Format:
    """One way to keep an adapter in a file. A format is a module with such a record, registered in one line.

    name: what people call it. recognises: whether a file has this format, by its keys and metadata alone. parse: the
    adapter; raises ErasureError for a damaged file. card: what the file says about itself, without its numbers: the
    tensors have shapes only; raises ErasureError where that is damaged. save: writes an adapter to a path, whole or
    not at all; None for a format that is only read, or written with the help of a model. declared: whether the
    metadata names the format; for all others the look-alikes of refused.py are looked for first.
    """

    name: str
    recognises: Callable[[Contents], bool]
    parse: Callable[[Contents], ErasureAdapter]
    card: Callable[[Contents], Card]
    save: Callable[[ErasureAdapter, str], None] | None = None
    declared: bool = False
