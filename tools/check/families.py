"""Tries the nodes on a tiny model of every family and writes docs/families.md from what came out.

python -m tools.check.families            every host known here
python -m tools.check.families 0.3.75     one of them; the others keep their last result in output/families
python -m tools.check.families --only Detect Train    of these columns or networks alone; the rest is kept as well
"""

import datetime
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from membrane.tools import ROOT, host_library
from membrane.tools.run import hosts
from membrane.tools.tiny import networks

RESULTS, TABLE = ROOT / "output" / "families", ROOT / "docs" / "families.md"
METHODS = ("UCE", "RECE", "SPEED", "Double Projections")
SAMPLING = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler"}


# ---------------------------------------------------------------- what is tried; each gives what stands in the table


def entries(subject):
    """Where text enters, and where a map of it acts."""
    found = {}
    for entry in subject.entries:
        where = f"behind {entry.norm}" if entry.norm else "prepared text" if entry.prepared else "conditioning"
        found.setdefault((entry.name.partition(".")[0], where), []).append(entry.name.partition(".")[2])
    return ", ".join(
        f"{name} x {len(numbers)} ({where})" if len(numbers) > 1 else f"{name} ({where})"
        for (name, where), numbers in found.items()
    )


def text_map(subject):
    found = subject.predict(subject.applied(subject.adapter(subject.maps())))
    return _error(found, subject.expected(subject.maps()), subject.base)


def on_weights(subject):
    found = subject.predict(subject.applied(subject.adapter(subject.maps()), "weights"))
    return _error(found, subject.expected(subject.maps()), subject.base)


def gates(subject):
    """The prompt opens its gate half, the negative prompt's own is closed."""
    gate = {"mode": "facilitated transport", "factor": 0.5, "negative": "own"}
    found = subject.predict(subject.applied(subject.adapter(subject.maps()), gate=gate))
    edited = subject.expected(subject.maps(), 0.5)
    return _error(found, (edited[0], subject.base[1]), (subject.base[0], edited[1]))


def steps(subject):
    """Before its range a map does nothing, inside it everything."""
    maps = {entry: change for entry, change in subject.maps().items() if not entry.pooled}
    early, late = (
        subject.predict(subject.applied(subject.adapter(maps), start_percent=start, end_percent=end))
        for start, end in ((0.0, 0.3), (0.3, 1.0))
    )
    if not all(torch.equal(one, other) for one, other in zip(early, subject.predict(subject.model))):
        return "acts outside its range"
    return _error(late, subject.expected(maps), subject.base)


def files(subject):
    adapter = subject.adapter(subject.maps())
    saved = subject.node("MembraneSaveAdapter", adapter=adapter, filename_prefix=f"families/{subject.name}")
    loaded = subject.node("MembraneLoadAdapter", adapter_name=saved.ui["text"][0])[0]
    sides = zip(subject.predict(subject.applied(loaded)), subject.predict(subject.applied(adapter)))
    return "ok" if all(torch.equal(one, other) for one, other in sides) else "another prediction"


def erased(method):
    """A closed-form erasure is the edit of the weights by the map that comes out of the node."""

    def check(subject):
        model, adapter = subject.erase(method)
        names = {entry.name: entry for entry in subject.entries}
        maps = {names[name]: change for name, change in adapter.maps.items()}
        return _error(subject.predict(model)[:1], subject.expected(maps)[:1], subject.base[:1])

    return check


def layers(subject):
    adapter, edits = subject.layer_adapter()
    expected = subject.with_weights(edits)
    return max(
        (_error(subject.predict(subject.applied(adapter, permeability=mode)), expected, subject.base)
         for mode in ("fixed", "facilitated transport")), key=float,
    )  # fmt: skip


def closed(subject):
    """At strength 0 the node gives the model that it got."""
    same = subject.applied(subject.adapter(subject.maps()), strength=0.0) is subject.model
    return "ok" if same else "another model"


