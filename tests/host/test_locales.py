"""The English texts are those of the nodes, and the host serves all languages."""

import importlib
from pathlib import Path

import pytest
from membrane.tools.check.locales import FOLDER, LANGUAGES, english, flat, node_texts, read


def test_english_is_what_the_nodes_say(pack):
    said, written = flat(english(node_texts(pack.NODE_CLASS_MAPPINGS))), flat(read("en"))
    different = sorted(key for key in said.keys() | written.keys() if said.get(key) != written.get(key))
    assert not different, f"run tools/check/locales.py, then translate what it names: {different}"


def test_the_host_serves_every_language(host):
    if not (host.path / "app" / "custom_node_manager.py").exists():
        pytest.skip(f"{host.name} has no translations of custom nodes")
    if not (host.path / "utils" / "json_util.py").exists():
        pytest.skip(f"{host.name} serves no translations")
    manager = importlib.import_module("app.custom_node_manager").CustomNodeManager()
    pack = Path(host.work) / "custom_nodes" / "membrane_locales"
    pack.mkdir(exist_ok=True)
    (pack / "locales").symlink_to(FOLDER)
    try:
        served = manager.build_translations()
    finally:
        (pack / "locales").unlink()
        pack.rmdir()
    for language in ("en", *LANGUAGES):
        assert served[language] == {**read(language, "main.json"), "nodeDefs": read(language)}
