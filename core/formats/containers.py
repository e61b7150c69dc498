"""What a file holds, whoever wrote it: tensors by name and a map of strings. Nothing in a file is ever run."""

import os
import re
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ErasureError
from .instructions import Foreign, require_weights

SAFETENSORS, TORCH = "safetensors", "PyTorch"
ZIP, LFS_POINTER = b"PK\x03\x04", b"version https://git-lfs"
WEB_PAGES = (b"<!doctype html", b"<html")
JSON = re.compile(rb'\s*[{\[]\s*["{\[]')
PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.", "adapter_config.json"
LONGEST_SETTINGS = 10**6  # bytes
OUTER = ("state_dict", "model")  # outer keys that are no part of a tensor's name
DEPTH = 4  # of nested dictionaries; published files have two
PACKED = getattr(torch, "float4_e2m1fn_x2", object())
LONGEST = 1000  # characters of a tensor's name
SHARED = 8  # times a PyTorch file's size that its tensors may have together, as they may share their numbers

# Mapped files only, which excludes the layouts before PyTorch 1.6: releases up to 2.5 ran code in those in spite of
# weights_only (CVE-2025-32434).
load_weights_only = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)


@dataclass(frozen=True, eq=False)
class Contents:
    """A file's tensors and metadata.

    tensors: {name: tensor} on the CPU, still in the file where possible; names of nested dictionaries are joined by
    dots, tensors of a list have the names "0", "1" and so on. metadata: safetensors' map of strings. outer: the keys
    of a PyTorch file that hold dictionaries; listed: whether it is one list of tensors. settings: text of the JSON that
    PEFT keeps beside its files, "" where there is none.
    """

    name: str  # of the file, for messages
    container: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    outer: frozenset[str] = frozenset()
    listed: bool = False
    settings: str = ""

    def __post_init__(self):
        longest = max(self.tensors, key=len, default="")
        if len(longest) > LONGEST:
            raise ErasureError(
                f'"{self.name}" names a tensor with {len(longest)} characters ({longest[:40]}...); expected at most '
                f"{LONGEST}, the file is damaged or no adapter."
            )
        packed = next((key for key, tensor in self.tensors.items() if tensor.dtype == PACKED), None)
        if packed:
            raise ErasureError(
                f'"{self.name}" holds {packed} as {str(PACKED).removeprefix("torch.")}, two numbers in a byte, which '
                "nothing can be computed with; get a file that is not quantised."
            )

    def some(self):
        """A few of the names, for messages."""
        return ", ".join(sorted(self.tensors)[:3]) or "nothing"


def read(path):
    """Contents of a safetensors or PyTorch file, told apart by its first bytes, with PEFT's settings beside it.

    Raises ErasureError for every other file, a damaged one, and one that is more than tensors.
    """
    name = os.path.basename(path)
    found = _read_torch(path, name) if is_torch(path) else _read_safetensors(path, name)
    return replace(found, settings=_settings_beside(path))


def is_torch(path):
    """Whether a file is PyTorch's and not safetensors'; raises ErasureError for what is neither by its first bytes."""
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ErasureError(f'"{name}" cannot be read ({error}); check the file or choose another one.') from error
    if not head:
        raise ErasureError(f'"{name}" cannot be read, it is empty (0 bytes); download or save it again.')
    if head.startswith(LFS_POINTER):
        raise ErasureError(
            f'"{name}" is a Git LFS pointer, a few lines of text in place of the weights; download the file itself '
            '(about as large as its page says), or run "git lfs pull" in its folder.'
        )
    if head.lstrip().lower().startswith(WEB_PAGES):
        raise ErasureError(
            f'"{name}" is a web page in place of the weights, as it comes where a login or another address is needed; '
            "download the file itself, by the download button of its page."
        )
    if JSON.match(head) and b"\0" not in head:  # a header's length, 8 bytes, has zeros
        text = " ".join(head.decode("utf-8", "replace").split())
        raise ErasureError(
            f'"{name}" is text (JSON) in place of the weights, as servers answer where a login or another address is '
            f"needed ({text}); download the file itself."
        )
    return head.startswith(ZIP)


def _settings_beside(path):
    """Text of PEFT's settings beside a file of the name that PEFT gives to weights; "" without."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, PEFT_SETTINGS)
    if not name.startswith(PEFT_WEIGHTS) or not os.path.isfile(beside) or os.path.getsize(beside) > LONGEST_SETTINGS:
        return ""
    with open(beside, encoding="utf-8", errors="replace") as file:
        return file.read()


def _read_safetensors(path, name):
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return Contents(name, SAFETENSORS, tensors, file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, TypeError, OverflowError) as error:
        raise ErasureError(
            f'"{name}" cannot be read as a safetensors file, nor is it a PyTorch file of version 1.6 or later '
            f"({_first_line(error)}); download or save it again."
        ) from error


def _read_torch(path, name):
    try:
        require_weights(path, name)
        found = load_weights_only(path)
    except Foreign:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        raise ErasureError(
            f'"{name}" cannot be read as a PyTorch file ({_first_line(error)}); download it again, best as safetensors.'
        ) from error
    listed = isinstance(found, list) and bool(found) and all(isinstance(value, torch.Tensor) for value in found)
    if isinstance(found, torch.Tensor):
        found = {"tensor": found}
    elif listed:
        found = {str(number): value for number, value in enumerate(found)}
    if not isinstance(found, dict):
        raise ErasureError(
            f'"{name}" holds one {type(found).__name__}; expected a dictionary of weights, choose another file.'
        )
    tensors, size, total = dict(_flat(found, set())), os.path.getsize(path), 0
    for key, tensor in tensors.items():
        # a view may claim any size, and every check of its numbers would then fill the memory
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        stored = plain and tensor.nbytes <= tensor.untyped_storage().nbytes() <= size
        total += tensor.nbytes if stored else 0
        if not stored or total > SHARED * size:
            raise ErasureError(
                f'"{name}" holds {key} without a stored number for each of its elements; expected plain tensors, get '
                "it as safetensors."
            )
    outer = frozenset(key for key, value in found.items() if isinstance(value, dict))
    return Contents(name, TORCH, tensors, outer=outer, listed=listed)


def _flat(mapping, seen, prefix="", depth=1):
    """(name, tensor) of the tensors in nested dictionaries; a dictionary that holds itself is visited once."""
    seen.add(id(mapping))
    for key, value in mapping.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, torch.Tensor):
            yield prefix + key, value.detach()
        elif isinstance(value, dict) and id(value) not in seen and depth < DEPTH:
            yield from _flat(value, seen, prefix if key in OUTER else f"{prefix}{key}.", depth + 1)


def _first_line(error):
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
