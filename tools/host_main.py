"""Starts the main.py of a ComfyUI folder: host_main.py HOST_FOLDER [ComfyUI options].

Adds --cpu on a machine without a GPU that torch can use, and repairs torchvision where needed.
"""

import ctypes
import importlib.util
import os
import re
import runpy
import sys
import threading


def torch_backend():
    """'cuda', 'hip' or None, read from torch's version file without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
        text = file.read()
    for name in ("cuda", "hip"):
        found = re.search(rf"^{name}\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
        if found and found.group(1).strip() != "None":
            return name
    return None


def cuda_devices():
    """How many CUDA devices the driver shows (0 without a driver)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def exit_with_parent():
    """End this process when the one that started it is gone, however it went."""

    def watch():
        try:
            while os.read(0, 1024):
                pass
        except OSError:
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main():
    host, options = os.path.abspath(sys.argv[1]), sys.argv[2:]
    if os.environ.pop("MEMBRANE_EXIT_WITH_PARENT", None):
        exit_with_parent()
    backend = torch_backend()
    if "--cpu" not in options and not (backend == "hip" or (backend == "cuda" and cuda_devices())):
        options.append("--cpu")
    # With a CUDA torch the registry's torchvision works, and the newest hosts want to set up
    # their memory management before torch is imported.
    if backend is None:
        from torch_shim import install

        install()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [host] + [p for p in sys.path if os.path.abspath(p or os.curdir) != here]
    script = os.path.join(host, "main.py")
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
