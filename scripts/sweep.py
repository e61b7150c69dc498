"""Runs one workflow with many settings, on this machine or on many, with Ray (python -m pip install ray tqdm).

    python3 sweep.py sweep_evaluate.json --workers 2                     two ComfyUI of its own, on this machine
    python3 sweep.py workflow.json --address auto --set 9.seed=1,2,3     a ComfyUI on every GPU of a Ray cluster
    python3 sweep.py workflow.json --server 127.0.0.1:8188 --set 4.strength=0,0.5,1    ComfyUI that runs already

The workflow is in API format (in ComfyUI: Save (API Format)), or a ready job that holds one. Every combination of the
values is a job, known by its key. Each finished job is one file in the folder; run the same command again and only what
is missing runs. %key% in a text input becomes the job's key. Ray places the workers, starts them again when they or
their ComfyUI die, and repeats the jobs that were lost.
"""

import argparse
import asyncio
import contextlib
import copy
import hashlib
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

# Not resolved: a pack that is linked into custom_nodes has to find the ComfyUI around the link.
ROOT = Path(__file__).absolute().parent.parent
POLL = 0.5  # seconds between two questions to a server, at most
LOSSES = 3  # times that a job may be lost with its worker before it is left for the next run
GONE = (OSError, ValueError)  # of a server that is not there or half there; URLError and timeouts are OSErrors

# Ends a ComfyUI with the process that started it, however that one ended.
WITH_PARENT = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.path[0] = os.getcwd()
runpy.run_path("main.py", run_name="__main__")
"""


class Refused(Exception):
    """A server does not take the prompt, or a node of it failed."""


class Lost(Exception):
    """A server is silent, or answers but no longer knows the prompt, as after a restart; or no worker is left."""


class CannotRun(Exception):
    """What a sweep needs is not there; the message says what to do."""


# ---------------------------------------------------------------- jobs


def jobs_of(workflow, settings):
    """{key: prompt} of all combinations of {"node.input" or "word": [values]}; the key names them."""
    found = {}
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values))
        key = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in chosen.items()) or "only"
        found[key] = with_settings(workflow, chosen, key)
    return found


def with_settings(workflow, chosen, key=""):
    """A copy of a workflow with values put into "node.input", and %key% and %word% in its texts replaced. Raises
    ValueError."""
    prompt = copy.deepcopy(workflow)
    words = {"key": file_name(key)}
    for place, value in chosen.items():
        node, dot, name = place.partition(".")
        if not dot and f"%{place}%" in json.dumps(workflow, ensure_ascii=False):
            words[place] = str(value)
        elif not dot or node not in prompt:
            raise ValueError(f'"{place}" names no input: the workflow has the nodes {", ".join(prompt)}; write 4.seed')
        else:
            prompt[node]["inputs"][name] = value
    for node in prompt.values():
        for name, value in node["inputs"].items():
            for word, text in words.items() if isinstance(value, str) else ():
                value = value.replace(f"%{word}%", text)
            node["inputs"][name] = value
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


# ---------------------------------------------------------------- where jobs run


class Server:
    """A ComfyUI that runs already, by its address: host:port, or a URL (SwarmUI: /ComfyBackendDirect below it).

    timeout: seconds for one answer; patience: seconds for which it may be silent before it is given up.
    """

    resources = {"num_cpus": 0}  # the work is done elsewhere

    def __init__(self, address, timeout=30, patience=60.0):
        self.url = (address if "://" in address else f"http://{address}").rstrip("/")
        self.timeout, self.patience, self.client = timeout, patience, uuid.uuid4().hex

    def ask(self, path, body=None):
        """The answer to GET path, or to POST with a JSON body: bytes."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # named servers, no proxy
        with opener.open(request, timeout=self.timeout) as answer:
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
                raise Lost(f"{self.url} no longer knows the prompt")
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


