"""The texts of the nodes and of the page in all languages: writes locales/en, and tells what the others lack.

    .venv/bin/python -m tools.check.locales

ComfyUI reads locales/<language>/nodeDefs.json and main.json. For English the nodes are the truth, and web/js/strings.js
for what the page says beside them; the other languages are written by hand and have an entry for each of these texts.
"""

import json
import re
import sys

from membrane.tools import ROOT, host_library

FOLDER = ROOT / "locales"
LANGUAGES = ("zh", "ja")
MESSAGE_SYNTAX = set("{}@|")  # the page takes these for placeholders, links and plurals


def node_texts(classes):
    """{node: {display_name, description, inputs, outputs}} of {name: class}, as the page looks them up."""
    return {name: _texts(cls) for name, cls in classes.items()}


def _texts(cls):
    types = cls.INPUT_TYPES()
    shown = {**types.get("required", {}), **types.get("optional", {})}  # hidden ones have no widget
    outputs = zip(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES), getattr(cls, "OUTPUT_TOOLTIPS", ()))
    return {
        "display_name": cls.TITLE,
        "description": cls.DESCRIPTION,
        "inputs": {name: _input(name, entry[1]) for name, entry in shown.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def _input(name, options):
    return {"name": options.get("display_name", name), "tooltip": options["tooltip"]}


def flat(tree, path=()):
    """{dotted path: text} of nested dictionaries."""
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {key: text for name, branch in tree.items() for key, text in flat(branch, (*path, name)).items()}


def plain(text):
    """Whether the page shows a text as it stands."""
    return not MESSAGE_SYNTAX & set(text)


def english(texts):
    """locales/en: the nodes' texts without those that are no plain message, of which the page then shows the node's."""
    if not isinstance(texts, dict):
        return texts
    return {k: english(branch) for k, branch in texts.items() if isinstance(branch, dict) or plain(branch)}


def page_strings():
    """{key: text} of what the page's part of the pack says in English."""
    source = (ROOT / "web" / "js" / "strings.js").read_text(encoding="utf-8")
    return json.loads(re.search(r"(?s)export const ENGLISH = ({.*?\n});", source)[1])


def path_of(language, name="nodeDefs.json"):
    """Where the host looks for a language."""
    return FOLDER / language / name


def read(language, name="nodeDefs.json"):
    """What is written for a language."""
    return json.loads(path_of(language, name).read_text(encoding="utf-8"))


def write(language, texts, name="nodeDefs.json"):
    """Writes a language as json."""
    path_of(language, name).write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def update(name, texts, wanted):
    """Writes a file of locales/en, and says what has changed and what the other languages lack of the wanted texts."""
    before = flat(read("en", name)) if path_of("en", name).exists() else {}
    write("en", texts, name)
    after = flat(texts)
    for key in sorted(before.keys() & after.keys()):
        if before[key] != after[key]:
            print(f"{key} was {before[key]!r}\n  and is now {after[key]!r}; translate it anew")
    for language in LANGUAGES:
        there = flat(read(language, name)) if path_of(language, name).exists() else {}
        for key in wanted.keys() - there.keys():
            print(f"{language} lacks {key}: {wanted[key]!r}")
        for key in there.keys() - wanted.keys():
            print(f"{language} has {key}, which is nowhere in English")


def main():
    _, tidy = host_library.start()
    texts = node_texts(sys.modules["membrane"].NODE_CLASS_MAPPINGS)
    tidy()
    update("nodeDefs.json", english(texts), flat(texts))
    page = {**read("en", "main.json"), "membrane": page_strings()}
    update("main.json", page, flat(page))


if __name__ == "__main__":
    main()
