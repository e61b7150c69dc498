"""Runs one workflow with many settings on any number of ComfyUI servers; standard library only.

    python3 sweep.py workflow.json --server 127.0.0.1:8188 --server 192.168.1.20:8188 --out results \\
        --set 4.strength=0,0.5,1 --set 9.seed=1,2,3

The workflow is in API format (in ComfyUI: Save (API Format)). Every combination of the values is a job, known by its
key. A job goes to the next free server; when that one dies or loses it, to another. Each finished job is one file in
the folder; run the same command again and only what is missing runs. %key% in a text input becomes the job's key.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

POLL = 0.5  # seconds between two questions to a server
GONE = (OSError, urllib.error.URLError, TimeoutError, ValueError)  # of a server that is not there or half there


class Refused(Exception):
    """A server does not take the prompt, or a node of it failed."""


class Lost(Exception):
    """A server answers but no longer knows the prompt, as after a restart."""


def jobs_of(workflow, settings):
    """{key: prompt} of all combinations of {"node.input": [values]}; the key names them."""
    found = {}
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values))
        key = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in chosen.items()) or "only"
        found[key] = with_settings(workflow, chosen, key)
    return found


def with_settings(workflow, chosen, key=""):
    """A copy of a workflow with values put into "node.input", and %key% in its texts replaced. Raises ValueError."""
    prompt = copy.deepcopy(workflow)
    for place, value in chosen.items():
        node, dot, name = place.partition(".")
        if not dot or node not in prompt:
            raise ValueError(f'"{place}" names no input: the workflow has the nodes {", ".join(prompt)}; write 4.seed')
        prompt[node]["inputs"][name] = value
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, str):
                node["inputs"][name] = value.replace("%key%", file_name(key))
    return prompt


def file_name(key):
    """A file name for a key: what is readable of it and a hash, so that different keys never share one."""
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "_", key).strip("_")[:60]
    return f"{plain}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def write_whole(path, data):
    """Writes bytes beside their place and renames them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Server:
    """One ComfyUI, by its address: host:port, or a URL (SwarmUI: /ComfyBackendDirect below it)."""

    def __init__(self, address, timeout=30):
        self.url = (address if "://" in address else f"http://{address}").rstrip("/")
        self.timeout, self.client = timeout, uuid.uuid4().hex
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # named servers, no proxy

    def ask(self, path, body=None):
        """The answer to GET path, or to POST with a JSON body: bytes."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self.open(request, timeout=self.timeout) as answer:
            return answer.read()

    def alive(self):
        """Whether it answers."""
        try:
            json.loads(self.ask("/queue"))
            return True
        except GONE:
            return False

    def start(self, prompt):
        """Queues a prompt and returns its id. Raises Refused, or what says that the server is gone."""
        try:
            answer = json.loads(self.ask("/prompt", {"prompt": prompt, "client_id": self.client}))
        except urllib.error.HTTPError as error:
            raise Refused(f"HTTP {error.code}: {error.read().decode(errors='replace')[:500]}") from None
        if answer.get("node_errors"):
            self.forget(answer["prompt_id"])
            raise Refused(json.dumps(answer["node_errors"])[:500])
        return answer["prompt_id"]

    def finished(self, prompt_id):
        """The outputs of a prompt, or None while it waits or runs. Raises Refused when it failed, Lost when the
        server does not know it."""
        queue = json.loads(self.ask("/queue"))  # before the history, so that it cannot end in between unseen
        waiting = any(prompt_id == entry[1] for kind in ("queue_running", "queue_pending") for entry in queue[kind])
        entry = json.loads(self.ask(f"/history/{prompt_id}")).get(prompt_id)
        if entry is None:
            if not waiting:
                raise Lost(prompt_id)
            return None
        for event, data in (entry.get("status") or {}).get("messages", ()):
            if event in ("execution_error", "execution_interrupted"):
                raise Refused(f"node {data.get('node_id')} ({data.get('node_type')}): {data.get('exception_message')}")
        return entry.get("outputs", {})

    def forget(self, prompt_id):
        """Takes a prompt out of the queue, if it still waits there."""
        with contextlib.suppress(*GONE):
            self.ask("/queue", {"delete": [prompt_id]})

    def file(self, named):
        """Content of a file that an output names."""
        wanted = {"filename": named["filename"], "subfolder": named.get("subfolder", ""), "type": named.get("type", "")}
        return self.ask("/view?" + urllib.parse.urlencode(wanted))


class Sweep:
    """Hands out jobs and keeps exactly one result for each key.

    jobs: {key: prompt}; folder: where results go; attempts: how many servers may refuse a job before that counts as
    its result; patience: seconds for which a server may be silent before it is given up; download: whether pictures
    are fetched too.
    """

    def __init__(self, jobs, servers, folder, attempts=2, patience=60.0, download=False, say=print, poll=POLL):
        self.jobs, self.servers, self.folder = jobs, servers, Path(folder)
        self.attempts, self.patience, self.download, self.say, self.poll = attempts, patience, download, say, poll
        self.change = threading.Condition()
        self.waiting = [key for key in jobs if not self.path(key).is_file()]
        self.refused = {}  # key: {address: reason}
        self.running, self.live = {}, {server.url for server in servers}
        self.stopped = False

    def path(self, key):
        """The file of a key's result."""
        return self.folder / "jobs" / f"{file_name(key)}.json"

    def run(self):
        """Runs what is missing; {key: result}, also written to results.json. Results of jobs that failed have an
        "error"; those of jobs for which no server was left are missing."""
        done = len(self.jobs) - len(self.waiting)
        if done:
            self.say(f"{done} of {len(self.jobs)} jobs are there already")
        threads = [threading.Thread(target=self._serve, args=(server,), daemon=True) for server in self.servers]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self.stopped = True
        return self.merged()

    def merged(self):
        """{key: result} of everything that is there, in the order of the jobs; writes results.json."""
        found = {}
        for key in self.jobs:
            if self.path(key).is_file():
                found[key] = json.loads(self.path(key).read_text(encoding="utf-8"))
        write_whole(self.folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
        return found

    def _take(self, server):
        """The next key for a server, or None when nothing will come any more."""
        with self.change:
            while not self.stopped:
                for key in self.waiting:
                    if server.url not in self.refused.get(key, ()):
                        self.waiting.remove(key)
                        self.running[key] = server.url
                        return key
                if not self.running:
                    return None
                self.change.wait(0.5)
        return None

    def _serve(self, server):
        while (key := self._take(server)) is not None:
            begin = time.monotonic()
            try:
                result = self._do(server, key)
                self._keep(key, {"key": key, "server": server.url, "seconds": time.monotonic() - begin, **result})
            except Refused as error:
                self._refuse(server, key, str(error))
            except (Lost, *GONE) as error:
                self._give_back(key)
                self.say(f"{server.url} lost {key!r} ({type(error).__name__}: {error})")
                if not self._wait_for(server):
                    self._give_up(server)
                    break
            except BaseException:
                self._give_back(key)
                raise

    def _give_up(self, server):
        """A server is gone for good: what only it could have done has failed."""
        self.say(f"{server.url} is given up, it was silent for {self.patience:.0f} seconds")
        with self.change:
            self.live.discard(server.url)
            stuck = [key for key in self.waiting if self.live and self.live <= set(self.refused.get(key, ()))]
            self.waiting = [key for key in self.waiting if key not in stuck]
            self.change.notify_all()
        for key in stuck:
            self._failed(key)

    def _do(self, server, key):
        prompt_id = server.start(self.jobs[key])
        try:
            while (outputs := server.finished(prompt_id)) is None:
                if self.stopped:
                    raise Lost("stopped")
                time.sleep(self.poll)
            return self._collected(server, key, outputs)
        except BaseException:
            server.forget(prompt_id)  # it may only have been out of reach; another one does the job now
            raise

    def _collected(self, server, key, outputs):
        """Outputs with the JSON files that they name, by node, and pictures if wanted."""
        reports = {}
        for node, kinds in outputs.items():
            for named in (item for items in kinds.values() if isinstance(items, list) for item in items):
                if not isinstance(named, dict) or "filename" not in named:
                    continue
                if named["filename"].endswith(".json"):
                    reports.setdefault(node, []).append(json.loads(server.file(named)))
                elif self.download:
                    write_whole(
                        self.folder / "files" / file_name(key) / Path(named["filename"]).name, server.file(named)
                    )
        return {"outputs": outputs, "reports": reports}

    def _keep(self, key, result):
        with self.change:
            if not self.path(key).is_file():
                write_whole(self.path(key), json.dumps(result, ensure_ascii=False).encode())
            self.running.pop(key, None)
            left = len(self.waiting) + len(self.running)
            self.change.notify_all()
        self.say(f"{key}: {result.get('error', 'done')} on {result['server']}, {left} left")

    def _give_back(self, key):
        with self.change:
            self.running.pop(key, None)
            self.waiting.insert(0, key)
            self.change.notify_all()

    def _refuse(self, server, key, reason):
        with self.change:
            self.running.pop(key, None)
            self.refused.setdefault(key, {})[server.url] = reason
            over = len(self.refused[key]) >= self.attempts or self.live <= set(self.refused[key])
            if not over:
                self.waiting.append(key)
            self.change.notify_all()
        self.say(f"{server.url} refused {key!r}: {reason}")
        if over:
            self._failed(key)

    def _failed(self, key):
        reasons = self.refused[key]
        self._keep(key, {"key": key, "server": ", ".join(reasons), "error": next(iter(reasons.values()))})

    def _wait_for(self, server):
        """Whether a server answers again within the patience."""
        until, pause = time.monotonic() + self.patience, 0.2
        while not self.stopped and time.monotonic() < until:
            if server.alive():
                return True
            with self.change:
                if not self.waiting and not self.running:
                    return False
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
        return False


def parse_setting(text):
    """("node.input", [values]) of "4.strength=0,0.5,1"; a JSON list takes values with commas. Raises ValueError."""
    place, equals, values = text.partition("=")
    if not equals or "." not in place:
        raise ValueError(f'"{text}" is no setting; write node.input=value,value such as 4.strength=0,0.5,1')
    try:
        found = json.loads(values)
    except ValueError:
        found = None
    if not isinstance(found, list):
        found = [_value(part) for part in values.split(",")]
    return place, found


def _value(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="workflow in API format")
    parser.add_argument("--server", action="append", required=True, help="address of a ComfyUI; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=V,V", help="values to go through")
    parser.add_argument("--jobs", type=Path, help='file with a job a line: {"key": "...", "set": {"4.seed": 1}}')
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder for the results (default: sweep)")
    parser.add_argument("--download", action="store_true", help="fetch pictures and other files too")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds a server may be silent (default: 60)")
    args = parser.parse_args(argv)
    workflow = json.loads(args.workflow.read_text(encoding="utf-8"))
    try:
        if args.jobs:
            lines = [json.loads(line) for line in args.jobs.read_text(encoding="utf-8").splitlines() if line.strip()]
            jobs = {line["key"]: with_settings(workflow, line["set"], line["key"]) for line in lines}
        else:
            jobs = jobs_of(workflow, dict(map(parse_setting, args.set)))
    except (ValueError, KeyError) as error:
        parser.error(str(error))
    servers = [Server(address) for address in dict.fromkeys(args.server)]
    found = Sweep(jobs, servers, args.out, patience=args.patience, download=args.download).run()
    wrong = [key for key in jobs if key not in found or "error" in found[key]]
    print(
        f"{len(found)} of {len(jobs)} jobs have a result, {len(wrong)} failed or missing; {args.out / 'results.json'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
