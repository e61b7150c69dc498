"""The page and Python know the same stack: web/js/stack_document.js against core's records and the nodes."""

import json
import re
import shutil
import subprocess
from dataclasses import fields

import pytest
from membrane.core.adapters import stack_json
from membrane.core.adapters.adapter import Card, ErasureAdapter
from membrane.core.adapters.permeability import MODES, NEGATIVES, Permeability
from membrane.core.adapters.stack import STRONGEST, Entry, ErasureStack
from membrane.core.adapters.written import Written
from membrane.core.errors import ErasureError
from membrane.core.text.captions import KINDS
from membrane.tools import ROOT
from membrane.tools.run.programs import node_js

ADAPTER = ErasureAdapter(Card("SPM", ("star",)))
NODES = json.loads((ROOT / "tests" / "contract" / "nodes.json").read_text(encoding="utf-8"))
# fields of an entry as the page addresses them, and (node, input) that sets the same
INPUTS = {
    "strength": ("MembraneStack", "strength"),
    "start_percent": ("MembraneStack", "start_percent"),
    "end_percent": ("MembraneStack", "end_percent"),
    "enabled": ("MembraneStack", "enabled"),
    "permeability.mode": ("MembranePermeability", "mode"),
    "permeability.factor": ("MembranePermeability", "factor"),
    "permeability.threshold": ("MembranePermeability", "threshold"),
    "permeability.negative": ("MembranePermeability", "negative"),
    "permeability.top_k": ("MembranePermeability", "top_k"),
}
NUMBERS = [path for path in INPUTS if path.rpartition(".")[2] not in ("enabled", "mode", "negative")]


def run_script(folder, script):
    """What a script of the page's modules prints as JSON."""
    modules = folder / "js"
    if not modules.exists():
        shutil.copytree(ROOT / "web" / "js", modules)
        (modules / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    file = modules / "script.mjs"
    file.write_text(script, encoding="utf-8")
    found = subprocess.run([node_js(), file], capture_output=True, text=True, encoding="utf-8")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """{export: value} of stack_document.js, functions left out."""
    script = 'import * as page from "./stack_document.js"; console.log(JSON.stringify(page));'
    return run_script(tmp_path_factory.mktemp("page"), script)


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    """{field: {min, max}} of the page's number boxes and sliders, which are tables in one of its modules."""
    found = {}
    for name in ("NUMBERS", "SLIDERS"):
        table = re.compile(rf"^(?:export )?const {name} = (\{{.*?^\}});", re.MULTILINE | re.DOTALL)
        texts = [table.search(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "web" / "js").rglob("*.js"))]
        (text,) = [match.group(1) for match in texts if match]
        script = f"console.log(JSON.stringify({text}));"
        found[name] = run_script(tmp_path_factory.mktemp("limits"), script)
    return found


def read(path, value):
    """The entry that Python reads from stack JSON in which one field is set."""
    outer, _, inner = path.partition(".")
    entry = {"adapter": "star", outer: {inner: value} if inner else value}
    text = json.dumps({"membrane_stack": 1, "entries": [entry]})
    return stack_json.from_json(text, lambda name: ADAPTER).entries[0]


def get(entry, path):
    for name in path.split("."):
        entry = getattr(entry, name)
    return entry


def test_version_modes_and_negatives(page):
    assert page["VERSION"] == stack_json.VERSION
    assert page["MODES"] == list(MODES)
    assert page["NEGATIVES"] == list(NEGATIVES)


def test_an_empty_stack_is_one_for_both(page):
    assert stack_json.from_json(page["EMPTY"], None).entries == ()


def test_fields_and_defaults_are_those_of_the_records(page):
    entry = Entry(ADAPTER)
    names = [f.name for f in fields(Entry) if f.name not in ("adapter", "permeability")]
    names += [f"permeability.{f.name}" for f in fields(Permeability)]
    assert page["DEFAULTS"] == {name: get(entry, name) for name in names}
    assert page["DEFAULTS"].keys() == INPUTS.keys()


