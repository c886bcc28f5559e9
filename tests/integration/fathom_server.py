"""`fathom serve` as a test sees it: a launcher, its children, their logs and an HTTP port.

    with FathomServer(model, "--block-size", "1", tensor_parallel_size=8) as server:
        server.client.complete(prompt=[1, 2], max_tokens=4)

Leaving the block sends SIGTERM and asserts that the launcher exits 0 and nothing is left behind.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from http_client import HOST, Client

# What a process prints when it finds a bug of ours; the restart would hide it from the test.
BUG_SIGNS = r"CHECK failed|Sanitizer|runtime error:|Assertion `|terminate called|SIGSEGV|SIGABRT"

ROLES = ("fathom-coordinator", "fathom-worker", "fathom-gateway")


class ServerDied(Exception):
    """The launcher ended before it was ready; carries its exit code and its log."""

    def __init__(self, returncode, log):
        super().__init__(f"fathom serve exited {returncode} before it was ready:\n{log[-4000:]}")
        self.returncode = returncode
        self.log = log


class FathomServer:
    """One running system. Not thread-safe, but `client` is."""

    # Set once by conftest.py.
    binaries = None  # the folder with the programs
    device = "cpu"

    def __init__(self, model, *flags, tensor_parallel_size=1, port=None,
                 startup_timeout_seconds=120):
        self.port = port or free_port()
        self.client = Client(self.port)
        self.command = [str(self.binaries / "fathom"), "serve", str(model), "--host", HOST,
                        "--port", str(self.port), "--tensor-parallel-size",
                        str(tensor_parallel_size), *map(str, flags)]
        if self.device != "cpu":
            # The machine that tests have had so far has one GPU: all workers share it.
            gpus = [] if "--gpus" in flags else ["--gpus", ",".join(["0"] * tensor_parallel_size)]
            self.command += ["--device", self.device, *gpus]
        self.startup_timeout_seconds = startup_timeout_seconds
        self.process = None
        self._stopped = False
        self._seen = set()  # (pid, start time) of every process that was ever below us

    def __enter__(self):
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(self, exception_type, *_):
        if exception_type is not None:
            print(f"--- log of {' '.join(self.command)}\n{self.log()[-6000:]}", file=sys.stderr)
            self._tear_down()
        elif not self._stopped:
            self.stop()

    # Starting.

    def start(self):
        """Starts the launcher, and does not wait."""
        self._scratch = tempfile.TemporaryDirectory(prefix="fathom-test-")
        self._log_path = Path(self._scratch.name) / "log"
        self.run_directories = Path(self._scratch.name) / "run"
        self.run_directories.mkdir(mode=0o700)
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=dict(os.environ, XDG_RUNTIME_DIR=str(self.run_directories)))

    def wait_until_ready(self):
        """Returns when /health says 200; raises ServerDied when the launcher ends instead."""
        deadline = time.monotonic() + self.startup_timeout_seconds
        while not self.is_healthy():
            if self.process.poll() is not None:
                raise ServerDied(self.process.returncode, self.log())
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready in time:\n{self.log()[-4000:]}")
            time.sleep(0.05)
        self.descendants()

    def is_healthy(self):
        """Whether GET /health answers 200 now."""
        try:
            return self.client.get("/health").status == 200
        except OSError:
            return False

    # Looking.

    def log(self):
        """Everything the launcher and its children have written so far."""
        return self._log_path.read_text(errors="replace")

    def descendants(self):
        """Pids of every process below the launcher now."""
        pids = descendants_of(self.process.pid)
        self._seen |= {(pid, start_time(pid)) for pid in pids}
        return pids

    def pids(self, role):
        """Pids of the children that run this program, e.g. "fathom-worker"."""
        return [pid for pid in self.descendants() if program_of(pid) == role]

    def pids_of_children(self):
        """Pids of the coordinator, the workers and the gateway, as far as they run."""
        return [pid for role in ROLES for pid in self.pids(role)]

    def rss_bytes(self):
        """Resident memory: {(program, pid): bytes} of the launcher and all below it."""
        pids = [self.process.pid, *self.descendants()]
        return {(program_of(pid), pid): rss_bytes(pid) for pid in pids}

    def wait_until_idle(self, timeout_seconds=15):
        """Waits until no request runs or waits and every KV block is free."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting",
                 "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + timeout_seconds
        while any(self.client.metric(name) != 0 for name in names):
            assert time.monotonic() < deadline, {n: self.client.metric(n) for n in names}
            time.sleep(0.05)

    # Hurting and stopping.

    def kill_one(self, role):
        """kill -9 of a random child that runs this program; gives its pid."""
        pid = random.choice(self.pids(role))
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self, timeout_seconds=60):
        """SIGTERM if it still runs; asserts exit code 0 and that nothing is left behind."""
        self.terminate()
        returncode = self.process.wait(timeout_seconds)
        log = self.log()
        left = self.processes_left() + self.files_left()
        self._tear_down()
        assert returncode == 0, f"exit code {returncode} after SIGTERM:\n{log[-4000:]}"
        assert not left, f"left behind: {left}\n{log[-4000:]}"
        assert not re.search(BUG_SIGNS, log), log[re.search(BUG_SIGNS, log).start() - 200:][:4000]

    def terminate(self):
        """SIGTERM, without waiting."""
        if self.process.poll() is None:
            self.descendants()
            self.process.send_signal(signal.SIGTERM)

    def processes_left(self):
        """Processes that were once below the launcher and still run."""
        return [f"{program_of(pid)} {pid}" for pid, started in self._seen
                if start_time(pid) == started]

    def files_left(self):
        """What stands in the launcher's run directory."""
        return [str(path) for path in self.run_directories.rglob("*")]

    def _tear_down(self):
        """Leaves nothing running, whatever happened; by pid, and only our own."""
        self._stopped = True
        if self.process.poll() is None:
            self.descendants()
            self.process.kill()
            self.process.wait()
        for pid, started in self._seen:
            if start_time(pid) == started:
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
        self._scratch.cleanup()


