"""Jobs on several servers, on a small Ray of this machine, against small servers that die, forget and refuse."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from membrane.scripts.sweep import (
    LOSSES,
    Own,
    Server,
    Sweep,
    connected,
    file_name,
    jobs_of,
    main,
    parse_setting,
    with_settings,
)

SCRIPT = Path(__file__).absolute().parent.parent.parent / "scripts" / "sweep.py"
SMALL = SCRIPT.parent.parent / "tests" / "data" / "small_comfyui.py"
WORKFLOW = {"1": {"class_type": "A", "inputs": {"seed": 0, "text": "x"}}, "2": {"class_type": "B", "inputs": {}}}


@pytest.fixture(scope="module")
def ray():
    with connected(workers=2) as ray:
        yield ray


class Fake:
    """Speaks as much of ComfyUI's API as a sweep uses; every prompt takes `takes` seconds, one at a time, and waits
    for what `hold` says. It dies with its prompt number `last`."""

    def __init__(self, takes=0.02, refuse=lambda prompt: False, fail=lambda prompt: False, hold=None, last=None):
        self.takes, self.refuse, self.fail, self.hold, self.last = takes, refuse, fail, hold, last
        self.started, self.history, self.deleted, self.queue = [], {}, [], []
        self.up, self.lock = True, threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, code, data):
                if not fake.up:
                    self.connection.close()
                    return
                body = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if self.path == "/queue":
                    with fake.lock:
                        waiting = [[0, name] for name in fake.queue]
                    self.answer(200, {"queue_running": [], "queue_pending": waiting})
                elif self.path.startswith("/view"):
                    self.answer(200, {"report": self.path})
                else:
                    name = self.path.rsplit("/", 1)[1]
                    with fake.lock:
                        found = {name: fake.history[name]} if name in fake.history else {}
                    self.answer(200, found)

            def do_POST(self):
                data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/queue":
                    fake.deleted += data["delete"]
                    return self.answer(200, {})
                if fake.refuse(data["prompt"]):
                    return self.answer(400, {"error": "no such node"})
                if fake.up:
                    self.answer(200, {"prompt_id": fake.begin(data["prompt"]), "node_errors": {}})
                    fake.up = len(fake.started) != fake.last
                else:
                    self.connection.close()
                return None

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.server = Server(f"127.0.0.1:{self.http.server_port}", timeout=5, patience=0.6)

    def begin(self, prompt):
        with self.lock:
            name = f"p{len(self.started)}"
            self.started.append(prompt["1"]["inputs"]["seed"])
            self.queue.append(name)
        threading.Thread(target=self.finish, args=(name, prompt), daemon=True).start()
        return name

    def finish(self, name, prompt):
        time.sleep(self.takes)
        until = time.monotonic() + 60
        while self.hold is not None and not self.hold() and time.monotonic() < until:
            time.sleep(0.005)
        messages = []
        if self.fail(prompt):
            messages = [["execution_error", {"node_id": "1", "node_type": "A", "exception_message": "broken"}]]
        seed = prompt["1"]["inputs"]["seed"]
        outputs = {"2": {"text": [f"seed {seed}"], "files": [{"filename": f"{seed}.json", "type": "output"}]}}
        with self.lock:
            if name in self.queue:
                self.queue.remove(name)
                self.history[name] = {"outputs": outputs, "status": {"messages": messages}}

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def fakes():
    made = []

    def make(**options):
        made.append(Fake(**options))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


def sweep(count, servers, folder, patience=0.6, **options):
    jobs = jobs_of(WORKFLOW, {"1.seed": list(range(count))})
    options = {"poll": 0.01, "say": lambda text: None, **options}
    for fake in servers:
        fake.server.patience = patience
    return Sweep(jobs, [fake.server for fake in servers], folder, **options)


def seeds(found):
    return [result["outputs"]["2"]["text"][0] for result in found.values()]


def test_every_combination_has_a_key_and_a_prompt():
    jobs = jobs_of(WORKFLOW, {"1.seed": [1, 2], "1.text": ["a", "b, c"]})
    assert list(jobs) == ['1.seed=1, 1.text="a"', '1.seed=1, 1.text="b, c"', '1.seed=2, 1.text="a"',
                          '1.seed=2, 1.text="b, c"']  # fmt: skip
    assert jobs['1.seed=2, 1.text="b, c"']["1"]["inputs"] == {"seed": 2, "text": "b, c"}
    assert WORKFLOW["1"]["inputs"]["seed"] == 0
    assert len({file_name(key) for key in jobs}) == 4
    assert with_settings(WORKFLOW, {"1.text": "out/%key%"}, "k y")["1"]["inputs"]["text"] == f"out/{file_name('k y')}"
    with pytest.raises(ValueError, match='"7.seed" names no input'):
        with_settings(WORKFLOW, {"7.seed": 1})


def test_settings_of_the_command_line():
    assert parse_setting("4.strength=0,0.5,on") == ("4.strength", [0, 0.5, "on"])
    assert parse_setting('4.text=["a, b", "c"]') == ("4.text", ["a, b", "c"])
    with pytest.raises(ValueError, match="is no setting"):
        parse_setting("strength")


def test_all_servers_work_and_nothing_is_done_twice(ray, fakes, tmp_path):
    both = []
    first, second = (fakes(hold=lambda: all(fake.started for fake in both)) for _ in range(2))
    both += [first, second]
    found = sweep(12, [first, second], tmp_path).run()
    assert seeds(found) == [f"seed {i}" for i in range(12)]
    assert sorted(first.started + second.started) == list(range(12))
    assert first.started and second.started
    assert found["1.seed=3"]["reports"]["2"] == [{"report": "/view?filename=3.json&subfolder=&type=output"}]
    assert json.loads((tmp_path / "results.json").read_text()) == found
    again = sweep(14, [first, second], tmp_path).run()  # two more; the others are there
    assert len(again) == 14 and sorted(first.started + second.started) == list(range(14))
    assert not list(Path(tmp_path).rglob("*.tmp"))


def test_a_server_dies_in_the_middle(ray, fakes, tmp_path):
    dying = fakes(last=2)
    other, said = fakes(hold=lambda: not dying.up), []
    found = sweep(10, [dying, other], tmp_path, say=said.append).run()
    assert seeds(found) == [f"seed {i}" for i in range(10)]
    per_server = [result["server"] for result in found.values()]
    assert per_server.count(dying.server.url) == 1
    lost = set(dying.started) & set(other.started)
    assert len(lost) <= 1 and sorted({*dying.started, *other.started}) == list(range(10))
    assert len(dying.started + other.started) == 11
    assert any(f"{dying.server.url} lost" in text for text in said)


def test_a_server_comes_back_without_its_memory(ray, fakes, tmp_path):
    only = fakes(takes=0.05)

    def forget():
        while len(only.started) < 3:
            time.sleep(0.005)
        with only.lock:
            only.queue.clear()
            only.history.clear()

    thread = threading.Thread(target=forget)
    thread.start()
    found = sweep(6, [only], tmp_path).run()
    thread.join()
    assert seeds(found) == [f"seed {i}" for i in range(6)]
    assert 6 <= len(only.started) <= 8


def test_a_server_that_lacks_the_node_leaves_the_job_to_another(ray, fakes, tmp_path):
    poor, rich = fakes(refuse=lambda prompt: True), fakes(takes=0.05)
    found = sweep(4, [poor, rich], tmp_path).run()
    assert seeds(found) == [f"seed {i}" for i in range(4)] and not poor.started


def test_a_job_that_fails_everywhere_is_told(ray, fakes, tmp_path):
    def broken(prompt):
        return prompt["1"]["inputs"]["seed"] == 2

    first, second = fakes(fail=broken), fakes(fail=broken)
    found = sweep(5, [first, second], tmp_path).run()
    assert len(found) == 5
    assert found["1.seed=2"]["error"] == "node 1 (A): broken"
    assert [key for key, result in found.items() if "error" in result] == ["1.seed=2"]
    assert (first.started + second.started).count(2) == 2


def test_refused_by_one_and_the_other_is_gone(ray, fakes, tmp_path):
    poor, dying = fakes(refuse=lambda prompt: True), fakes()
    dying.up = False
    found = sweep(2, [poor, dying], tmp_path, patience=0.3).run()
    assert all("no such node" in result["error"] for result in found.values()) and len(found) == 2


def test_no_server_left(ray, fakes, tmp_path):
    gone = fakes()
    gone.up = False
    found = sweep(3, [gone], tmp_path, patience=0.1).run()
    assert found == {}
    gone.up = True
    assert len(sweep(3, [gone], tmp_path).run()) == 3


def test_the_command_line(ray, fakes, tmp_path, capsys):
    fake = fakes()
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(WORKFLOW))
    command = [str(file), "--server", fake.server.url, "--set", "1.seed=1,2", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert "2 of 2 jobs have a result" in capsys.readouterr().out
    jobs = tmp_path / "jobs.txt"
    jobs.write_text('{"key": "a", "set": {"1.seed": 5}}\n')
    assert main([str(file), "--server", fake.server.url, "--jobs", str(jobs), "--out", str(tmp_path / "two")]) == 0
    assert fake.started == [1, 2, 5]


# ---------------------------------------------------------------- workers that start a ComfyUI


@pytest.fixture
def small(tmp_path):
    """Folder of a small ComfyUI; its log has a line (process, seed) for each prompt that began."""
    folder = tmp_path / "comfyui"
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "cli_args.py").write_text("")
    shutil.copy(SMALL, folder / "main.py")
    yield folder
    wait_for(lambda: not any(alive(pid) for pid, _ in begun(folder)))  # each ends with its worker


def begun(folder):
    log = folder / "log"
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def own_sweep(count, folder, out, workers=2, options=(), **more):
    """A sweep on small ComfyUIs that it starts, as where there are no tools beside it."""
    own = Own(folder, sys.executable, ["--log", str(folder / "log"), *options], root=folder.parent)
    jobs = jobs_of(WORKFLOW, {"1.seed": list(range(count))})
    return Sweep(jobs, [own] * workers, out, **{"poll": 0.05, "say": lambda text: None, **more})


def while_running(sweep, act):
    """Results of a sweep while `act` runs beside it."""
    failures = []

    def watched():
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=watched)
    thread.start()
    found = sweep.run()
    thread.join()
    assert not failures, failures
    return found


def kill_after(folder, count, victim):
    """A function that kills a process, by victim(process of the ComfyUI), in the middle of prompt number `count`."""

    def act():
        wait_for(lambda: len(begun(folder)) >= count)
        os.kill(victim(begun(folder)[count - 1][0]), signal.SIGKILL)

    return act


def assert_nothing_lost_nothing_twice(found, count, sweep):
    assert list(found) == [f"1.seed={i}" for i in range(count)]
    assert seeds(found) == [f"seed {i}" for i in range(count)]
    assert len(list((sweep.folder / "jobs").iterdir())) == count
    assert json.loads((sweep.folder / "results.json").read_text()) == found


def test_two_workers_start_a_comfyui_each(ray, small, tmp_path):
    running = own_sweep(8, small, tmp_path / "out", options=["--takes", "0.5"], download=True)
    found = running.run()
    assert_nothing_lost_nothing_twice(found, 8, running)
    assert len({pid for pid, _ in begun(small)}) == 2 and sorted(seed for _, seed in begun(small)) == list(range(8))
    assert len({result["server"] for result in found.values()}) == 2
    for key in found:
        (picture,) = (tmp_path / "out" / "files" / file_name(key)).iterdir()
        assert json.loads(picture.read_bytes())["picture"].startswith("/view?filename=")


def test_a_worker_is_killed_in_the_middle(ray, small, tmp_path):
    running = own_sweep(8, small, tmp_path / "out", options=["--takes", "0.5"])
    found = while_running(running, kill_after(small, 3, lambda pid: psutil.Process(pid).ppid()))
    assert_nothing_lost_nothing_twice(found, 8, running)
    assert sorted(seed for _, seed in begun(small)) == sorted([*range(8), begun(small)[2][1]])


def test_a_comfyui_is_killed_in_the_middle(ray, small, tmp_path):
    said = []
    running = own_sweep(8, small, tmp_path / "out", options=["--takes", "0.5"], say=said.append)
    found = while_running(running, kill_after(small, 3, lambda pid: pid))
    assert_nothing_lost_nothing_twice(found, 8, running)
    assert sorted(seed for _, seed in begun(small)) == sorted([*range(8), begun(small)[2][1]])
    assert sum(" lost " in text for text in said) == 1, said


def test_the_pool_is_killed_in_the_middle(ray, small, tmp_path):
    def pool():
        (found,) = (
            p
            for p in psutil.Process().children(recursive=True)
            if alive(p.pid) and p.cmdline()[:1] in (["ray::Pool"], ["ray::Pool.run"])
        )
        return found.pid

    running = own_sweep(6, small, tmp_path / "out", options=["--takes", "0.3"])
    found = while_running(running, kill_after(small, 3, lambda pid: pool()))
    assert_nothing_lost_nothing_twice(found, 6, running)


def test_a_job_that_ends_every_comfyui_is_left_and_the_others_are_done(ray, small, tmp_path):
    said = []
    running = own_sweep(5, small, tmp_path / "out", options=["--dies-of", "2"], say=said.append)
    found = running.run()
    assert list(found) == [f"1.seed={i}" for i in (0, 1, 3, 4)]
    assert [seed for _, seed in begun(small)].count(2) == LOSSES + running.attempts
    assert any(text.startswith("1.seed=2: has no result, ") for text in said)


def test_no_comfyui_to_start(ray, small, tmp_path):
    said = []
    (small / "main.py").write_text("raise SystemExit('no screws left')\n")
    assert own_sweep(2, small, tmp_path / "out", say=said.append).run() == {}
    assert any("no screws left" in text for text in said), said
    (small / "main.py").unlink()
    said.clear()
    assert own_sweep(2, small, tmp_path / "out", say=said.append).run() == {}
    assert any(f"no ComfyUI found on {socket.gethostname()}: {small};" in text for text in said), said


# ---------------------------------------------------------------- the command


def alive(pid):
    """Whether a process runs; not one that has ended and is only waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def marked(mark):
    """Processes that a command started, by what it put into their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SWEEP_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def terminal():
    """(file descriptor to write to, list that fills with what arrives) of a terminal."""
    end, start = pty.openpty()
    fcntl.ioctl(start, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    texts = []

    def read():
        try:
            while text := os.read(end, 4096):
                texts.append(text.decode())
        except OSError:
            os.close(end)

    threading.Thread(target=read, daemon=True).start()
    return start, texts


def test_an_interrupted_sweep_goes_on(fakes, tmp_path):
    out, mark = tmp_path / "out", str(tmp_path)
    fake = fakes(hold=lambda: len(fake.started) <= 3 or bool(fake.deleted))  # stopped in the fourth
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "workflow.json"), "--server", fake.server.url, "--out",
               str(out), "--set", "1.seed=" + ",".join(map(str, range(8)))]  # fmt: skip
    environment = {**os.environ, "SWEEP_TEST": mark}
    screen, texts = terminal()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=screen)
    os.close(screen)
    wait_for(lambda: len(list(out.glob("jobs/*.json"))) >= 3)
    child.send_signal(signal.SIGINT)
    assert child.wait(240) == 1
    wait_for(lambda: not marked(mark), 20)
    text = "".join(texts)
    assert "stopped; the same command goes on from here" in text and "Traceback" not in text
    assert re.search(r"\| [123]/8 \[\d\d:\d\d<\d\d:\d\d, ", text)  # the time so far < the time left
    kept = {file.name: file.read_bytes() for file in out.glob("jobs/*.json")}
    assert len(kept) == 3 and fake.deleted == ["p3"]  # what was queued last is taken back
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "3 of 8 jobs are there already" in again.stdout
    assert {name: (out / "jobs" / name).read_bytes() for name in kept} == kept
    assert seeds(json.loads((out / "results.json").read_text())) == [f"seed {i}" for i in range(8)]
    assert sorted(fake.started) == sorted([*range(8), 3])  # the one it was stopped in ran again
    wait_for(lambda: not marked(mark), 20)


def test_the_pack_in_a_comfyui_finds_it_without_tools(small, tmp_path):
    pack = small / "custom_nodes" / "membrane" / "scripts"
    pack.mkdir(parents=True)
    shutil.copy(SCRIPT, pack)
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    command = [sys.executable, str(pack / "sweep.py"), str(tmp_path / "workflow.json"), "--set", "1.seed=4,5", "--out",
               str(tmp_path / "out"), f"--options=--log {small / 'log'}"]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 of 2 jobs have a result, 0 failed or missing" in done.stdout, done.stderr
    assert [seed for _, seed in begun(small)] == [4, 5] and len({pid for pid, _ in begun(small)}) == 1


def test_a_machine_of_a_cluster_is_lost_in_the_middle(ray, small, tmp_path):
    """Three nodes as on three machines, by their address; one goes with all that runs there."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
        command = [sys.executable, str(SCRIPT), str(tmp_path / "workflow.json"), "--address", cluster.address,
                   "--workers", "2", "--set", "1.seed=0,1,2,3,4,5,6,7", "--comfyui", str(small), "--out",
                   str(tmp_path / "out"), "--options", f"--log {small / 'log'} --takes 1"]  # fmt: skip
        pack = tmp_path / "pack" / "scripts"
        pack.mkdir(parents=True)
        command[1] = shutil.copy(SCRIPT, pack)  # without the tools of a checkout beside it
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len({pid for pid, _ in begun(small)}) == 2 and len(begun(small)) >= 3)
        cluster.remove_node(nodes[0], allow_graceful=False)
        said, errors = child.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert child.returncode == 0, said + errors
    assert "8 of 8 jobs have a result, 0 failed or missing" in said
    assert seeds(json.loads((tmp_path / "out" / "results.json").read_text())) == [f"seed {i}" for i in range(8)]
    assert len(list((tmp_path / "out" / "jobs").iterdir())) == 8 and len(begun(small)) <= 9


