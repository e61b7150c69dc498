"""A coverage-guided fuzzer for everything that reads what others wrote. Needs torch and safetensors, no host.

    python -m tools.check.fuzz [--seconds 10] [--inputs N] [--seed 0] [parser ...]

Each parser starts with valid inputs. An input that takes a branch of the parser's code not taken before is kept and
changed further. Whatever a parser makes of an input has to be a result or one ErasureError, within LONGEST seconds.
"""

import argparse
import dis
import importlib
import importlib.util
import inspect
import io
import json
import random
import struct
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.deltas.low_rank import LowRank
from membrane.core.adapters.deltas.mask import Mask
from membrane.core.adapters.deltas.text_map import TextMap
from membrane.core.adapters.stack_json import from_json, names
from membrane.core.errors import LONGEST as LONGEST_MESSAGE
from membrane.core.errors import ErasureError
from membrane.core.formats import labels, native, registry
from membrane.core.measures.detection import Calibration
from membrane.core.measures.record import Record
from membrane.core.text import concepts, rows
from membrane.core.text.encoded import Encoded
from safetensors.torch import save

LONGEST = 2.0  # seconds an input may take, tracing included

# ---------------------------------------------------------------- coverage


class Coverage:
    """Which lines and which outcomes of conditional jumps of some functions were run.

    wanted: {module: names of functions, or () for all}. What a call runs is added inside `with`.
    """

    def __init__(self, wanted):
        self.lines, self.branches = set(), set()
        self.all_lines, self.jumps = set(), {}
        for module, functions in wanted.items():
            file = importlib.import_module(f"membrane.core.{module}").__file__
            source = Path(file).read_text(encoding="utf-8")
            self._collect(compile(source, file, "exec"), functions)

    def _collect(self, code, functions, inside=False):
        for part in code.co_consts:
            if isinstance(part, types.CodeType):
                is_function = bool(part.co_flags & inspect.CO_OPTIMIZED)
                chosen = inside or (is_function and (not functions or part.co_name in functions))
                if chosen:
                    self._add(part)
                self._collect(part, functions, chosen)

    def _add(self, code):
        where = (code.co_filename, code.co_firstlineno, code.co_name)
        self.all_lines |= {(code.co_filename, n) for *_, n in code.co_lines() if n and n != code.co_firstlineno}
        self.jumps[where] = {
            i.offset for i in dis.get_instructions(code) if "JUMP" in i.opname and "IF" in i.opname
        } | {i.offset for i in dis.get_instructions(code) if i.opname == "FOR_ITER"}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _enter(self, frame, event, argument):
        code = frame.f_code
        where = (code.co_filename, code.co_firstlineno, code.co_name)
        jumps = self.jumps.get(where)
        if jumps is None:
            return None
        frame.f_trace_opcodes = True
        last = None

        def local(frame, event, argument):
            nonlocal last
            if event == "opcode":
                now = frame.f_lasti
                if last in jumps:
                    self.branches.add((where, last, now))
                last = now
            elif event == "line":
                self.lines.add((code.co_filename, frame.f_lineno))
            return local

        return local

    @property
    def line_share(self):
        """Share of the functions' lines."""
        return len(self.lines & self.all_lines) / max(1, len(self.all_lines))

    @property
    def branch_share(self):
        """Share of the outcomes of conditional jumps, two each."""
        return len(self.branches) / max(1, 2 * sum(map(len, self.jumps.values())))