@contextlib.contextmanager
def starting(model, *flags, tensor_parallel_size=1, port=None):
    """A server that was started and not waited for; the test says what must become of it."""
    server = FathomServer(model, *flags, tensor_parallel_size=tensor_parallel_size, port=port)
    server.start()
    try:
        yield server
    finally:
        server._tear_down()


def run_to_exit(model, *flags, tensor_parallel_size=1, port=None, timeout_seconds=60):
    """Runs `fathom serve` with flags it must refuse; gives (exit code, output)."""
    with starting(model, *flags, tensor_parallel_size=tensor_parallel_size, port=port) as server:
        try:
            returncode = server.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not exit:\n{server.log()[-4000:]}") from None
        return returncode, server.log()


def run_program(name, *arguments, timeout_seconds=30):
    """Runs one program of build/cpu/bin to its end; gives (exit code, stdout, stderr)."""
    done = subprocess.run([str(FathomServer.binaries / name), *map(str, arguments)],
                          capture_output=True, text=True, timeout=timeout_seconds)
    return done.returncode, done.stdout, done.stderr


def free_port():
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


# /proc. Each function answers about a process that may end at any moment.

def _stat_fields(pid):
    """Fields 3… of /proc/PID/stat (state, ppid, …); None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields


def start_time(pid):
    """When the process started, in clock ticks since boot: tells a pid from its reuse."""
    fields = _stat_fields(pid)
    return fields and int(fields[19])


def descendants_of(root):
    """Pids below `root`, children first."""
    parents = {}
    for entry in os.listdir("/proc"):
        fields = _stat_fields(entry) if entry.isdigit() else None
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        children = parents.get(queue.pop(0), [])
        found += children
        queue += children
    return found


def program_of(pid):
    """Base name of the program a process runs; "" when it is gone."""
    try:
        return re.sub(r" \(deleted\)$", "", os.path.basename(os.readlink(f"/proc/{pid}/exe")))
    except OSError:
        return ""


def rss_bytes(pid):
    """Resident memory; 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