@pytest.mark.parametrize("path", INPUTS)
def test_defaults_are_those_of_the_nodes(page, path):
    node, name = INPUTS[path]
    (found,) = [entry for entry in NODES[node]["inputs"] if entry["name"] == name]
    assert page["DEFAULTS"][path] == found["default"]


def test_the_page_writes_what_python_reads_and_the_other_way_round(page, tmp_path):
    settings = {"strength": 0.5, "start_percent": 0.25, "enabled": False}
    permeability = {"mode": "route", "factor": 2.0, "threshold": 0.125, "negative": "own", "top_k": 3}
    named = ErasureAdapter(ADAPTER.card, name="star")
    entry = Entry(named, **settings, permeability=Permeability(**permeability))
    text = stack_json.to_json(ErasureStack((entry,)))
    paths = [*INPUTS]
    script = f"""import {{ DEFAULTS, field, parse, setField, write }} from "./stack_document.js";
        const {{ stack, problem }} = parse({json.dumps(text)}), [entry] = stack.entries;
        const fresh = {{ adapter: "star" }};
        for (const path of {json.dumps(paths)}) setField(fresh, path, field(entry, path));
        const values = Object.fromEntries(Object.keys(DEFAULTS).map((path) => [path, field(entry, path)]));
        console.log(JSON.stringify({{ problem, values, text: write({{ ...stack, entries: [fresh] }}) }}));"""
    found = run_script(tmp_path, script)
    assert found["problem"] is None
    assert found["values"] == {path: get(entry, path) for path in paths}
    again = stack_json.from_json(found["text"], lambda name: named).entries[0]
    assert {path: get(again, path) for path in paths} == found["values"]


def test_the_page_has_limits_for_every_number(page, limits):
    assert {path for path, value in page["DEFAULTS"].items() if type(value) in (int, float)} == set(NUMBERS)
    assert limits["NUMBERS"].keys() == set(NUMBERS)
    assert limits["SLIDERS"].keys() <= set(NUMBERS)


@pytest.mark.parametrize("path", NUMBERS)
def test_python_accepts_what_the_page_lets_one_type(limits, path):
    node, name = INPUTS[path]
    (widget,) = [entry for entry in NODES[node]["inputs"] if entry["name"] == name]
    tried = {(table, side) for table in limits for side in {"min", "max"} & limits[table].get(path, {}).keys()}
    assert tried
    for table, side in tried:
        value = limits[table][path][side]
        assert get(read(path, value), path) == value
        assert widget["min"] <= value <= widget["max"]
        assert widget[side] == value or table == "SLIDERS"


@pytest.mark.parametrize(
    ("path", "side", "beyond"),
    [("start_percent", "min", -1e-3), ("end_percent", "max", 1e-3), ("permeability.top_k", "min", -1)],
)
def test_the_pages_limits_are_where_python_refuses(limits, path, side, beyond):
    limit = limits["NUMBERS"][path][side]
    assert get(read(path, limit), path) == limit
    with pytest.raises(ErasureError):
        read(path, limit + beyond)


def test_sliders_stay_below_the_strongest(limits):
    strongest = limits["SLIDERS"]["strength"]["max"] * limits["SLIDERS"]["permeability.factor"]["max"]
    assert strongest <= STRONGEST


def test_words_are_the_same_for_both(page, tmp_path):
    assert page["KINDS"] == list(KINDS)
    written = Written.of("star")
    assert page["OF_WORDS"] == {"words": "", **{name: getattr(written, name) for name in ("keep", "kind")}}
    entry = {**page["NEW_WORDS"], "words": " star => circle\n\n- moon ", "kind": "style"}
    (found,) = stack_json.from_json(json.dumps({"membrane_stack": 1, "entries": [entry]}), None).entries
    assert found.mode == "meaning" and found.adapter.kind == "style"
    script = f"""import {{ nameOf, understood }} from "./stack_document.js";
        const entry = {json.dumps(entry)};
        const wrong = [{{ adapter: "b" }}, {{ words: 1 }}, {{ kind: 1 }}, {{ keep: [] }}];
        const others = wrong.map((fields) => ({{ words: "a", ...fields }}));
        console.log(JSON.stringify([nameOf(entry), understood(entry), ...others.map(understood)]));"""
    assert run_script(tmp_path, script) == [found.adapter.describe(), True, False, False, False, False]