# ---------------------------------------------------------------- changes

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**400)
TYPES = (
    "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 I64 I32 I16 I8 U64 U32 U16 U8 BOOL F128".split()
)  # fmt: skip
BITS = {
    "F64": 64, "F32": 32, "C64": 64, "F4": 4, "F6_E2M3": 6, "F128": 128, "I64": 64, "U64": 64, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
}  # fmt: skip
WORDS = (
    "text_map.a text_map.b text_map.concept pooled_map.a map.t5.a map.llama.3.normed map. low_rank.x.up "
    "low_rank.x.down low_rank.x.alpha low_rank..up low_rank.x.bias mask.x.bits mask.x.shape mask.x.kept "
    "lora_unet_x.lora_up.weight lora_unet_x.lora_down.weight lora_unet_x.lora_mid.weight lora_unet_x.alpha "
    "lora_unet_x.diff_b lora_te_x.lora_up.weight unet.x.lora_A.weight unet.x.lora_B.weight unet.x.lora.down.weight "
    "unet.x.alpha base_model.model. unet.unet. x.hada_w1_a x.lokr_w1 x.dora_scale x.diff x.oft_diag attention_gate.0 "
    "lora_gloce_x layers.0.attention.to_q.lora_down.weight a.down.bias a.down.weight controlnet_x text_model.x "
    "emb_params <x> up_blocks.0.attn2.to_k.weight conv_in.weight conv_out.weight input_blocks.0.0.weight out.2.weight "
    ".weight .bias .. ../../../etc/passwd C:\\x \u2028 \ud7ff membrane.format membrane.version membrane.concepts "
    "membrane.settings erasure_adapter lora prompts rank alpha ss_leco_prompt_count ss_leco_preview "
    "lora_adapter_metadata -> {} {{}} a->a ->"
).split()  # fmt: skip
JSON = (
    '[] {} null true NaN -Infinity 1e999 "" "\\ud800" "\\u0000" [[]] {"a":[]} 1e-400 '
    '"adapter" "entries" "membrane_stack" "strength" "permeability" "mode" "factor" "top_k" "fixed" "route" "enabled" '
    '"format" "version" "probe" "scores" "settings" "rows" "unet.lora_alpha" "unet.alpha_pattern" "target" "positive" '
    '"action" "erase" "neutral" , : [ ] { }'
).split() + [str(n) for n in NUMBERS] + ["[" * 2000, '{"a":' * 2000, "9" * 5000]  # fmt: skip


def havoc(data, rng, tokens=()):
    """Bytes with a few of them flipped, removed, repeated, or replaced by numbers and tokens."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)[: rng.choice((1, 4, 8))]
        elif kind == 4 and tokens:
            token = rng.choice(tokens)
            data[at : at + (0 if rng.random() < 0.5 else size)] = (
                token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")
            )
        elif data:
            other = rng.randrange(len(data))
            data[at:at] = data[other : other + size]
    return bytes(data)


def text(data, rng):
    """A text changed at places that mean something in JSON and in lists of words."""
    if rng.random() < 0.3:
        return havoc(data, rng, JSON)
    pieces = data.decode("utf-8", "replace")
    marks = [i for i, c in enumerate(pieces) if c in ',:[]{}"\n>-'] or [0]
    for _ in range(rng.choice((1, 1, 2, 4))):
        a, b = sorted((rng.choice(marks), rng.choice(marks)))
        kind = rng.randrange(4)
        token = rng.choice(JSON) if rng.random() < 0.7 else rng.choice(WORDS)
        if kind == 0:
            pieces = pieces[:a] + token + pieces[a:]
        elif kind == 1:
            pieces = pieces[: a + 1] + token + pieces[b:]
        elif kind == 2:
            pieces = pieces[:a] + pieces[b:]
        else:
            pieces = pieces[:b] + pieces[a:b] + pieces[b:]
    return pieces[:50_000].encode("utf-8", "replace")


def pack(tensors, metadata):
    """A safetensors file of {name: (type, shape, bytes)} and a map of strings, whatever they are."""
    header, body = ({"__metadata__": metadata} if metadata is not None else {}), bytearray()
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def unpack(data):
    """What pack() takes, of a file that it made."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata, body = header.pop("__metadata__", None), data[8 + size :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}, metadata


