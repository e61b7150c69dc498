"""Files that were made to break, fill, run or reach something: a result or one sentence, in little time and memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.stack_json import from_json, names
from membrane.core.errors import LONGEST, ErasureError
from membrane.core.formats import containers, labels, native, registry
from membrane.core.measures.detection import FORMAT as CALIBRATION
from membrane.core.measures.detection import Calibration
from membrane.core.measures.record import Record
from membrane.tools import ROOT
from membrane.tools.check import fuzz

READERS = (registry.load, registry.load_weights, native.load, labels.label)
BOUNDED = settings(
    max_examples=150, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
METADATA = {"membrane.format": "erasure_adapter", "membrane.version": "3", "membrane.concepts": '["star"]'}


def outcome(call, *arguments):
    """What a call gives, or the sentence with which it refuses."""
    try:
        return call(*arguments)
    except ErasureError as error:
        said = str(error)
        assert said.isprintable() and said.endswith(".") and len(said) <= LONGEST + 10
        return said


def all_outcomes(path, readers=READERS):
    return [outcome(reader, str(path)) for reader in readers]


def all_refused(path, *words, readers=READERS):
    for said in all_outcomes(path, readers):
        assert isinstance(said, str) and any(word in said for word in words or ("",)), said


@pytest.fixture
def put(tmp_path):
    """Writes bytes as a file and returns its path."""

    def write(data, name="x.safetensors"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def packed(header, body=b""):
    """A safetensors file with a header as it is given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# ---------------------------------------------------------------- any file at all

NAMES = st.one_of(
    st.sampled_from(fuzz.WORDS),
    st.tuples(st.sampled_from(fuzz.WORDS), st.sampled_from(fuzz.WORDS)).map(".".join),
    st.text(max_size=20),
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**31, 2**62, 2**63]), max_size=4)
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(fuzz.TYPES), SHAPES, st.sampled_from([0x00, 0x3C, 0x7C, 0x7F, 0x80, 0xFF])),
    max_size=6,
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(fuzz.WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(fuzz.WORDS) | st.text(), inner),
    max_leaves=12,
)
MAPS = st.dictionaries(
    st.sampled_from([w for w in fuzz.WORDS if w.startswith(("membrane.", "ss_", "lora_ad", "pro", "ra", "al"))]),
    st.sampled_from(["erasure_adapter", "lora", "1", "3", "[]", '["star"]', '["\\ud800"]', "{", "a, b", "[" * 3000])
    | JSON_VALUES.map(json.dumps),
)  # fmt: skip


@BOUNDED
@given(tensors=TENSORS, metadata=MAPS)
def test_any_names_types_shapes_and_metadata(put, tensors, metadata):
    """Well-formed safetensors files with parts of all formats in them."""
    found = {
        name: (kind, shape, bytes([byte]) * fuzz.size_of(kind, shape)) for name, (kind, shape, byte) in tensors.items()
    }
    for result in all_outcomes(put(fuzz.pack(found, metadata))):
        if isinstance(result, ErasureAdapter):
            assert all(change.up.isfinite().all() for change in result.low_rank.values())
            assert all(torch.isfinite(m.a).all() for m in (result.maps["text"], result.maps["pooled"]) if m is not None)


@BOUNDED
@given(data=st.binary(max_size=300), kind=st.sampled_from([b"", containers.ZIP, struct.pack("<Q", 100), b"\x80\x02"]))
def test_any_bytes(put, data, kind):
    all_refused(put(kind + data), readers=READERS[:3])
    outcome(labels.label, put(kind + data))


@BOUNDED
@given(offsets=st.lists(st.tuples(*[st.sampled_from([-1, 0, 1, 4, 8, 2**40, 2**63, 2**64 - 1, 2**64])] * 2), min_size=1,
                        max_size=3))  # fmt: skip
def test_any_offsets(put, offsets):
    """Overlapping, backward, and far beyond the file."""
    header = {f"lora_unet_{i}.lora_up.weight": {"dtype": "F32", "shape": [1], "data_offsets": list(o)}
              for i, o in enumerate(offsets)}  # fmt: skip
    all_outcomes(put(packed(header, bytes(8))))


@pytest.mark.parametrize("size", [2**63, 2**40, 101_000_000, 5000])
def test_a_header_that_says_it_is_large(put, size):
    tracemalloc.start()
    try:
        all_refused(put(struct.pack("<Q", size) + b"{" + b" " * 100), "cannot be read", "is no")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_of_brackets(put):
    all_refused(put(packed(b"[" * 100_000)), "cannot be read")


