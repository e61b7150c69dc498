"""Starts a ComfyUI of its own, headless, with this pack in it, and talks to it over HTTP."""

import atexit
import json
import os
import re
import shutil
import signal
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

from .. import ROOT

PACK_NAME = "membrane"
LOG_LINES_SHOWN = 25

# A proxy named in the environment must not get to see requests to this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The host did not start, went away, or answered something unexpected."""


class PromptError(ServerError):
    """The host refused a prompt; the message names node and reason."""


class ExecutionFailed(ServerError):
    """A queued prompt failed; node_id, node_type and reason say where and why."""

    def __init__(self, message, node_id=None, node_type=None, reason=""):
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.reason = reason


def free_port():
    """A TCP port of 127.0.0.1 that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_free(port):
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def extra_paths_yaml(entries):
    """Text for --extra-model-paths-config: folder kind -> folder, any characters in the path."""
    # JSON strings are YAML strings, and ASCII survives hosts that read the file in the system's encoding.
    lines = [f"    {kind}: {json.dumps(str(folder))}\n" for kind, folder in entries.items()]
    return f"{PACK_NAME}:\n" + "".join(lines)


def link_folder(link, target):
    """Make link lead to the folder target: a symlink, on Windows a junction, else a copy."""
    try:
        os.symlink(target, link, target_is_directory=True)
        return
    except OSError:
        pass
    try:
        from _winapi import CreateJunction

        CreateJunction(str(target), str(link))
    except (ImportError, OSError):
        skipped = shutil.ignore_patterns(".*", "__pycache__", "output", "training", "node_modules")
        shutil.copytree(target, link, ignore=skipped)


def unlink_folder(link):
    """Undo link_folder without touching what the link led to."""
    try:
        os.unlink(link)
    except OSError:
        try:
            os.rmdir(link)
        except OSError:
            shutil.rmtree(link, ignore_errors=True)


def pack_installed_in(host, root=ROOT):
    """Whether the pack already lies in (or is linked into) the host's custom_nodes."""
    folder = Path(host) / "custom_nodes"
    if not folder.is_dir():
        return False
    return any(entry.resolve() == Path(root).resolve() for entry in folder.iterdir())


def option_names(host):
    """Text of the host's command line definition, to look option names up in."""
    return (Path(host) / "comfy" / "cli_args.py").read_text(encoding="utf-8")


def refusal_sentence(answer, prompt=None):
    """One sentence out of the body of a 400 answer to POST /prompt."""
    error = answer.get("error") if isinstance(answer, dict) else answer
    reasons = []
    node_errors = answer.get("node_errors") if isinstance(answer, dict) else None
    for node_id, entry in (node_errors or {}).items():
        for reason in entry.get("errors", []):
            text = _message_and_details(reason)
            reasons.append(f"node {node_id} ({entry.get('class_type', 'unknown class')}): {text}")
    if not reasons:
        reasons.append(_message_and_details(error) if isinstance(error, dict) else str(error))
    return "ComfyUI refused the prompt: " + "; ".join(reasons)


def _message_and_details(reason):
    message, details = str(reason.get("message", "")).strip(), str(reason.get("details", "")).strip()
    return f"{message} ({details})" if message and details else message or details or str(reason.get("type"))


def failure_of(entry):
    """ExecutionFailed for a history entry of a prompt that failed or was interrupted, else None."""
    status = entry.get("status") or {}
    for event, data in status.get("messages", []):
        node_id, node_type = data.get("node_id"), data.get("node_type")
        if event == "execution_error":
            kind, reason = data.get("exception_type", ""), str(data.get("exception_message", "")).strip()
            text = f"node {node_id} ({node_type}) failed: {reason or kind}"
            return ExecutionFailed(text, node_id, node_type, reason or kind)
        if event == "execution_interrupted":
            return ExecutionFailed(f"the run was interrupted at node {node_id} ({node_type})", node_id, node_type)
    if status.get("status_str") == "error":
        return ExecutionFailed("the prompt failed, and ComfyUI does not say where; see the server's log")
    return None


