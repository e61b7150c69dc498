"""ComfyUI with this pack, open in the browser."""

import os
import shutil
import sys
import webbrowser

from .. import ROOT
from . import comfy_server, hosts
from .environment import ensure_environment
from .messages import Failure, say
from .packages import front_end_for


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
    hosts.check_early(args.comfyui)
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