@pytest.mark.parametrize("name", ["x", "low_rank.x{}.up", "lora_unet_x{}.lora_up.weight"])
def test_a_hundred_thousand_names(put, name):
    """In seconds; the time is that of the whole file, mostly of safetensors itself."""
    tensors = {(name.format(i) if "{}" in name else f"{name}{i}"): ("F32", [1], bytes(4)) for i in range(100_000)}
    all_refused(put(fuzz.pack(tensors, METADATA if name.startswith("low") else None)), "", readers=READERS[:1])


@pytest.mark.parametrize("name", ["unet." * 100_000, "lora_" * 100_000, "\n\r\u202e\x00", "a" * 3000])
@pytest.mark.parametrize("end", ["", ".lora_up.weight", ".weight"])
def test_long_and_strange_names(put, name, end):
    """A name of a hundred thousand prefixes took seconds to take apart, and line breaks came through to the message."""
    all_refused(put(fuzz.pack({name + end: ("F32", [2, 2], bytes(16))}, None)), readers=READERS[:3])


def text_map(kind="F32", a=b"\0\0\x80?", concept="I32", terms=1):
    """A native file with a text map of width 2."""
    size = fuzz.size_of(kind, [1])
    factor = (a * size)[:size] * (2 * terms)
    owners = bytes(fuzz.size_of(concept, [terms]))
    return fuzz.pack(
        {"text_map.a": (kind, [2, terms], factor), "text_map.b": (kind, [terms, 2], factor),
         "text_map.concept": (concept, [terms], owners)}, METADATA | {"membrane.version": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (text_map("F8_E4M3", b"\xff"), "not finite"),
        (text_map("F64", struct.pack("<d", 1e300)), "not finite"),
        (text_map("F4"), "read"),
        (text_map(concept="C64"), "wrong number types"),
        (text_map(concept="BOOL"), "wrong number types"),
        (text_map(terms=0), "without terms"),
    ],
)
def test_numbers_of_a_text_map(put, data, words):
    """Found by the fuzzer: 8-bit floats and complex numbers raised, float64 became infinite, no terms broke later."""
    all_refused(put(data), words, readers=(registry.load, native.load))


def lora(kind="F32", up=b"\0\0\x80?", alpha=1.0, width=2):
    size = fuzz.size_of(kind, [1])
    return fuzz.pack(
        {"lora_unet_x.lora_up.weight": (kind, [2, 1], (up * size)[:size] * 2),
         "lora_unet_x.lora_down.weight": ("F32", [1, width], struct.pack("<f", 1.0) * width),
         "lora_unet_x.alpha": ("F64", [], struct.pack("<d", alpha))}, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lora("F64", struct.pack("<d", 1e300)), "not finite in up"),
        (lora(alpha=1e300), "too large with the alpha"),
        (lora(alpha=1e30, up=struct.pack("<f", 1e30)), "too large with the alpha"),
        (lora("F8_E5M2", b"\x7c"), "not finite in up"),
    ],
)
def test_numbers_that_overflow(put, data, words):
    all_refused(put(data), words, readers=(registry.load,))


def test_dimensions_beyond_64_bits(put):
    tensors = {"lora_unet_x.lora_up.weight": ("F32", [0, 2**63, 2**63], b"")}
    all_refused(put(fuzz.pack(tensors, None)), "cannot be read")


