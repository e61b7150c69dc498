"""The instructions inside a PyTorch file, looked through before PyTorch follows them.

Weights-only loading runs no program, but its few instructions can still name functions that take any amount of memory,
and build values of a few bytes that fill it when they are compared or printed. A file of weights has neither.
"""

import os
import re
import zipfile

import torch

from ..errors import ErasureError

# what torch.save needs for tensors in dictionaries
CALLED = frozenset(
    "collections.OrderedDict collections.Counter torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 "
    "torch._utils._rebuild_parameter torch._utils._rebuild_sparse_tensor torch._utils._rebuild_meta_tensor_no_storage "
    "torch.serialization._get_layout torch.Size torch.device builtins.set __builtin__.set "
    "builtins.complex __builtin__.complex".split()
)
NAMED = re.compile(r"torch\.(\w+Storage|storage\.UntypedStorage|b?float\d\w*|u?int\d+|complex\d+|bool)$")
REPEATED = 10**6  # values more than the file has that its instructions may stand for
COUNTED = 2**62

# code: how many bytes of argument follow, values taken off the stack, values put on it
PLAIN = {
    b"N": (0, 0), b"\x88": (0, 0), b"\x89": (0, 0), b"J": (4, 0), b"K": (1, 0), b"M": (2, 0), b"G": (8, 0),
    b")": (0, 0), b"]": (0, 0), b"}": (0, 0), b"\x8f": (0, 0), b"\x85": (0, 1), b"\x86": (0, 2), b"\x87": (0, 3),
    b"Q": (0, 1),
}  # fmt: skip
TEXTS = {b"X": 4, b"U": 1, b"\x8a": 1}  # size of the length before it
GET, PUT = {b"h": 1, b"j": 4}, {b"q": 1, b"r": 4}
ADD = {b"a": 1, b"s": 2, b"b": 1}  # values added to the one below them
MARK, TUPLE, ADD_ALL, NAME, CALL, VERSION, END = b"(", b"t", (b"e", b"u"), b"c", (b"R", b"\x81"), b"\x80", b"."


class Foreign(ErasureError):
    """The instructions ask for more than weights."""


def require_weights(path, name):
    """Raises ErasureError when a PyTorch file is more than tensors, stored as they are; name: of it, for messages.

    Damaged archives raise whatever their reader does.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
    if any(one.compress_type != zipfile.ZIP_STORED for one in found) or sum(one.file_size for one in found) > size:
        raise Foreign(
            f'"{name}" is an archive that holds more than its {size} bytes (packed or overlapping parts); expected '
            "one that torch.save wrote, get it as safetensors."
        )
    reader = torch._C.PyTorchFileReader(path)  # what PyTorch itself reads it with
    if reader.has_record("constants.pkl"):
        raise Foreign(f'"{name}" is a program (TorchScript) and no file of weights; get the weights as safetensors.')
    foreign, repeats = look_through(reader.get_record("data.pkl"))
    if foreign:
        raise Foreign(
            f'"{name}" holds more than weights (it asks for the Python object {foreign}), and Membrane never '
            "runs what a file brings along; get it as safetensors, or convert it in a place you trust."
        )
    if repeats:
        raise Foreign(
            f'"{name}" holds few values that refer to each other so often that they would fill the memory; expected '
            "plain weights, get it as safetensors."
        )


def look_through(data):
    """(what it names beside weights or None, whether it stands for far more values than it has) of instructions.

    Raises ValueError, IndexError or KeyError when they are none that weights-only loading knows.
    """
    place, stack, marks, memo, count = 0, [], [], {}, 0

    def take(size):
        nonlocal place
        place += size
        if place > len(data):
            raise ValueError("it ends too early")
        return data[place - size : place]

    def pop(number):
        taken = stack[len(stack) - number :]
        if len(taken) < number or marks and len(stack) - number < marks[-1]:
            raise ValueError("it takes more values than there are")
        del stack[len(stack) - number :]
        return taken

    while (code := take(1)) != END:
        count += 1
        if code in PLAIN:
            argument, number = PLAIN[code]
            take(argument)
            stack.append(Value(pop(number)))
        elif code in TEXTS:
            stack.append(Value(weight=1 + len(take(int.from_bytes(take(TEXTS[code]), "little"))) // 8))
        elif code in PUT:
            memo[int.from_bytes(take(PUT[code]), "little")] = stack[-1]
        elif code in GET:
            stack.append(memo[int.from_bytes(take(GET[code]), "little")])
        elif code in ADD:
            added = pop(ADD[code])
            stack[-1].parts += added
        elif code == MARK:
            marks.append(len(stack))
        elif code == TUPLE or code in ADD_ALL:
            taken = pop(len(stack) - marks[-1])
            marks.pop()
            if code == TUPLE:
                stack.append(Value(taken))
            else:
                stack[-1].parts += taken
        elif code == NAME:
            end = data.index(b"\n", data.index(b"\n", place) + 1)
            full = ".".join(take(end - place).decode("utf-8").split("\n"))
            take(1)
            if full not in CALLED and not NAMED.match(full):
                return full, False
            stack.append(Value(name=full))
        elif code in CALL:
            function, arguments = pop(2)
            if function.name not in CALLED:
                return function.name or "of its own making", False
            stack.append(Value([arguments]))
        elif code == VERSION:
            take(1)
        else:
            raise ValueError(f"it has the instruction {code!r}")
    return None, Value([*stack, *memo.values()]).size() > count + len(data) + REPEATED


class Value:
    """What an instruction makes: the values it is made of, its own weight, and its name when it has one."""

    __slots__ = ("name", "parts", "weight")

    def __init__(self, parts=(), weight=1, name=None):
        self.parts, self.weight, self.name = list(parts), weight, name

    def size(self):
        """Values it stands for, counted as often as they are referred to; a value that holds itself counts as one."""
        known, stack = {}, [(self, False)]
        while stack:
            value, done = stack.pop()
            if done:
                known[id(value)] = min(COUNTED, value.weight + sum(known[id(part)] for part in value.parts))
            elif id(value) not in known:
                known[id(value)] = 1
                stack.append((value, True))
                stack += [(part, False) for part in value.parts]
        return known[id(self)]