def trained(subject):
    """One step of an SPM adapter changes its factors, and these the prediction."""
    adapter = subject.node(
        "MembraneTrain", model=subject.model, clip=subject.clip, concepts="star -> circle", steps=1, learning_rate=0.05,
        warmup=0, rollout_steps=2, rank=1, preview_every=0, filename_prefix=f"families/{subject.name}",
        **_size(subject),
    )[0]  # fmt: skip
    found = subject.predict(subject.applied(adapter, permeability="fixed"))
    if not all(side.isfinite().all() for side in found):
        return "gives no numbers"
    return "does nothing" if all(torch.equal(one, other) for one, other in zip(found, subject.base)) else "ok"


def untouched(subject):
    """After all the others: the model predicts what it did, by weights that are bit for bit the same."""
    return "ok" if subject.is_as_it_was() else "changed"


def preview(subject):
    """The prompt that is the concept opens fully, another one less."""
    stack = subject.stack(subject.adapter(subject.maps()), permeability="facilitated transport")
    report = subject.node("MembranePreview", clip=subject.clip, stack=stack, prompts="a red star\na house")[1]
    values = [float(line.split()[-1]) for line in report.splitlines() if re.search(r"\d\.\d+$", line)]
    return "ok" if values[0] == 1.0 > values[1] else f"opens {values}"


def impact(subject):
    """The erased word changes more than another."""
    stack = subject.stack(subject.erase("UCE")[1])
    report = subject.node("MembraneImpact", model=subject.model, clip=subject.clip, stack=stack,
                          prompts="a house\nstar")[1]  # fmt: skip
    first = next(line for line in report.splitlines() if "star" in line or "house" in line)
    return "ok" if "star" in first else "changes another word more"


def extracted(subject):
    """From a model with an adapter on its layers."""
    adapter, _ = subject.layer_adapter()
    edited = subject.applied(adapter, permeability="fixed")
    found = subject.node("MembraneExtract", model=subject.model, weights_file="none", concepts="a red star",
                         edited_model=edited, energy=1.0, max_rank=128)[0]  # fmt: skip
    model = subject.applied(found, permeability="fixed")
    return _error(subject.predict(model), subject.predict(edited), subject.base)


def stressed(subject):
    """Derived vectors: an attack that knows the weights."""
    subject.node("MembraneStressTest", original=subject.model, erased=subject.erase("UCE")[0], clip=subject.clip,
                 concept="star", captions="{}", pictures=1, attacks="derived vectors",
                 scheduler_name="simple", **_size(subject), **SAMPLING)  # fmt: skip
    return "ok"


def detected(subject):
    subject.node("MembraneDetectMemorization", model=subject.model, clip=subject.clip, prompts="a red star", seeds=1,
                 first_steps=1, scheduler="simple", attribution=False, **_size(subject), **SAMPLING)  # fmt: skip
    return "ok"


def _size(subject):
    """Width and height of pictures whose latents are as large as the network's."""
    from membrane.core.host.compat import channels_and_ratio

    side = networks.NETWORKS[subject.name].latent[-1] * channels_and_ratio(subject.model.model.latent_format)[1]
    return {"width": side, "height": side}


CHECKS = {
    "entries (a map acts at)": entries,
    "map = edit of the weights": text_map,
    "apply_to weights": on_weights,
    "gates": gates,
    "part of the steps": steps,
    "strength 0": closed,
    "saved, loaded": files,
    **{method: erased(method) for method in METHODS},
    "adapter on layers": layers,
    "Extract": extracted,
    "Preview": preview,
    "Impact": impact,
    "Stress-Test": stressed,
    "Detect": detected,
    "Train": trained,
    "base untouched": untouched,  # the last
}


def _error(found, expected, base):
    from membrane.tools.tiny.subject import error

    value = error(found, expected, base)
    return "does nothing" if math.isinf(value) else f"{value:.0e}"


# ---------------------------------------------------------------- on one host