def size_of(kind, shape):
    """Bytes that a tensor needs; 64 at most of what claims to be large."""
    count = 1
    for n in shape:
        count *= n
    bits = count * BITS.get(kind, 8)
    return bits // 8 if 0 <= bits < 2**23 else 64


def tensors(data, rng):
    """A safetensors file with other names, types, shapes, numbers or metadata; mostly one that can be opened."""
    try:
        if rng.random() < 0.1:
            return havoc(data, rng, WORDS)
        found, metadata = unpack(data)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return havoc(data, rng, WORDS)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(found) or ["x"])
        kind, shape, numbers = found.get(name, ("F32", [2, 2], bytes(16)))
        change = rng.randrange(8)
        if change == 0:
            found.pop(name, None)
        elif change == 1:
            found[rng.choice(WORDS) if rng.random() < 0.6 else name + rng.choice(WORDS)] = (kind, shape, numbers)
        elif change == 2:
            kind = rng.choice(TYPES)
            found[name] = (kind, shape, (numbers + bytes(4096))[: size_of(kind, shape)])
        elif change == 3:
            shape = [*shape]
            place = rng.randrange(len(shape) + 1)
            n = rng.choice((0, 1, 2, 3, 4, 2**31, 2**62, 2**63))
            shape = [shape[:place] + shape[place + 1 :], [*shape[:place], n, *shape[place + 1 :]], [], [n, *shape]][
                rng.randrange(4)
            ]
            found[name] = (kind, shape, (numbers + bytes(4096))[: size_of(kind, shape)])
        elif change == 4:
            filler = rng.choice((b"\x7f\xf0", b"\x00\x7c", b"\x80\x7f", b"\xff\xff", b"\x00\x00", b"\xff\x7e"))
            found[name] = (kind, shape, (filler * (len(numbers) // 2 + 1))[: len(numbers)])
        elif change == 5:
            found[name] = (kind, shape, havoc(numbers, rng)[: len(numbers)])
        elif change == 6:
            key = rng.choice([*(metadata or {}), *WORDS])
            value = (metadata or {}).get(key, "")
            changed = text(value.encode(), rng).decode("utf-8", "replace") if rng.random() < 0.7 else rng.choice(JSON)
            metadata = {**(metadata or {}), key: changed}
        elif metadata:
            metadata = {k: v for k, v in metadata.items() if k != rng.choice(list(metadata))}
    return pack(found, metadata)


CODES = [bytes([c]) for c in b".(0123cRQ)]}tesuabhjqrNKMJGX\x80\x81\x85\x86\x87\x88\x8a\x8f"] + [
    b"cos\nsystem\n", b"ctorch\nFloatTensor\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n",
    b"h\x00h\x00\x86q\x00", b"cbuiltins\nbytearray\n", b"J\xff\xff\xff\x7f", b"X\xff\xff\xff\xff",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ctorch\nfloat32\n",
]  # fmt: skip


def archive(data, rng):
    """A PyTorch file with other instructions or other bytes."""
    if rng.random() < 0.2:
        return havoc(data, rng, CODES)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            parts = {one.filename: old.read(one) for one in old.infolist()}
    except Exception:
        return havoc(data, rng, CODES)
    name = next((n for n in parts if n.endswith("data.pkl")), "x/data.pkl")
    parts[name] = havoc(parts.get(name, b"."), rng, CODES)
    if rng.random() < 0.05:
        parts[name.replace("data.pkl", "constants.pkl")] = b"\x80\x02)."
    packed = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as new:
        for part, content in parts.items():
            new.writestr(part, content)
    return buffer.getvalue()


# ---------------------------------------------------------------- parsers


@dataclass(frozen=True)
class Parser:
    """What is tried: run(bytes) with inputs that change() makes of seeds; code: what Coverage takes."""

    name: str
    code: dict
    seeds: list
    run: Callable
    change: Callable


def random_tensor(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def saved(adapter):
    """Bytes of a native file."""
    with tempfile.TemporaryDirectory() as folder:
        native.save(adapter, f"{folder}/x")
        return Path(folder, "x").read_bytes()


def torch_file(content):
    """Bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def native_seeds():
    """Native files of all kinds."""
    card = Card("UCE", ("star", "heart"), ("circle", ""), "SD15", "abc", {"epochs": 1}, "MIT")
    words = TextMap(random_tensor(4, 2), random_tensor(2, 4), (0, 1))
    layer = {"x": LowRank(random_tensor(3, 2), random_tensor(2, 4), 1.0, random_tensor(3))}
    masks = {"x": Mask.of(torch.eye(3, 4).bool(), torch.full((3, 4), 0.5))}
    return [
        saved(ErasureAdapter(card, {"map": {"text": words}})),
        saved(ErasureAdapter(card, {"map": {"text": words, "pooled": words}, "low_rank": layer})),
        saved(ErasureAdapter(card, {"mask": masks})),
        saved(ErasureAdapter(card, {"map": {"llama.3": words, "t5": replace(words, normed=True)}, "low_rank": layer})),
    ]


def lora_seeds():
    """LoRAs with kohya's names: plain, SPM's and LECO's metadata, a convolution with a core."""
    a, b = random_tensor(2, 4), random_tensor(3, 2)
    pair = {"lora_unet_x.lora_down.weight": a, "lora_unet_x.lora_up.weight": b, "lora_unet_x.alpha": torch.tensor(1.0)}
    core = {
        "lora_unet_y.lora_down.weight": random_tensor(2, 4, 1, 1),
        "lora_unet_y.lora_up.weight": b.clone(),
        "lora_unet_y.lora_mid.weight": random_tensor(2, 2, 3, 3),
        "lora_unet_y.diff_b": random_tensor(3),
    }
    leco = '[{"target": "a", "positive": "a", "neutral": "", "action": "erase"}]'
    return [
        save(pair, {"prompts": "star, heart", "rank": "2", "alpha": "1"}),
        save(pair, {"ss_leco_prompt_count": "1", "ss_leco_preview": leco}),
        save({**pair, **core, "lora_te_x.lora_up.weight": b.clone()}),
    ]


def peft_seeds():
    """LoRAs with the names of PEFT and diffusers."""
    a, b = random_tensor(2, 4), random_tensor(3, 2)
    settings = json.dumps({"unet.lora_alpha": 4, "unet.use_rslora": True, "unet.alpha_pattern": {"attn": 2}})
    name = "unet.down_blocks.0.attn2.to_k"
    return [
        save({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, {"lora_adapter_metadata": settings}),
        save({f"{name}.lora.down.weight": a, f"{name}.lora.up.weight": b, f"{name}.alpha": torch.tensor(1.0)}),
    ]


def weight_seeds():
    """Whole weights, and one of each kind that is refused."""
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{}.weight"
    starts = ("x.", "lora_gloce", "attention_gate", "a.down", "controlnet", "layers", "emb", "<", "text_model")
    refused = [word for word in WORDS if word.startswith(starts)]
    return [
        save({key.format("k"): random_tensor(4, 4), key.format("v"): random_tensor(4, 4).bfloat16()}),
        save({"conv_in.weight": random_tensor(2, 2, 3, 3), "conv_out.weight": random_tensor(2, 2, 3, 3)}),
        *(save({word: random_tensor(2, 2)}) for word in refused),
    ]


def torch_seeds():
    """Files of torch.save: a state dict, dictionaries in each other, a parameter."""
    key = "up_blocks.0.attn2.to_k.weight"
    around = {"a": random_tensor(2), "b": [2**70, -1, {1, 2}, (1, 2, 3, 4), True, None, 1j, torch.Size([1])]}
    around["c"] = around
    return [
        torch_file({key: random_tensor(4, 4)}),
        torch_file(around),
        torch_file(random_tensor(2)),
        torch_file([1]),
        torch_file({"string_to_param": {"*": random_tensor(1, 4)}, "x": random_tensor(3, 3).to_sparse()}),
        torch_file({"unet": {"mid_block": {"weight": random_tensor(2, 2)}}, "epoch": 3, "more": [1.0, "a", None]}),
        torch_file({"lora_unet_x.lora_down.weight": torch.nn.Parameter(random_tensor(1, 2)),
                    "lora_unet_x.lora_up.weight": random_tensor(2, 1).half()}),
    ]  # fmt: skip


STACK = (
    '{"membrane_stack": 1, "entries": [{"adapter": "a", "enabled": true, "strength": 0.5, "start_percent": 0.1, '
    '"end_percent": 1.0, "permeability": {"mode": "route", "factor": 1.0, "threshold": 0.1, "negative": "own", '
    '"top_k": 2}}, {"adapter": "b"}, {"words": "star -> circle", "keep": "heart", "kind": "object"}]}'
)
ROW = (
    '{"stratum": "erase", "index": 0, "prompt": "a", "label": null, "synonym": false, "seed": 1, "distance": '
    '{"pixel": 0.5}, "ceiling": {"pixel": 1.0}, "drift": [[1.0, null]]}'
)
RECORD = (
    '{"format": "membrane.evaluation", "version": 1, "configuration": {"seed": 1}, "probe": [[0.5, 1.0]], '
    f'"rows": [{ROW}], "pictures": [], "finished": true}}'
)


def concept_words(data):
    """Everything that takes a user's lines apart."""
    given = data.decode("utf-8", "surrogateescape")  # with half characters
    for parse in (concepts.parse_concepts, concepts.parse_lines, concepts.parse_preserved, concepts.parse_templates):
        try:
            found = parse(given)
        except ErasureError:
            continue
        if parse is concepts.parse_templates:
            [concepts.fill(template, given) for template in found]
        if parse is concepts.parse_concepts:
            concepts.remarks(found, given.split(), given.split())
    ids = list(data[:20])
    end = 0 if len(ids) < 3 else ids[2]
    prompt, word = (
        next(iter(Encoded.of_contexts(("",), (own,), torch.zeros(1, len(own), 1), end)))
        for own in ([1, *ids, end, end], [1, *ids[:2], end])
    )
    rows.aligned(prompt, prompt, rows.subject(prompt, word), len(ids) // 2)
    rows.counted(prompt), rows.after_start(prompt)


def parsers(folder):
    """All Parsers; folder: for the files they read, which have one name after the other."""

    path = str(Path(folder) / "fuzzed")

    def load(*readers):
        def run(data):
            Path(path).write_bytes(data)
            for reader in readers:
                try:
                    reader(path)
                except ErasureError as error:
                    complain(error)

        return run

    def stack(data):
        given = data.decode("utf-8", "replace")
        names(given)
        from_json(given, lambda name: ErasureAdapter(Card("SPM", ("star",) if name == "a" else ()), name=name), "4")

    both = load(registry.load, labels.label)
    own = {"formats.factors": ("gather", "low_rank", "_numbers", "_flat", "_alpha", "_with_core")}
    maps = ("load", "recognises", "parse", "card", "_by_layer", "_maps", "_text_map", "_check_header")
    mask = (*maps, "_require_known_kinds", "_masks", "_mask", "_mask_shape")
    lora = ("recognises", "parse", "_split", "card", "_leco_prompts")
    return [
        Parser("native", {"formats.native": mask, "formats.card": ("read_card",)}, native_seeds(), both, tensors),
        Parser("kohya", {"formats.kohya": lora, **own}, lora_seeds(), both, tensors),
        Parser("peft", {"formats.peft": ()}, peft_seeds(), both, tensors),
        Parser("weights", {"formats.weights": (), "formats.registry": ()}, [*weight_seeds(), *lora_seeds()],
               load(registry.load_weights, registry.load), tensors),
        Parser("refused", {"formats.refused": ()}, [*weight_seeds(), *peft_seeds()], both, tensors),
        Parser("labels", {"formats.labels": ()}, [*native_seeds(), *lora_seeds(), *peft_seeds(), torch_seeds()[0]],
               load(labels.label), tensors),
        Parser("PyTorch files", {"formats.containers": (), "formats.instructions": ()}, torch_seeds(),
               load(registry.load, registry.load_weights), archive),
        Parser("stack JSON",
               {"adapters.stack_json": ("names", "from_json", "_entries", "_whole", "_entry", "_require_known",
                                         "_require_named", "_written"),
                "adapters.stack": ("__post_init__",)}, [STACK.encode(), b""], stack, text),
        Parser("concepts", {"text.concepts": ()},
               [b"star -> circle\nheart\n", b"{} in a field\na photo of {}"], concept_words, text),
        Parser("calibration", {"measures.detection": ("from_json",)},
               [Calibration({"steps": 2}, (0.5, 1.0), tuple(range(30))).to_json().encode()],
               lambda data: Calibration.from_json(data.decode("utf-8", "replace"), "x.json"), text),
        Parser("evaluation record", {"measures.record": ("from_json",)}, [RECORD.encode()],
               lambda data: Record.from_json(data.decode("utf-8", "replace")), text),
    ]  # fmt: skip


def complain(error):
    """Raises AssertionError for a refusal that is not one readable sentence."""
    said = str(error)
    assert said.isprintable() or "\u3000" in said, f"not readable: {said!r}"
    assert said.endswith(".") and len(said) <= LONGEST_MESSAGE + 10, f"not a sentence: {said!r}"


# ---------------------------------------------------------------- the loop


@dataclass
class Result:
    """How it went: inputs tried, refused with a sentence, kept for the branches they took; findings: (error, input)."""

    tried: int = 0
    refused: int = 0
    kept: int = 0
    slowest: float = 0.0
    findings: list = field(default_factory=list)


def fuzz(parser, coverage, seconds=float("inf"), inputs=float("inf"), seed=0):
    """Result of trying a Parser for so many seconds or inputs, whatever comes first."""
    rng, result = random.Random(f"{parser.name} {seed}"), Result()
    corpus, waiting, end = [], list(parser.seeds), time.monotonic() + seconds
    while result.tried < inputs and time.monotonic() < end and len(result.findings) < 5:
        data = (
            waiting.pop() if waiting else parser.change(rng.choice(corpus[-40:] if rng.random() < 0.5 else corpus), rng)
        )
        before, begin = len(coverage.branches) + len(coverage.lines), time.monotonic()
        try:
            with coverage:
                parser.run(data)
        except ErasureError as error:
            result.refused += 1
            try:
                complain(error)
            except AssertionError as found:
                result.findings.append((found, data))
        except Exception as error:
            result.findings.append((error, data))
        took = time.monotonic() - begin
        result.tried += 1
        result.slowest = max(result.slowest, took)
        if took > LONGEST:
            result.findings.append((TimeoutError(f"{took:.1f} s"), data))
        if len(coverage.branches) + len(coverage.lines) > before or result.tried <= len(parser.seeds):
            corpus.append(data)
            result.kept += 1
    return result


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=10.0, help="for each parser")
    arguments.add_argument("--inputs", type=float, default=float("inf"))
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("parser", nargs="*")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for parser in parsers(folder):
            if given.parser and parser.name not in given.parser:
                continue
            coverage = Coverage(parser.code)
            result = fuzz(parser, coverage, given.seconds, given.inputs, given.seed)
            print(
                f"{parser.name:18} {result.tried:6} inputs, lines {coverage.line_share:.0%}, "
                f"branches {coverage.branch_share:.0%}, slowest {result.slowest * 1000:.0f} ms",
                flush=True,
            )
            for error, data in result.findings:
                bad += 1
                print(f"  {type(error).__name__}: {str(error)[:300]}\n  {data[:300]!r}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