class Own:
    """A ComfyUI that a worker starts, on whatever machine Ray places it.

    comfyui: its folder, else the one that is found there. python: interpreter with its packages. options: further
    options of its main.py. gpus: how many of a machine's GPUs it takes for itself. root: folder of this pack there.
    """

    def __init__(self, comfyui=None, python=None, options=(), gpus=0, root=ROOT):
        self.comfyui, self.python, self.options, self.root = comfyui, python, list(options), str(root)
        self.resources = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}

    def begin(self):
        """The running ComfyUI: an object with url and stop(). Raises what says why there is none."""
        if not (Path(self.root) / "tools" / "run").is_dir():
            return Installed(self._folder(), self.python or sys.executable, self.options)
        sys.path.insert(0, self.root)  # a checkout: found and started as run.py does
        from tools.run import comfy_server, environment, hosts

        host, own = hosts.choose(self.comfyui), environment.venv_python(hosts.environment())
        python = self.python or (own if own.is_file() else sys.executable)
        return comfy_server.Server(host.path, python, options=self.options).start()

    def _folder(self):
        around = Path(self.root).parent
        found = self.comfyui or os.environ.get("COMFYUI_PATH") or (around.name == "custom_nodes" and around.parent)
        if not found or not (Path(found) / "main.py").is_file():
            raise CannotRun(
                f"no ComfyUI found on {socket.gethostname()}: {found or 'none was named, and the pack lies in none'};"
                " give --comfyui or set COMFYUI_PATH to the folder that holds its main.py, or use --server."
            )
        return Path(found)


