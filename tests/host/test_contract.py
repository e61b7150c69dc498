"""The public contract: node ids, inputs and outputs as they were released.

tests/contract/nodes.json is the snapshot. Inputs are only ever appended; after adding a node or an
input, write it anew with MEMBRANE_UPDATE_CONTRACT=1 and read the difference.
"""

import json
import os
from pathlib import Path

import pytest
from membrane.tools import host_library

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "contract" / "nodes.json"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin"}


def describe_input(name, entry, optional):
    kind = entry[0]
    options = entry[1] if len(entry) > 1 else {}
    return {
        "name": name,
        "optional": optional,
        # files, samplers and schedulers differ from machine to machine and from host to host
        "type": "FILES" if name.endswith(("_name", "_file")) or name == "scheduler" else kind,
        **{k: options[k] for k in ("default", "min", "max", "step", "multiline") if k in options},
    }


def describe(cls):
    types = cls.INPUT_TYPES()
    return {
        "display_name": cls.TITLE,
        "category": cls.CATEGORY,
        "inputs": [
            describe_input(name, entry, group == "optional")
            for group in ("required", "optional")
            for name, entry in types.get(group, {}).items()
        ],
        "outputs": [
            {"name": n, "type": t} for t, n in zip(cls.RETURN_TYPES, getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES))
        ],
        "output_node": getattr(cls, "OUTPUT_NODE", False),
    }


@pytest.fixture(scope="module")
def found(pack):
    return json.loads(json.dumps({name: describe(cls) for name, cls in sorted(pack.NODE_CLASS_MAPPINGS.items())}))


def test_contract(found):
    if os.environ.get("MEMBRANE_UPDATE_CONTRACT"):
        SNAPSHOT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_node_explains_itself(pack):
    for name, cls in pack.NODE_CLASS_MAPPINGS.items():
        assert name.startswith("Membrane") and name.isascii()
        assert cls.CATEGORY.split("/")[0] == "membrane"
        assert cls.DESCRIPTION and cls.SEARCH_ALIASES
        assert len(getattr(cls, "OUTPUT_TOOLTIPS", ())) == len(cls.RETURN_TYPES), name
        types = cls.INPUT_TYPES()
        for group in ("required", "optional"):  # what is hidden has no widget
            for key, entry in types.get(group, {}).items():
                assert entry[1]["tooltip"], f"{name}.{key}"
                # the page of March 2024 takes {} in such a box for a choice and removes what follows //
                assert not entry[1].get("multiline") or entry[1]["dynamicPrompts"] is False, f"{name}.{key}"
        assert (ROOT / "web" / "docs" / f"{name}.md").exists(), f"{name} has no help page"
        assert (ROOT / "web" / "docs" / "img" / f"{name}.jpg").exists(), f"{name} has no picture, see node_pictures.mjs"
        assert pack.NODE_DISPLAY_NAME_MAPPINGS[name] == cls.TITLE


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_workflows_use_known_nodes_and_inputs(path, pack):
    entries = json.loads(path.read_text(encoding="utf-8")).values()
    ours = [entry for entry in entries if entry["class_type"].startswith("Membrane")]
    for entry in ours:
        inputs_fit(pack.NODE_CLASS_MAPPINGS[entry["class_type"]], entry)
    try:
        hosts = [(host_library.node_class(entry["class_type"]), entry) for entry in entries if entry not in ours]
    except LookupError as error:  # a workflow for models that this host does not know
        pytest.skip(str(error))
    for cls, entry in hosts:
        inputs_fit(cls, entry)


def inputs_fit(cls, entry):
    types = cls.INPUT_TYPES()
    required, optional = set(types.get("required", {})), set(types.get("optional", {}))
    assert required <= set(entry["inputs"]) <= required | optional, entry["class_type"]


def test_the_folder_category(host, pack):
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["erasure_adapters"]
    assert extensions == EXTENSIONS and len(paths) == len(set(paths))
    from membrane.core.host.files import folders

    folder_paths.folder_names_and_paths["erasure_adapters"] = (["/somewhere/else"], set())
    try:
        folders.register()
        folders.register()
        paths, extensions = folder_paths.folder_names_and_paths["erasure_adapters"]
        assert paths[0] == "/somewhere/else" and len(paths) == 2 and extensions == EXTENSIONS
    finally:
        folder_paths.folder_names_and_paths["erasure_adapters"] = (
            [str(host.work / "models" / "erasure_adapters")],
            set(EXTENSIONS),
        )
