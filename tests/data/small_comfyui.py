"""As much of a ComfyUI as a sweep starts and asks: main.py of a folder that test_sweep.py makes.

Each prompt takes --takes seconds. --log gets a line "process seed" for each prompt that begins; the process ends with
the prompt whose seed is --dies-of.
"""

import argparse
import json
import math
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

options = argparse.ArgumentParser()
options.add_argument("--listen")
options.add_argument("--port", type=int)
options.add_argument("--disable-auto-launch", action="store_true")
options.add_argument("--log")
options.add_argument("--takes", type=float, default=0.02)
options.add_argument("--dies-of", type=int)
args = options.parse_args()
begun = {}  # prompt id: (time, seed)


class Handler(BaseHTTPRequestHandler):
    def answer(self, data):
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        over = {name: seed for name, (start, seed) in begun.items() if time.monotonic() > start + args.takes}
        if self.path == "/queue":
            self.answer({"queue_running": [[0, name] for name in begun if name not in over], "queue_pending": []})
        elif self.path.startswith("/view"):
            self.answer({"picture": self.path})
        else:
            name = self.path.rsplit("/", 1)[1]
            outputs = {"2": {"text": [f"seed {over.get(name)}"], "images": [{"filename": f"{over.get(name)}.png"}]}}
            self.answer({name: {"outputs": outputs, "status": {}}} if name in over else {})

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("prompt")
        if prompt is None:
            return self.answer({})
        seed, name = prompt["1"]["inputs"]["seed"], f"p{len(begun)}"
        with open(args.log, "a") as log:
            log.write(f"{os.getpid()} {seed}\n")
        if seed == args.dies_of:
            threading.Timer(0.1, os._exit, (1,)).start()
        begun[name] = (math.inf if seed == args.dies_of else time.monotonic()), seed
        return self.answer({"prompt_id": name, "node_errors": {}})

    def log_message(self, *args):
        pass


ThreadingHTTPServer((args.listen, args.port), Handler).serve_forever()