class Installed:
    """A ComfyUI with the pack in it, started by its own main.py at a free port of 127.0.0.1."""

    def __init__(self, folder, python, options, timeout=240):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [python, "-c", WITH_PARENT, "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        if "--database-url" in (folder / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
            command += ["--database-url", "sqlite:///:memory:"]  # the file belongs to the ComfyUI that people use
        self.log = tempfile.TemporaryFile()  # has no name that could stay behind
        self.process = subprocess.Popen(
            [*command, *options], cwd=folder, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        self._wait(timeout)

    def _wait(self, timeout):
        until = time.monotonic() + timeout
        while not Server(self.url).alive():
            if self.process.poll() is not None or time.monotonic() > until:
                self.log.seek(0)
                tail = "\n".join(self.log.read().decode("utf-8", "replace").splitlines()[-25:])
                self.stop()
                raise CannotRun(f"ComfyUI did not start on {socket.gethostname()}; its log ends with:\n{tail}")
            time.sleep(0.2)

    def stop(self):
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self.log.close()


class Worker:
    """A Ray actor: one ComfyUI and the job that runs there. It lives as long as its ComfyUI does."""

    def __init__(self, source, poll, download):
        self.source, self.poll, self.download = source, poll, download
        self.own, self.server, self.name = None, source, getattr(source, "url", "")

    async def ready(self):
        """Returns its name once the server answers. Raises CannotRun without one, Lost when it is silent too long."""
        if self.own is None and isinstance(self.source, Own):
            try:
                self.own = self.source.begin()
            except (RuntimeError, OSError) as error:  # classes that only this machine may know
                raise CannotRun(str(error)) from None
            self.server = Server(self.own.url)
            self.name = f"{self.own.url} on {socket.gethostname()}"
        until = time.monotonic() + self.server.patience
        while not self.server.alive():
            if time.monotonic() > until:
                raise Lost(f"{self.name} is given up, it was silent for {self.server.patience:.0f} seconds")
            await asyncio.sleep(0.2)
        return self.name

    async def run(self, prompt):
        """(result, {file name: content}) of a prompt. Raises Refused, or what says that the server is gone."""
        begin = time.monotonic()
        try:
            outputs = await self._outputs(prompt)
            reports, files = self._fetched(outputs)
        except (Lost, *GONE):
            if self.own is not None:
                self.own.stop()
                os._exit(1)  # Ray starts this actor again, and with it a ComfyUI
            raise
        seconds = time.monotonic() - begin
        return {"server": self.name, "seconds": seconds, "outputs": outputs, "reports": reports}, files

    async def _outputs(self, prompt):
        prompt_id, pause = self.server.start(prompt), 0.02
        try:
            while (outputs := self.server.finished(prompt_id)) is None:
                pause = min(1.3 * pause, self.poll)
                await asyncio.sleep(pause)
            return outputs
        except BaseException:
            self.server.forget(prompt_id)  # it may only have been out of reach, or this sweep is stopped
            raise

    def _fetched(self, outputs):
        """Contents of the JSON files that the outputs name, by node, and pictures if wanted, by name."""
        reports, files = {}, {}
        for node, kinds in outputs.items():
            for named in (item for items in kinds.values() if isinstance(items, list) for item in items):
                if not isinstance(named, dict) or "filename" not in named:
                    continue
                if named["filename"].endswith(".json"):
                    reports.setdefault(node, []).append(json.loads(self.server.file(named)))
                elif self.download:
                    files[Path(named["filename"]).name] = self.server.file(named)
        return reports, files

    def stop(self):
        """Ends the ComfyUI that it started."""
        if self.own is not None:
            self.own.stop()


class Pool:
    """A Ray actor that lends each job a worker. What goes wrong it passes on to Ray, which calls run again."""

    def __init__(self, sources, attempts, poll, download):
        self.sources, self.attempts, self.worker_options = sources, attempts, (poll, download)
        self.workers, self.names, self.idle, self.waiting = None, {}, [], {}
        self.refused, self.news, self.tasks = {}, [], set()

    async def run(self, turn, key, prompt):
        """Result and files of a job; those with a lower turn go first. Raises what Ray shall repeat it for."""
        self._begin()
        number = await self._lent(turn, key)
        if number is None:
            return self._failed(key)
        try:
            return await self.workers[number].run.options(max_task_retries=0).remote(prompt)
        except Refused as error:
            self.refused.setdefault(key, {})[number] = str(error.cause)
            self.news.append(f"{self.names[number]} refused {key!r}: {error.cause}")
            if len(self.refused[key]) >= self.attempts or not self._able(key):
                return self._failed(key)
            raise
        except Exception as error:
            self.news.append(f"{self.names[number]} lost {key!r} ({reason(error)})")
            raise
        finally:
            self._keep(self._welcome(number))

    def _begin(self):
        if self.workers is None:
            import ray

            self.workers = {}
            for number, source in enumerate(self.sources):
                options = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 1, **source.resources}
                self.workers[number] = ray.remote(Worker).options(**options).remote(source, *self.worker_options)
                self._keep(self._welcome(number))

    def _keep(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)  # a loop by itself does not hold its tasks
        task.add_done_callback(self.tasks.discard)

    def _able(self, key):
        return [number for number in self.workers if number not in self.refused.get(key, ())]

    async def _lent(self, turn, key):
        """The next free worker that has not refused a job, or None when none is left that has not."""
        self.waiting[turn] = key, asyncio.get_running_loop().create_future()
        self._match()
        try:
            number = await self.waiting[turn][1]
        finally:
            del self.waiting[turn]
        if number is None and key not in self.refused:
            raise Lost("no worker is left")
        return number

    def _match(self):
        """Gives what is free to what waits."""
        for _, (key, future) in sorted(self.waiting.items(), key=lambda item: item[0]):
            able = () if future.done() else self._able(key)
            free = [number for number in self.idle if number in able]
            if free:
                self.idle.remove(free[0])
                future.set_result(free[0])
            elif not able and not future.done():
                future.set_result(None)

    async def _welcome(self, number):
        """Puts a worker among the idle ones once it is ready (again); without one that is gone for good."""
        try:
            self.names[number] = await self.workers[number].ready.remote()
            self.idle.append(number)
        except Exception as error:
            del self.workers[number]
            self.news.append(reason(error))
        self._match()

    def _failed(self, key):
        reasons = self.refused[key]
        names = ", ".join(self.names[number] for number in reasons)
        return {"server": names, "error": next(iter(reasons.values()))}, {}

    async def told(self):
        """What happened since the last question, in sentences."""
        told, self.news = self.news, []
        return told

    async def stop(self):
        """Ends what the workers started; one that waits for a machine started nothing and does not answer."""
        stops = [asyncio.ensure_future(_awaited(worker.stop.remote())) for worker in (self.workers or {}).values()]
        if stops:
            await asyncio.wait(stops, timeout=10)


async def _awaited(ref):
    with contextlib.suppress(Exception):
        await ref


def reason(error):
    """What happened, of an error that came through Ray with a traceback of its own."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip()
    return text.splitlines()[0] if type(cause).__module__.startswith("ray.") else text


# ---------------------------------------------------------------- the sweep


class Sweep:
    """Runs jobs through Ray and keeps exactly one result for each key.

    jobs: {key: prompt}; sources: a Server or an Own for every worker; folder: where results go; attempts: how many
    workers may refuse a job before that counts as its result; download: whether pictures are fetched too; say: is
    given sentences.
    """

    def __init__(self, jobs, sources, folder, attempts=2, download=False, say=print, poll=POLL):
        self.jobs, self.sources, self.folder = jobs, sources, Path(folder)
        self.attempts, self.download, self.say, self.poll = attempts, download, say, poll

    def path(self, key):
        """The file of a key's result."""
        return self.folder / "jobs" / f"{file_name(key)}.json"

    def missing(self):
        """Keys without a result."""
        return [key for key in self.jobs if not self.path(key).is_file()]

    def run(self):
        """Runs what is missing, in the Ray that is connected or one of this machine; {key: result}, also written to
        results.json. Results of jobs that failed have an "error"; those that were lost every time are missing."""
        missing = self.missing()
        if len(missing) < len(self.jobs):
            self.say(f"{len(self.jobs) - len(missing)} of {len(self.jobs)} jobs are there already")
        if missing:
            with connected(workers=len(self.sources)) as ray:
                self._run(ray, missing)
        return self.merged()

    def merged(self):
        """{key: result} of everything that is there, in the order of the jobs; writes results.json."""
        found = {}
        for key in self.jobs:
            if self.path(key).is_file():
                found[key] = json.loads(self.path(key).read_text(encoding="utf-8"))
        write_whole(self.folder / "results.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
        return found

    def _run(self, ray, missing):
        # beside this program, so that a lost machine takes its workers only
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": len(missing) + 10}
        options["scheduling_strategy"] = here
        pool = ray.remote(Pool).options(**options).remote(self.sources, self.attempts, self.poll, self.download)
        run = pool.run.options(max_task_retries=LOSSES - 1 + self.attempts, retry_exceptions=True)
        running = {run.remote(turn, key, self.jobs[key]): key for turn, key in enumerate(missing)}
        try:
            self._collect(ray, pool, running)
        except BaseException:
            for ref in running:
                ray.cancel(ref)
            ray.wait(list(running), num_returns=len(running), timeout=5)
            raise
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(pool.stop.remote(), timeout=30)
            ray.kill(pool)  # and with it its workers

    def _collect(self, ray, pool, running):
        """Keeps results as they come, with a bar on a terminal."""
        from tqdm import tqdm

        total = len(self.jobs)
        with tqdm(total=total, initial=total - len(running), unit="job", disable=None, smoothing=0) as bar:
            while running:
                done, _ = ray.wait(list(running), timeout=1)
                for text in ray.get(pool.told.remote()):
                    self.say(text)
                for ref in done:
                    key = running[ref]
                    try:
                        self._keep(key, *ray.get(ref), left=len(running) - 1)
                    except ray.exceptions.RayError as error:
                        self.say(f"{key}: has no result, {reason(error)}")
                    del running[ref]
                    bar.update()

    def _keep(self, key, result, files, left):
        for name, content in files.items():
            write_whole(self.folder / "files" / file_name(key) / name, content)
        write_whole(self.path(key), json.dumps({"key": key, **result}, ensure_ascii=False).encode())
        self.say(f"{key}: {result.get('error', 'done')} on {result['server']}, {left} left")


@contextlib.contextmanager
def connected(address=None, workers=0):
    """Ray, connected to a cluster by its address or started on this machine, with ports on the loopback only.

    Nothing is started or ended when it is connected already. Raises CannotRun.
    """
    if not address:
        # Ray's own names: the address of a machine that is not part of a cluster is 127.0.0.1; nothing is sent home
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import tqdm  # noqa: F401 - said here, not in the middle
    except ImportError as error:
        raise CannotRun(f"A sweep needs {error.name}, which is not installed: python -m pip install ray tqdm") from None
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other machines need not have this file
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdigit():  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), 10).close()
            ray.init(address, **quiet)
        else:
            ray.init("local", include_dashboard=False, num_cpus=max(workers, os.cpu_count() or 1), **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise CannotRun(f"Ray cannot be reached at {address or 'this machine'}: {reason(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- command line


def parse_setting(text):
    """("node.input" or "word", [values]) of "4.strength=0,0.5,1"; a JSON list takes values with commas. Raises
    ValueError."""
    place, equals, values = text.partition("=")
    if not equals or not place:
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


def read_jobs(file, settings, lines=None):
    """{key: prompt} of a workflow or ready job, with [(place, values)] before its own and a file with a job a line."""
    workflow, ready = json.loads(file.read_text(encoding="utf-8")), {}
    if "workflow" in workflow and "class_type" not in workflow["workflow"]:
        workflow, ready = workflow["workflow"], workflow.get("set", {})
    if lines is None:
        return jobs_of(workflow, {**ready, **dict(settings)})
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {line["key"]: with_settings(workflow, line["set"], line["key"]) for line in found}


def sources_of(args, ray):
    """A Server or an Own for every worker that the command line asks for."""
    servers = [Server(address, patience=args.patience) for address in dict.fromkeys(args.server)]
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = args.workers if args.workers is not None else 0 if servers else gpus or 1
    own = Own(args.comfyui, args.python, shlex.split(args.options), gpus=min(gpus, 1))
    return servers + [own] * count


def parser():
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("workflow", type=Path, help="workflow in API format, or a ready job")
    top.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=V,V", help="values to go through")
    top.add_argument("--jobs", type=Path, help='file with a job a line: {"key": "...", "set": {"4.seed": 1}}')
    top.add_argument("--out", type=Path, default=Path("sweep"), help="folder for the results (default: sweep)")
    top.add_argument("--download", action="store_true", help="fetch pictures and other files too")
    top.add_argument("--dry-run", action="store_true", help="list the jobs and which of them are done, run nothing")
    top.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="how many ComfyUI to start (default: one a GPU, or one; none with --server)",
    )
    top.add_argument("--server", action="append", default=[], help="address of a ComfyUI that runs; may be repeated")
    top.add_argument("--patience", type=float, default=60.0, help="seconds a server may be silent (default: 60)")
    top.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="of a Ray cluster: auto, host:6379 (default: this machine)",
    )
    top.add_argument("--comfyui", metavar="PATH", help="folder of the ComfyUI to start (or COMFYUI_PATH)")
    top.add_argument("--python", metavar="PATH", help="interpreter with the packages of that ComfyUI")
    top.add_argument("--options", default="", help="further options of that ComfyUI, such as --options=--lowvram")
    return top


def main(argv=None):
    top = parser()
    args = top.parse_args(argv)
    try:
        jobs = read_jobs(args.workflow, map(parse_setting, args.set), args.jobs)
    except (OSError, ValueError, KeyError) as error:
        top.error(str(error))
    sweep = Sweep(jobs, [], args.out, download=args.download)
    if args.dry_run:
        missing = set(sweep.missing())
        for key in jobs:
            print(f"{'to do' if key in missing else 'done '}  {key}")
        print(f"{len(jobs)} jobs, {len(missing)} to do")
        return 0
    try:
        with connected(args.address, args.workers or 1) as ray:
            from tqdm import tqdm

            sweep.sources, sweep.say = sources_of(args, ray), tqdm.write
            found = sweep.run()
    except CannotRun as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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