# ---------------------------------------------------------------- what the line below the editor's rows looks at

# nodes of a graph as the page has them: connect(from, to, input, type) draws a link
GRAPH = """
import { promptTexts } from "./graph.js";

const graph = { links: {}, _nodes: [], getNodeById: (id) => graph._nodes.find((node) => node.id === id) };
const add = (type, widgets = {}) => {
    const values = Object.entries(widgets).map(([name, value]) => ({ name, value }));
    const node = { id: graph._nodes.length + 1, type, graph, widgets: values, inputs: [], outputs: [{ links: [] }] };
    graph._nodes.push(node);
    return node;
};
const connect = (from, to, name, type) => {
    const id = Object.keys(graph.links).length + 1;
    graph.links[id] = { id, type, origin_id: from.id, target_id: to.id };
    to.inputs.push({ name, type, link: id });
    from.outputs[0].links.push(id);
    return to;
};
const stack = add("MembraneStackEditor"), sampler = add("KSampler");
const encode = (text) => add("CLIPTextEncode", { text });
const through = (name, from, type) => {
    connect(from, add("SetNode", { Constant: name }), type, type);
    return add("GetNode", { Constant: name });
};
"""
WAYS = {
    "straight": 'connect(stack, sampler, "model", "MODEL"); connect(encode("a star"), sampler, "positive", T);',
    "Set and Get": """connect(through("net", stack, "MODEL"), sampler, "model", "MODEL");
        connect(through("other", encode("a moon"), T), add("Note"), "text", T);
        connect(through("text", encode("a star"), T), sampler, "positive", T);""",
    "Reroute": """const one = connect(stack, add("Reroute (rgthree)"), "", "*");
        const two = connect(encode("a star"), add("Reroute"), "", "*");
        const three = connect(two, add("Reroute (rgthree)"), "", "*");
        connect(one, sampler, "model", "MODEL"); connect(three, sampler, "positive", T);""",
    "Get behind a combination": """connect(stack, sampler, "model", "MODEL");
        const both = add("ConditioningCombine");
        connect(through("text", encode("a star"), T), both, "conditioning_1", T);
        connect(both, sampler, "positive", T);""",
    "Power Prompt": """connect(stack, sampler, "model", "MODEL");
        connect(add("Power Prompt (rgthree)", { prompt: "a star" }), sampler, "positive", T);""",
    "text through Get": """connect(stack, sampler, "model", "MODEL");
        const box = encode("unused"), words = add("PrimitiveString", { value: "a star" });
        connect(through("words", words, "STRING"), box, "text", "STRING"); connect(box, sampler, "positive", T);""",
}


@pytest.mark.parametrize("way", WAYS)
def test_the_prompt_is_found_behind_nodes_that_hand_on(tmp_path, way):
    script = f'{GRAPH}const T = "CONDITIONING";{WAYS[way]}console.log(JSON.stringify(promptTexts(stack)));'
    assert run_script(tmp_path, script) == ["a star"]


@pytest.mark.parametrize("end", ['add("GetNode", { Constant: "nothing" })', 'connect(loop, loop, "", "*")'])
def test_nodes_that_hand_on_nothing(tmp_path, end):
    script = f"""{GRAPH}const loop = add("Reroute"); connect(stack, sampler, "model", "MODEL");
        connect({end}, sampler, "positive", "CONDITIONING"); console.log(JSON.stringify(promptTexts(stack)));"""
    assert run_script(tmp_path, script) == []
