"""Child processes that never outlive this program, and pip among them."""

import os
import signal
import subprocess
import sys
import tempfile

from .. import ROOT
from .messages import Failure


class Terminated(KeyboardInterrupt):
    """SIGTERM: unlike Ctrl-C it did not reach the programs started from here."""


def end_child(child):
    """End a child process, friendly first."""
    for action, patience in ((None, 10), (child.terminate, 5), (child.kill, 5)):
        if action is not None:
            action()
        try:
            child.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def end_children(children, error):
    """End child processes because of what stopped this program, all at the same time."""
    if isinstance(error, Terminated):
        for child in children:
            child.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    for child in children:
        end_child(child)


def supervise(child):
    """Exit code of a child; when this program is stopped, the child is stopped first."""
    try:
        return child.wait()
    except BaseException as error:
        end_children([child], error)
        raise


def run_quietly(command):
    """(exit code, last lines of the output) of a command that shows nothing."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        code = supervise(child)
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return code, "\n".join(lines[-15:])


def run_openly(command, **env):
    """Exit code of a command that shows its output."""
    sys.stdout.flush()
    return supervise(subprocess.Popen([str(part) for part in command], cwd=ROOT, env={**os.environ, **env}))


def show_and_keep_last_line(command, folder=ROOT):
    """(exit code, last line) of a command that runs in a folder; every line but the last non-empty one is shown."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [str(part) for part in command], cwd=folder, env=env, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    last = ""
    try:
        for line in child.stdout:
            if last and line.strip():
                print(last, end="", flush=True)
                last = ""
            if line.strip():
                last = line
            elif last:
                last += line
            else:
                print(line, end="", flush=True)
    except BaseException as error:
        if isinstance(error, Terminated):
            child.terminate()
        end_child(child)
        raise
    code = supervise(child)
    if code and last:
        print(last, end="", flush=True)
    return code, last.strip()


def pip_install(python, *what):
    """pip install, quiet; on failure its last lines and one sentence."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *what]
    code, output = run_quietly(command)
    if code:
        raise Failure(
            f"pip could not install {' '.join(what)} (exit code {code}); its last lines:\n{output}\n"
            "Check the network and free disk space, then run the same command again: it goes on from here."
        )
