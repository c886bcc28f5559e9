#!/usr/bin/python3
"""Stands in for fathom-worker, fathom-coordinator and fathom-gateway in tests of the launcher.

It is copied under those names into a folder. What it does is told by files there:
  plan.json          what `fathom-worker --check` prints
  PROGRAM.refusal    if it is there: PROGRAM --check prints it on stderr and exits 78
  NAME.exit          if it is there: NAME prints a line and exits with this code at once
  NAME.stubborn      if it is there: NAME ignores SIGTERM
  NAME.slow          if it is there: NAME takes half a second to drain
and what it did is appended to `events`: lines `start NAME PID`, `term NAME`, `drained NAME`,
`reload NAME`.
"""

import http.server
import os
import pathlib
import signal
import ssl
import sys
import time

PROGRAM = pathlib.Path(sys.argv[0])
FOLDER = PROGRAM.parent


def flag(name):
    return sys.argv[sys.argv.index(name) + 1]


def name():
    if PROGRAM.name == "fathom-worker":
        return pathlib.Path(flag("--listen").removeprefix("unix:")).stem  # worker-3
    return PROGRAM.name.removeprefix("fathom-")


def record(event):
    with open(FOLDER / "events", "a", encoding="utf-8") as events:
        events.write(event + "\n")


def check():
    refusal = FOLDER / f"{PROGRAM.name.removeprefix('fathom-')}.refusal"
    if refusal.exists():
        print(refusal.read_text(), file=sys.stderr)
        sys.exit(78)
    if PROGRAM.name == "fathom-worker":
        print((FOLDER / "plan.json").read_text())
    sys.exit(0)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *unused):
        pass


def on_term(*unused):
    record(f"term {name()}")
    if (FOLDER / f"{name()}.slow").exists():
        time.sleep(0.5)
        record(f"drained {name()}")
    if not (FOLDER / f"{name()}.stubborn").exists():
        os._exit(0)


if "--check" in sys.argv:
    check()
signal.signal(signal.SIGTERM, on_term)
signal.signal(signal.SIGHUP, lambda *unused: record(f"reload {name()}"))
record(f"start {name()} {os.getpid()}")
print(f"this is {name()}", flush=True)
if (FOLDER / f"{name()}.exit").exists():
    print(f"{name()} cannot go on", file=sys.stderr)
    sys.exit(int((FOLDER / f"{name()}.exit").read_text()))
if name() == "gateway":
    server = http.server.HTTPServer((flag("--host"), int(flag("--port"))), Health)
    if "--ssl-certfile" in sys.argv:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(flag("--ssl-certfile"), flag("--ssl-keyfile"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
while True:
    signal.pause()
