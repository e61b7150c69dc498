"""One command for newcomers and developers of Membrane; run it with Python 3.10 or newer.

    python run.py demo [--out FOLDER] [--comfyui PATH]   see an erasure work, pictures into output/
    python run.py gui [--comfyui PATH] [--port N]        open ComfyUI with this pack in the browser
    python run.py test [pytest options]                  run the tests on every ComfyUI known here
    python run.py bench [NAME [OPTIONS]]                 run a benchmark (without NAME: list them)

The first call creates .venv next to this file and installs two ComfyUIs into it, an old and a
newer one; nothing outside this folder is changed. --comfyui (or the environment variable
COMFYUI_PATH) names another ComfyUI; a pack that lies in a ComfyUI's custom_nodes folder uses
that one. Otherwise demo, gui and bench use the newer of the two.
"""

import argparse
import signal
import sys
from pathlib import Path

import tools  # noqa: F401  registers the repository as the package membrane
from membrane.tools.run import bench, comfy_server, gui, hosts, tests
from membrane.tools.run.environment import ensure_environment
from membrane.tools.run.messages import Failure, say
from membrane.tools.run.processes import Terminated, run_openly


def demo(args):
    """See an erasure work: pictures before and after into a folder."""
    out = Path(args.out).absolute()
    hosts.check_early(args.comfyui)
    python = ensure_environment()
    host = hosts.choose(args.comfyui)
    return run_openly([python, "-m", "tools.demo", "--out", out, "--comfyui", host.path])


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
    one = commands.add_parser("gui", help=gui.gui.__doc__)
    one.add_argument("--comfyui", metavar="PATH", help="folder of the ComfyUI to use")
    one.add_argument("--port", type=port_number, metavar="N", help="port to serve at (default: a free one)")
    commands.add_parser("test", help=tests.test.__doc__, add_help=False)
    one = commands.add_parser("bench", help=bench.bench.__doc__)
    one.add_argument("name", nargs="?", metavar="NAME", help="benchmark to run; without it they are listed")
    one.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark's own, --help tells them")
    return top


def main(argv):
    """Run one command; returns the exit code."""
    top = parser()
    if argv[:1] == ["test"]:
        if argv[1:] in (["-h"], ["--help"]):
            say("usage: run.py test [pytest options and test files]\n\n" + tests.test.__doc__)
            return 0
        return tests.test(argv[1:])
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 2
    return {"demo": demo, "gui": gui.gui, "bench": bench.bench}[args.command](args)


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
