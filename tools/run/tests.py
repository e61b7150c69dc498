"""The test run: without a host, and on every ComfyUI known here."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

from .. import ROOT
from . import hosts
from .environment import ensure_environment
from .messages import Failure, say
from .processes import end_children, run_openly
from .reports import read_report, report_options

# Folders of tests that run on each host: with a server of it, and in its process. All others need no host.
SERVED, IN_PROCESS = ("workflows", "browser"), ("host",)
INSIDE = "host "  # beginning of the title of a run in a host's process
LONG, LONGEST = 10, 40  # from so many seconds on a test is listed, and so many are


def split_test_args(args):
    """Arguments of the run without a host, of each host's run with a server and of each host's own run, or None each.

    Paths among the arguments choose what runs; without any, everything does.
    """
    tests = ROOT.resolve() / "tests"
    groups = [[tests / name for name in names] for names in (SERVED, IN_PROCESS)]
    chosen, options = ([], [], []), []
    for arg in args:
        file = (Path.cwd() / arg.split("::")[0]).resolve()
        if arg.startswith("-") or not file.exists():
            options.append(arg)
        elif file == tests:
            return split_test_args([other for other in args if other != arg])
        else:
            kind = next((i for i, group in enumerate(groups, 1) if {file, *file.parents} & set(group)), 0)
            chosen[kind].append(str(file) + arg[len(arg.split("::")[0]) :])
    if not any(chosen):
        served, in_process = ([os.path.join("tests", name) for name in names] for names in (SERVED, IN_PROCESS))
        chosen = (["tests", *(f"--ignore={name}" for name in served + in_process)], served, in_process)
    return tuple(paths + options if paths else None for paths in chosen)


def test(args):
    """Run the tests: once without a host, then on every ComfyUI known here, with a server of it and in its process.

    Those marked slow run on the oldest and the newest of them, unless -m or MEMBRANE_HOST says otherwise. A test that
    is skipped for a reason that is not in tests/allowed_skips.txt fails.
    """
    hosts.check_early(None)
    python = ensure_environment()
    general, *of_hosts = split_test_args(args)
    plan = [] if general is None else [("tests without a host", general, None)]
    if any(of_hosts):
        plan += host_runs(of_hosts, not any(arg.startswith("-m") for arg in args))
    env = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
    interactive = {"-s", "--capture=no", "--pdb", "--trace"} & set(args)
    # one more than there are cores: the runs in the page wait most of the time
    workers = 1 if interactive else min((os.cpu_count() or 1) + 1, 4)
    if workers > 1:
        plan = long_ones_first(plan)
    with tempfile.TemporaryDirectory(prefix="membrane-tests-") as folder:
        reports = [Path(folder) / f"{number}.xml" for number in range(len(plan))]
        jobs = []
        for (title, arguments, host), report in zip(plan, reports):
            command = [python, "-m", "pytest", *arguments, *report_options(report)]
            jobs.append((title, command, env if host is None else {**env, "MEMBRANE_HOST": str(host.path)}))
        results = run_jobs(jobs, workers)
        show_summary(results, [read_report(report) for report in reports])
    return overall_code([code for _, code, _ in results])


def host_runs(of_hosts, may_be_brief):
    """[(title, arguments for pytest, Host)] of the runs on every host."""
    wanted = os.environ.get("MEMBRANE_HOST")
    known = [hosts.named(wanted)] if wanted else hosts.known_hosts()
    if not known:
        raise Failure("no ComfyUI found to test on; delete the environment and run this again, or set COMFYUI_PATH.")
    between = known[1:-1]
    runs = []
    for host in sorted(known, key=lambda host: host in between):
        brief = ["-m", "not slow"] if host in between and may_be_brief else []
        for title, arguments in zip((f"server and page of {host.label}", f"{INSIDE}{host.label}"), of_hosts):
            if arguments is not None:
                runs.append((title, [*arguments, *brief], host))
    return runs


def long_ones_first(plan):
    """The same runs in the order in which they begin side by side, so that none is left alone at the end: those in the
    process of a host take longest, of the newest most."""
    inside = [run for run in plan if run[2] is not None and run[0].startswith(INSIDE)]
    return [*reversed(inside), *(run for run in plan if run not in inside)]


def show_summary(results, reports):
    """Print a line for each run, then how many tests were skipped, and why, then which took longest."""
    say("\n===== summary =====")
    for (title, code, seconds), report in zip(results, reports):
        say(f"{outcome(code):20} {seconds:5.0f} s  {title}" + (f": {report.counts}" if report else ""))
    for (title, _, _), report in zip(results, reports):
        for reason, count in sorted(report.skipped.items()) if report else ():
            say(f"skipped {count:12}         {title}: {reason}")
    taken = [(seconds, title, name) for (title, *_), report in zip(results, reports) if report
             for name, seconds in report.seconds.items() if seconds >= LONG]  # fmt: skip
    for seconds, title, name in sorted(taken, reverse=True)[:LONGEST]:
        say(f"long {seconds:15.0f} s  {title}: {name}")


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