def test_ports_are_on_the_loopback_only(ray):
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        if alive(process.pid)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_dry_run_lists_the_jobs_and_needs_no_ray(fakes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    command = [str(tmp_path / "workflow.json"), "--set", "1.seed=1,2", "--out", str(tmp_path / "out")]
    (tmp_path / "out" / "jobs").mkdir(parents=True)
    (tmp_path / "out" / "jobs" / f"{file_name('1.seed=2')}.json").write_text("{}")
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == "to do  1.seed=1\ndone   1.seed=2\n2 jobs, 1 to do\n"
    assert main(command) == 1  # and without Ray nothing else runs
    assert capsys.readouterr().err == (
        "error: A sweep needs ray, which is not installed: python -m pip install ray tqdm\n"
    )


def test_words_stand_for_values_in_several_inputs():
    workflow = {"1": {"class_type": "A", "inputs": {"seed": 0, "text": "a red %concept% on %ground%"}},
                "2": {"class_type": "B", "inputs": {"name": "%concept%/%key%", "from": ["1", 0]}}}  # fmt: skip
    jobs = jobs_of(workflow, {"concept": ["star", "ring"], "ground": ["snow"], "1.seed": [3]})
    assert list(jobs) == ['concept="star", ground="snow", 1.seed=3', 'concept="ring", ground="snow", 1.seed=3']
    key = 'concept="ring", ground="snow", 1.seed=3'
    assert jobs[key]["1"]["inputs"] == {"seed": 3, "text": "a red ring on snow"}
    assert jobs[key]["2"]["inputs"] == {"name": f"ring/{file_name(key)}", "from": ["1", 0]}
    with pytest.raises(ValueError, match='"strength" names no input'):
        with_settings(workflow, {"strength": 1})


def test_no_cluster_at_the_address(tmp_path, capsys):
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "workflow.json"), "--address", "127.0.0.1:1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: Ray cannot be reached at 127.0.0.1:1"
    )
    assert not (tmp_path / "sweep").exists()