def test_a_factor_that_is_one_number_with_settings(put):
    data = {"unet.x.lora_A.weight": ("F32", [], bytes(4)), "unet.x.lora_B.weight": ("F32", [2, 1], bytes(8))}
    all_refused(put(fuzz.pack(data, {"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})), readers=(registry.load,))


def test_a_half_character_among_the_concepts(put):
    metadata = METADATA | {"membrane.concepts": '["\\ud800"]'}
    found = put(fuzz.pack(fuzz.unpack(text_map())[0], metadata))
    all_refused(found, "damaged description", readers=(registry.load, native.load, labels.label))


PAIR = {
    "lora_unet_x.lora_up.weight": ("F32", [2, 1], bytes(8)),
    "lora_unet_x.lora_down.weight": ("F32", [1, 2], bytes(8)),
}
SPM = {"rank": "1", "alpha": "1"}
LECO = '[{"target": "TARGET", "positive": "a", "neutral": "", "action": "erase"}]'


@pytest.mark.parametrize(
    "metadata",
    [
        SPM | {"prompts": "a" * 3000},
        SPM | {"prompts": ",".join(map(str, range(20_000)))},
        {"membrane.format": "lora", "membrane.concepts": json.dumps(["a" * 3000])},
        {"ss_leco_prompt_count": "1", "ss_leco_preview": LECO.replace("TARGET", "a" * 3000)},
    ],
)  # fmt: skip
def test_concepts_that_no_text_encoder_gets_through(put, metadata):
    all_refused(put(fuzz.pack(PAIR, metadata)), "expected at most", readers=(registry.load, labels.label))


def test_half_a_character_in_what_leco_erased(put):
    metadata = {"ss_leco_prompt_count": "1", "ss_leco_preview": LECO.replace("TARGET", "\\ud800")}
    found = registry.load(str(put(fuzz.pack(PAIR, metadata))))
    assert found.card == Card("LECO", ())


# ---------------------------------------------------------------- masks that inflate


def masks(count, shape, bits):
    tensors = {}
    for i in range(count):
        tensors[f"mask.x{i}.bits"] = ("U8", [len(bits)], bits)
        tensors[f"mask.x{i}.shape"] = ("I64", [2], struct.pack("<2q", *shape))
    return fuzz.pack(tensors, METADATA)


def test_masks_are_added_up_before_one_is_inflated(put):
    """A file of 2 MB with 64 GB of masks in it."""
    bits = zlib.compress(bytes(2**14 * 2**11), 9)
    assert len(bits) < 40_000
    path = put(masks(50, (2**14, 2**14), bits))
    tracemalloc.start()
    try:
        all_refused(path, "masks of more than", readers=(registry.load,))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    all_refused(put(masks(1, (2**20, 2**20), bits)), "of shape", readers=(registry.load,))


def test_a_mask_with_a_wrong_check_at_its_end(put):
    """Found by the fuzzer: the numbers are all there, and zlib notices only when asked for more."""
    bits = bytearray(zlib.compress(bytes(6), 9))
    bits[-1] ^= 1
    all_refused(put(masks(1, (8, 6), bytes(bits))), "cannot be unpacked", readers=(registry.load,))


# ---------------------------------------------------------------- files of PyTorch


def archive(put, instructions, kind=zipfile.ZIP_STORED, **more):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        for name, content in ({"data.pkl": instructions, "byteorder": b"little", "version": b"3\n"} | more).items():
            file.writestr(f"x/{name}", content)
    return put(buffer.getvalue(), "x.pt")


def laughs(levels, end):
    """A pair of pairs of pairs, and something done with it: 2 ** levels values in a few bytes."""
    start = b"\x80\x02)q\x00"
    return start + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels)) + end


TORCH_READERS = (registry.load, registry.load_weights)


@pytest.mark.parametrize("end", [b")R.", b"}h\x3cK\x01s.", b"]h\x3ca.", b")\x81.", b"b."], ids=repr)
def test_values_that_stand_for_more_than_fits(put, end):
    """PyTorch prints or compares such values in its own messages and never comes back; they do not get there."""
    all_refused(archive(put, laughs(60, end)), "refer to each other", "more than weights", readers=TORCH_READERS)


def test_lists_filled_after_they_are_shared(put):
    lists = b"".join(b"]q%c" % i for i in range(50))
    fill = b"".join(b"h%c(h%ch%ce" % (i, i + 1, i + 1) for i in range(49))
    all_refused(archive(put, b"\x80\x02" + lists + fill + b"."), "refer to each other", readers=TORCH_READERS)


@pytest.mark.parametrize(
    "function",
    ["torch\nFloatTensor", "builtins\nbytearray", "torch._utils\n_rebuild_wrapper_subclass", "posix\nsystem",
     "builtins\neval", "torch.hub\nload", "numpy.core.multiarray\n_reconstruct", "torch.storage\nTypedStorage"],
)  # fmt: skip
def test_functions_that_a_file_may_name(put, function):
    """Those that torch allows but weights do not need included: FloatTensor makes numbers without any in the file."""
    instructions = b"\x80\x02c" + function.encode() + b"\nJ\x00\xca\x9a\x3b\x85R."
    all_refused(archive(put, instructions), "more than weights", readers=TORCH_READERS)


def test_packed_parts(put):
    path = archive(put, b"\x80\x02" + b"N" * 10_000_000 + b".", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    try:
        all_refused(path, "holds more than its", readers=TORCH_READERS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_program_of_torchscript(put):
    all_refused(archive(put, b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."}), "a program", readers=TORCH_READERS)


def test_many_views_of_the_same_numbers(put):
    """Each is read and copied; together they may not be much larger than the file."""
    whole = torch.zeros(200_000)
    buffer = io.BytesIO()
    torch.save({f"lora_unet_{i}.lora_up.weight": whole for i in range(20)}, buffer)
    all_refused(put(buffer.getvalue(), "x.pt"), "without a stored number", readers=TORCH_READERS)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "x.pth", "x.safetensors"])
@pytest.mark.parametrize("layout", ["zip", "old", "plain", "nested", "second part"])
def test_payloads_are_not_run(tmp_path, put, name, layout):
    """Whatever the file is called and wherever in it the program is."""
    target = str(tmp_path / "ran")
    buffer, hostile = io.BytesIO(), Payload(target)
    if layout == "plain":
        pickle.dump(hostile, buffer)
    elif layout == "second part":
        inner = io.BytesIO()
        torch.save({"x.weight": torch.zeros(1)}, inner)
        with zipfile.ZipFile(inner, "a") as file:
            file.writestr("archive/constants.pkl", pickle.dumps(hostile))
        buffer = inner
    else:
        content = {"a": torch.zeros(1), "b": {"c": [hostile]} if layout == "nested" else hostile}
        torch.save(content, buffer, _use_new_zipfile_serialization=layout != "old")
    all_refused(put(buffer.getvalue(), name), readers=TORCH_READERS)
    outcome(labels.label, put(buffer.getvalue(), name))
    assert not os.path.exists(target)


@BOUNDED
@given(data=st.lists(st.sampled_from(fuzz.CODES), max_size=40))
def test_any_instructions(put, data):
    all_outcomes(archive(put, b"\x80\x02" + b"".join(data) + b"."), TORCH_READERS)


CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
import tools
from membrane.core.errors import ErasureError
from membrane.core.formats import registry
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        registry.load(path)
    except ErasureError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_bombs_in_a_process_with_little_memory(put):
    """All of the above at once, each in one process that would be ended by its limits."""
    bits = zlib.compress(bytes(2**14 * 2**11), 9)
    bombs = {
        "masks": masks(50, (2**14, 2**14), bits),
        "header": struct.pack("<Q", 10**8 - 1) + b"[" * 10**6,
        "laughs": archive(put, laughs(60, b")R.")).read_bytes(),
        "numbers": archive(put, b"\x80\x02ctorch\nFloatTensor\nJ\x00\xca\x9a\x3b\x85R.").read_bytes(),
        "packed": archive(put, b"\x80\x02" + b"N" * 10**7 + b".", zipfile.ZIP_DEFLATED).read_bytes(),
        "names": fuzz.pack({"unet." * 1_000_000: ("F32", [1], bytes(4))}, None),
    }
    paths = [str(put(data, name)) for name, data in bombs.items()]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    *sentences, grown = child.stdout.splitlines()
    assert len(sentences) == len(bombs) and all(s.endswith(".") for s in sentences)
    assert int(grown) < 300_000, "kilobytes"


# ---------------------------------------------------------------- where files are


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    for name in ("folder", "nowhere", "missing"):
        all_refused(tmp_path / f"{name}.safetensors", "cannot be read")


# ---------------------------------------------------------------- texts


def adapter(name):
    return ErasureAdapter(Card("SPM", ("star",)), name=name)


NUMBERS = st.sampled_from(
    ["1e999", "-1e999", "NaN", "1e-400", "1" + "0" * 400, "1" * 5000, "1e300", "-0.0", "true", "1.5"]
)
FIELDS = st.sampled_from(["strength", "start_percent", "end_percent", "enabled", "permeability", "node", "adapter"])
INNER = st.sampled_from(["mode", "factor", "threshold", "negative", "top_k"])


@BOUNDED
@given(fields=st.dictionaries(FIELDS, NUMBERS | JSON_VALUES.map(json.dumps), max_size=3),
       inner=st.dictionaries(INNER, NUMBERS | JSON_VALUES.map(json.dumps), max_size=3))  # fmt: skip
def test_any_numbers_in_a_stack(fields, inner):
    """Numbers that no other type holds are refused here and do not break the first thing that computes with them."""
    opening = "{" + ", ".join(f'"{k}": {v}' for k, v in inner.items()) + "}"
    entry = {"adapter": '"x"'} | ({"permeability": opening} if inner else {}) | fields
    text = "{" + ", ".join(f'"{k}": {v}' for k, v in entry.items()) + "}"
    stack = outcome(from_json, f'{{"membrane_stack": 1, "entries": [{text}]}}', adapter, "4")
    if not isinstance(stack, str):
        (row,) = stack.entries
        assert abs(float(row.strength) * float(row.permeability.factor)) <= 1000
        torch.tensor([row.strength, row.permeability.threshold, row.permeability.top_k], dtype=torch.float32)


@BOUNDED
@given(value=JSON_VALUES)
def test_any_json_as_a_stack(value):
    text = json.dumps(value)
    for given_text in (text, f'{{"membrane_stack": 1, "entries": {text}}}'):
        outcome(names, given_text)
        outcome(from_json, given_text, adapter, None)


@BOUNDED
@given(value=JSON_VALUES, key=st.sampled_from(["settings", "probe", "scores", "format", "version"]))
def test_any_json_as_a_calibration(value, key):
    data = json.loads(Calibration({"a": 1}, (0.5,), tuple(map(float, range(30)))).to_json())
    for text in (json.dumps(value), json.dumps(data | {key: value})):
        found = outcome(Calibration.from_json, text, "x.json")
        assert isinstance(found, str) or found.std >= 0 or found.std != found.std


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e999", '"x"', "[]", "{}"])
def test_a_number_of_a_calibration(number):
    scores = ", ".join(["1.0"] * 30)
    text = f'{{"format": "{CALIBRATION}", "version": 1, "settings": {{}}, "probe": [{number}], "scores": [{scores}]}}'
    assert "is damaged" in outcome(Calibration.from_json, text, "x.json")


@BOUNDED
@given(value=JSON_VALUES, key=st.sampled_from(["configuration", "probe", "rows", "pictures", "finished"]))
def test_any_json_as_an_evaluation(value, key):
    """None, or a record that the report can be made of."""
    data = json.loads(fuzz.RECORD)
    for text in (json.dumps(value), json.dumps(data | {key: value}), json.dumps(data | {"rows": [value]})):
        found = Record.from_json(text)
        assert found is None or (isinstance(found.rows, list) and found.fingerprint())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000])
def test_deep_and_long_json(text):
    assert isinstance(outcome(from_json, text, adapter, None), str)
    assert isinstance(outcome(Calibration.from_json, text, "x.json"), str)
    assert Record.from_json(text) is None


@BOUNDED
@given(text=st.text(alphabet=st.sampled_from("ab ->{}\n\r\u2028\ud800\x00\u0130\u1e9e"), max_size=40))
def test_any_concepts_and_templates(text):
    fuzz.concept_words(text.encode("utf-8", "replace"))
    for parse in (fuzz.concepts.parse_concepts, fuzz.concepts.parse_templates, fuzz.concepts.parse_lines):
        found = outcome(parse, text)
        if not isinstance(found, str):
            "".join(
                f if isinstance(f, str) else f.text + f.surrogate for f in found
            ).encode()  # a tokenizer can read it


# ---------------------------------------------------------------- the fuzzer


@pytest.mark.parametrize("name", [parser.name for parser in fuzz.parsers("unused")])
def test_the_fuzzer_finds_nothing(tmp_path, name):
    """A few hundred inputs of each parser, the same ones every time; `run.py bench reliability` tries far more."""
    (parser,) = (p for p in fuzz.parsers(tmp_path) if p.name == name)
    coverage = fuzz.Coverage(parser.code)
    result = fuzz.fuzz(parser, coverage, inputs=300)
    assert not result.findings, [(repr(error), data[:200]) for error, data in result.findings]
    assert coverage.line_share > 0.6 and coverage.branch_share > 0.5
    assert {path.name for path in Path(tmp_path).iterdir()} <= {"fuzzed"}


def test_the_fuzzer_finds_something(tmp_path):
    """A parser with a mistake behind two branches."""

    def broken(data):
        found = fuzz.concepts.parse_lines(data.decode("utf-8", "replace"))
        if found and found[0].startswith("{"):
            raise KeyError(found[0])

    parser = fuzz.Parser("broken", {"text.concepts": ("parse_lines",)}, [b"a -> b"], broken, fuzz.text)
    result = fuzz.fuzz(parser, fuzz.Coverage(parser.code), inputs=2000)
    assert result.findings and isinstance(result.findings[0][0], KeyError)
