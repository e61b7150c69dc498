"""Jobs on several servers, on a small Ray of this machine, against small servers that die, forget and refuse."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from membrane.scripts import sweep as module
from membrane.scripts.sweep import (
    LOSSES,
    CannotRun,
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
    assert any("is given up" in text for text in said) or not dying.up


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