class Server:
    """A private ComfyUI server; use as context manager.

    host: ComfyUI folder. python: interpreter with the host's packages. work: folder for outputs,
    inputs, user data and the log (a temporary one, removed at the end, when None). port: a free
    one when None. model_paths: further {folder kind: folder} entries. options: more ComfyUI
    options. Nothing of a server that runs already is touched.
    """

    def __init__(
        self,
        host,
        python=sys.executable,
        work=None,
        port=None,
        front_end=None,
        model_paths=None,
        options=(),
        timeout=240,
    ):
        self.host = Path(host).absolute()
        self.python = str(python)
        self.port = port
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self.process = None
        self.work = Path(work).absolute() if work else None
        self._own_work = work is None
        self._front_end = front_end
        self._model_paths = dict(model_paths or {})
        self._options = list(options)
        self._log = None
        self._link = None
        self._log_kept = ""

    @property
    def url(self):
        """Address of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self):
        """Folder the host saves pictures in."""
        return self.work / "output"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_exc):
        self.stop()

    def start(self):
        """Start the host and wait until it answers; raises ServerError with the log's last lines."""
        if self.port is None:
            self.port = free_port()
        elif not port_is_free(self.port):
            raise ServerError(f"port {self.port} is already in use; stop what uses it or choose another with --port.")
        atexit.register(self.stop)
        try:
            self._prepare()
            self._spawn()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _prepare(self):
        if self.work is None:
            self.work = Path(tempfile.mkdtemp(prefix="membrane-server-"))
        for name in ("output", "input", "temp", "user"):
            (self.work / name).mkdir(parents=True, exist_ok=True)

    def command(self):
        """The command line the host is started with (prepares the files it names)."""
        known = option_names(self.host)
        command = [self.python, str(ROOT / "tools" / "host_main.py"), str(self.host)]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        for kind in ("output", "input", "temp"):
            command += [f"--{kind}-directory", str(self.work / kind)]
        if '"--user-directory"' in known:
            command += ["--user-directory", str(self.work / "user")]
        if '"--database-url"' in known:
            command += ["--database-url", "sqlite:///" + (self.work / "user" / "comfyui.db").as_posix()]
        front_end = self._front_end
        if front_end is None and not (self.host / "web").is_dir() and '"--front-end-root"' in known:
            # Newer hosts exit when their separately installed front end is missing.
            front_end = self.work / "no_front_end"
            front_end.mkdir(exist_ok=True)
            (front_end / "index.html").write_text("<p>This ComfyUI runs without its web page.</p>\n", encoding="utf-8")
        if front_end is not None:
            command += ["--front-end-root", str(front_end)]
        entries = dict(self._model_paths)
        if not pack_installed_in(self.host):
            folder = self.work / "custom_nodes"
            folder.mkdir(exist_ok=True)
            self._link = folder / PACK_NAME
            unlink_folder(self._link)
            link_folder(self._link, ROOT)
            entries["custom_nodes"] = folder
        if entries:
            file = self.work / "extra_model_paths.yaml"
            file.write_text(extra_paths_yaml(entries), encoding="utf-8")
            command += ["--extra-model-paths-config", str(file)]
        return command + self._options

    def _spawn(self):
        command = self.command()
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "MEMBRANE_EXIT_WITH_PARENT": "1"}
        # Threads that wait by spinning make a host a hundred times slower as soon as anything else is busy.
        for name, value in (("OMP_NUM_THREADS", "2"), ("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0")):
            env.setdefault(name, value)
        # The repository on the path would put our "nodes" before the host's.
        env.pop("PYTHONPATH", None)
        group = {"start_new_session": True}
        if os.name == "nt":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._log = open(self.work / "server.log", "wb")
        self.process = subprocess.Popen(
            command, cwd=self.work, env=env, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, **group
        )

    def _wait_until_ready(self):
        start = time.monotonic()
        while True:
            self._check_alive("while starting")
            try:
                self.get("/object_info")
                # Somebody else may have taken the port in between; then ours is about to end.
                self._check_alive("while starting")
                return
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() - start > self.timeout:
                raise ServerError(
                    f"the ComfyUI in {self.host} did not answer within {self.timeout:.0f} seconds;"
                    f" its log ends with:\n{self.log_tail()}"
                )
            time.sleep(0.2)

    def _check_alive(self, when):
        if self.process is None:
            raise ServerError(f"the ComfyUI in {self.host} is not running")
        code = self.process.poll()
        if code is not None:
            raise ServerError(
                f"the ComfyUI in {self.host} ended {when} (exit code {code}); its log ends with:\n{self.log_tail()}"
            )

    def log_text(self):
        """Everything the host wrote so far; stays readable after the end."""
        try:
            text = (self.work / "server.log").read_text(encoding="utf-8", errors="replace")
            return re.sub(r"\x1b\[[0-9;]*m", "", text)
        except (OSError, TypeError):
            return self._log_kept

    def log_tail(self, lines=LOG_LINES_SHOWN):
        """The last lines the host wrote."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self):
        """End the host (whole process group) and remove what was made for it; safe to call twice."""
        atexit.unregister(self.stop)
        process = self.process
        self.process = None
        try:
            if process is not None:
                self._end(process)
        finally:
            if self._log is not None:
                self._log.close()
                self._log = None
            if self.work is not None:
                self._log_kept = self.log_text()
            if self._link is not None:
                unlink_folder(self._link)
                self._link = None
            if self._own_work and self.work is not None:
                shutil.rmtree(self.work, ignore_errors=True)

    def _end(self, process):
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                pass
        if os.name == "nt":
            if process.poll() is None:
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        else:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        if process.poll() is None:
            process.kill()
        process.wait()
        try:
            process.stdin.close()
        except OSError:
            pass

    def _request(self, path, body=None, timeout=120):
        data = None if body is None else json.dumps(body).encode("utf-8")
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with _OPENER.open(request, timeout=timeout) as answer:
            content = answer.read()
            if "json" not in answer.headers.get("Content-Type", ""):
                return content
        return json.loads(content)

    def get(self, path):
        """Answer to GET path: parsed JSON, or bytes for anything else."""
        return self._request(path)

    def post(self, path, obj):
        """Answer to POST path with a JSON body: parsed JSON, or bytes (empty for no answer)."""
        return self._request(path, obj)

    def object_info(self):
        """What every node class of the host looks like: {class name: description}."""
        return self.get("/object_info")

    def queue(self, prompt):
        """Queue an API-format prompt and return its id; PromptError when the host refuses (part of) it."""
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            raise self._refusal(prompt, error) from None
        if answer.get("node_errors"):
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptError(refusal_sentence(answer))
        return answer["prompt_id"]

    def _refusal(self, prompt, error):
        # The oldest hosts answer an unknown class with an empty 500.
        known = self.object_info()
        for node_id, node in prompt.items():
            name = node.get("class_type")
            if name not in known:
                return PromptError(f"ComfyUI refused the prompt: node {node_id}: it has no node class '{name}'")
        try:
            return PromptError(refusal_sentence(json.loads(error.read())))
        except ValueError:
            return PromptError(f"ComfyUI answered with HTTP {error.code}; its log ends with:\n{self.log_tail()}")

    def wait(self, prompt_id, on_tick=None, timeout=None):
        """History entry of a prompt once it is done.

        on_tick(seconds waited) is called a few times a second. Raises ExecutionFailed when a
        node failed or the run was interrupted, ServerError when the host went away or timeout
        (seconds) passed.
        """
        start = time.monotonic()
        pause = 0.05
        while True:
            self._check_alive("during a run")
            try:
                entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            except (urllib.error.URLError, ConnectionError):
                entry = None
            if entry is not None:
                failure = failure_of(entry)
                if failure is not None:
                    raise failure
                return entry
            waited = time.monotonic() - start
            if timeout is not None and waited > timeout:
                raise ServerError(
                    f"the prompt was not done after {timeout:.0f} seconds; its log ends with:\n{self.log_tail()}"
                )
            if on_tick is not None:
                on_tick(waited)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.3)

    def images(self, entry):
        """Pictures of a history entry, as [(file name, bytes)] in the order of the nodes' outputs."""
        found = []
        for output in entry.get("outputs", {}).values():
            for image in output.get("images", []):
                where = {"subfolder": image.get("subfolder", ""), "type": image.get("type", "output")}
                query = urllib.parse.urlencode({"filename": image["filename"], **where})
                found.append((image["filename"], self.get(f"/view?{query}")))
        return found

    def interrupt(self):
        """Ask the host to stop the prompt that is running."""
        self.post("/interrupt", {})