def rows(node, only, before):
    """{family: {check: what came out}} on the host that runs; of a family that it lacks, its reason alone.

    only: names of checks and of networks, without which the rest is taken from `before`, the last result; empty: all.
    """
    from membrane.core.errors import ErasureError
    from membrane.tools.tiny.subject import Subject

    checks = {check: function for check, function in CHECKS.items() if check in only} or CHECKS
    chosen = [name for name in networks.NETWORKS if name in only] or networks.NETWORKS
    found = {}
    for name in networks.NETWORKS:
        if name not in chosen:
            found[name] = before[name]
            continue
        try:
            subject = Subject(name, node)
        except (networks.NotInThisHost, ErasureError) as error:
            found[name] = str(error)
            continue
        row = {check: _tried(function, subject, ErasureError) for check, function in checks.items()}
        found[name] = row if checks is CHECKS else before[name] | row
        print(name, *row.values(), sep=" | ", flush=True)
    return found


def _tried(function, subject, refusal):
    try:
        return function(subject)
    except refusal as error:
        return f"refused: {error}"
    except Exception as error:  # a table of what happens: also what should not
        return f"FAILS: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def here(path, only):
    """Runs on the host that MEMBRANE_HOST names and writes a JSON file; only: see rows()."""
    import logging

    torch.set_num_threads(1)
    node, tidy = host_library.start()
    logging.getLogger().setLevel(logging.ERROR)
    try:
        result = rows(node, only, json.loads(path.read_text(encoding="utf-8")) if only else {})
    finally:
        tidy()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8", newline="\n")


# ---------------------------------------------------------------- the table


def table(results):
    """Markdown of {host's label: rows()}."""
    lines = [
        "# Families",
        "",
        f"Written by `python -m tools.check.families`, {datetime.date.today()}: a tiny network of each family, of the "
        "host's own class with random weights (`tools/tiny`), through the nodes. Numbers are errors of a prediction of "
        "one step, of the conditional and the unconditional side, relative to what the edit does at all; what is right "
        "is said by a second network whose weights are edited by hand in float64. Float32 gives 1e-7 to 1e-5. A number "
        "in brackets is a refusal, below the table.",
    ]
    for label, found in results.items():
        said = []
        lines += ["", f"## {label}", "", f"| network | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
        for name, row in found.items():
            if isinstance(row, dict):
                lines.append(f"| {name} | {' | '.join(_cell(row[check], said) for check in CHECKS)} |")
        lines += [""] * bool(said) + [f"- [{i + 1}] {sentence}" for i, sentence in enumerate(said)]
        absent = [name for name, row in found.items() if isinstance(row, str)]
        lines += ["", f"Not in this host: {', '.join(absent)}."] if absent else []
    lines += ["", "## Not tried", "", untried()]
    return "\n".join(lines) + "\n"


def untried():
    """A sentence on the families that Membrane knows without a tiny network, and on those that it refuses."""
    from membrane.core.families.table import FAMILIES

    made = {network.config for network in networks.NETWORKS.values()}
    others = [family for family in FAMILIES if not made & set(family.configs)]
    known, refused = ([f.title for f in others if bool(f.refused) == no] for no in (False, True))
    return (
        f"Known by their descriptions, without a tiny network here: {', '.join(known)}. Refused by name: "
        f"{', '.join(refused)}."
    )


def _cell(text, said):
    """What stands in a cell: a sentence is written out once, below."""
    if not text.startswith("refused: "):
        return text.replace("|", "/")
    sentence = text.removeprefix("refused: ")
    if sentence not in said:
        said.append(sentence)
    return f"[{said.index(sentence) + 1}]"


def main(names, only):
    unknown = set(only) - {*CHECKS, *networks.NETWORKS}
    if unknown:
        raise SystemExit(f"there is no column or network {', '.join(sorted(unknown))}")
    for host in hosts.chosen(names):
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "MEMBRANE_HOST": str(host.path)}
        command = [sys.executable, "-m", "tools.check.families", "--here", str(RESULTS / f"{host.name}.json"), *only]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    kept = {host.label: RESULTS / f"{host.name}.json" for host in hosts.known_hosts()}
    found = {label: json.loads(path.read_text(encoding="utf-8")) for label, path in kept.items() if path.is_file()}
    TABLE.write_text(table(found), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--here"]:
        here(Path(sys.argv[2]), sys.argv[3:])
    else:
        told = [*sys.argv[1:], "--only"]
        cut = told.index("--only")
        main(told[:cut], told[cut + 1 : -1])
