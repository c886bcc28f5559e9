"""`fathom serve` with programs that stand in for the real ones: start, supervision, end."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
PATIENCE_SECONDS = 30  # for what takes a fraction of a second on an idle machine

PLAN = {
    "architecture": "DeepseekV3ForCausalLM", "vocab_size": 512, "max_position_embeddings": 5120,
    "world_size": 2, "dtype": "float32", "kv_cache_dtype": "float32", "quantization": "none",
    "activation_quantization": "none",
    "budget_bytes": 1 << 30, "weight_bytes": 3 << 20, "activation_bytes": 1 << 20,
    "kv_block_bytes": 20480, "kv_block_capacity": 90000, "num_kv_blocks": 71840,
    "max_model_len": 32768,
}


def eventually(condition, what):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {PATIENCE_SECONDS} s: {what}")


def is_alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class LauncherTest(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)
        self.model = self.folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        (self.folder / "run").mkdir(mode=0o700)
        (self.folder / "plan.json").write_text(json.dumps(PLAN))
        (self.folder / "events").touch()
        shutil.copy(BIN / "fathom", self.folder)
        for program in ("fathom-worker", "fathom-coordinator", "fathom-gateway"):
            shutil.copy(HERE / "fake_program.py", self.folder / program)
            (self.folder / program).chmod(0o755)
        self.log = self.folder / "log"
        self.log.touch()

    def launch(self, *flags, **environment):
        with open(self.log, "w", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(
                [self.folder / "fathom", "serve", self.model, "--port", "0", "--host", "127.0.0.1",
                 "--tensor-parallel-size", "2", *flags],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"XDG_RUNTIME_DIR": str(self.folder / "run")} | environment)
        self.addCleanup(self.clean_up)

    def clean_up(self):
        self.launcher.kill()
        self.launcher.wait()

    def events(self):
        return (self.folder / "events").read_text().splitlines()

    def pids(self):
        """{name: pid} of the latest start of each."""
        starts = [event.split() for event in self.events() if event.startswith("start")]
        return {name: int(pid) for _, name, pid in starts}

    def wait_for_log(self, pattern):
        return eventually(lambda: re.search(pattern, self.log.read_text()), pattern)

    def wait_until_ready(self):
        """The gateway here is healthy by itself, the others may start later."""
        self.wait_for_log("Fathom is ready")
        for name in ("worker-0", "worker-1", "coordinator", "gateway"):
            self.wait_for_log(f"this is {name}\n")

    def end(self, expected):
        self.assertEqual(self.launcher.wait(PATIENCE_SECONDS), expected, self.log.read_text())

    def refused(self, code, pattern):
        """The launcher ends without having started anything, for the reason it gives last."""
        self.end(code)
        self.assertRegex(self.log.read_text().splitlines()[-1], pattern)
        self.assertEqual(self.events(), [])

    def test_starts_everything_says_so_when_ready_and_ends_in_order(self):
        ready_file = self.folder / "ready"
        self.launch("--ready-file", ready_file, "--trust-remote-code")
        url = self.wait_for_log(r"Fathom is ready: (http://127\.0\.0\.1:\d+)/v1").group(1)
        eventually(ready_file.exists, "the ready file")
        self.assertEqual(ready_file.read_text().strip(), url)
        self.wait_until_ready()
        log = self.log.read_text()
        self.assertIn("KV cache size: 1,149,440 tokens", log)
        self.assertIn("Maximum concurrency for 32,768 tokens per request: 35.08x", log)
        self.assertIn("Block size: 16 tokens per KV block (the default", log)
        self.assertIn("--trust-remote-code changes nothing", log)
        self.assertIn("worker 1    | this is worker-1", log)
        self.assertIn(f"curl {url}/v1/completions", log)
        self.assertEqual(set(self.pids()), {"worker-0", "worker-1", "coordinator", "gateway"})
        sockets = list((self.folder / "run").iterdir())
        self.assertEqual(len(sockets), 1)
        self.assertEqual(sockets[0].stat().st_mode & 0o777, 0o700)

        self.launcher.send_signal(signal.SIGTERM)
        self.end(0)
        terms = [event for event in self.events() if event.startswith("term")]
        self.assertEqual(set(terms[:2]), {"term coordinator", "term gateway"})
        self.assertEqual(set(terms[2:]), {"term worker-0", "term worker-1"})
        self.assertFalse(ready_file.exists())
        self.assertEqual(list((self.folder / "run").iterdir()), [])

    def test_restarts_whatever_is_killed(self):
        self.launch()
        self.wait_until_ready()
        for round_, name in enumerate(("worker-1", "coordinator", "gateway"), start=1):
            pid = self.pids()[name]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: self.pids()[name] != pid, f"{name} starts again")  # noqa: B023
            eventually(lambda: self.log.read_text().count("serving again after") == round_,  # noqa: B023
                       "serving again")
        self.assertIn("was killed by SIGKILL (Killed)", self.log.read_text())
        self.launcher.send_signal(signal.SIGINT)
        self.end(0)

    def test_waits_longer_between_restarts_of_what_keeps_dying(self):
        (self.folder / "coordinator.exit").write_text("1")
        self.launch()
        for delay in (100, 200, 400, 800):
            self.wait_for_log(rf"coordinator exited with 1 after .* again in {delay} ms")
        self.launcher.send_signal(signal.SIGTERM)
        self.end(0)

    def test_a_child_with_a_bad_configuration_ends_everything_with_its_reason(self):
        (self.folder / "worker-1.exit").write_text("78")
        self.launch()
        self.end(78)
        self.assertIn("worker 1 exited with 78, starting it again would not help",
                      self.log.read_text())
        self.assertEqual(self.log.read_text().splitlines()[-1],
                         "fathom: worker 1: worker-1 cannot go on")
        self.assertFalse([name for name, pid in self.pids().items() if is_alive(pid)])

    def test_nothing_survives_a_launcher_that_is_killed(self):
        self.launch()
        self.wait_until_ready()
        self.launcher.kill()
        self.end(-signal.SIGKILL)
        eventually(lambda: not any(is_alive(pid) for pid in self.pids().values()),
                   "the children end")

    def test_knows_a_gateway_that_speaks_https(self):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", "key", "-out", "certificate", "-days", "1", "-subj", "/CN=x"],
            cwd=self.folder, check=True, capture_output=True)
        self.launch("--ssl-certfile", self.folder / "certificate", "--ssl-keyfile",
                    self.folder / "key")
        self.wait_for_log(r"Fathom is ready: https://127\.0\.0\.1:\d+/v1")
        self.launcher.terminate()
        self.end(0)

    def test_a_hangup_reloads_what_can_be_reloaded_and_else_drains(self):
        self.launch("--api-key-file", self.folder / "keys")
        self.wait_until_ready()
        self.launcher.send_signal(signal.SIGHUP)
        eventually(lambda: "reload gateway" in self.events(), "the reload")
        self.assertIsNone(self.launcher.poll())
        self.assertFalse([event for event in self.events()
                          if event.startswith("term") or event == "reload coordinator"])
        self.launcher.terminate()
        self.end(0)
        self.launch()
        self.wait_for_log("Fathom is ready")
        self.launcher.send_signal(signal.SIGHUP)
        self.end(0)

    def test_a_second_signal_kills_what_is_still_draining(self):
        (self.folder / "gateway.stubborn").touch()
        self.launch()
        self.wait_until_ready()
        self.launcher.send_signal(signal.SIGTERM)
        eventually(lambda: "term gateway" in self.events(), "the gateway hears SIGTERM")
        self.launcher.send_signal(signal.SIGTERM)
        self.end(0)
        self.assertFalse(any(is_alive(pid) for pid in self.pids().values()))

    def test_what_does_not_drain_in_time_is_killed(self):
        (self.folder / "coordinator.stubborn").touch()
        self.launch("--drain-timeout", "1")
        self.wait_until_ready()
        self.launcher.send_signal(signal.SIGTERM)
        self.end(0)
        self.assertIn("coordinator did not end in time: killing it", self.log.read_text())

    def test_ctrl_c_on_the_terminal_reaches_the_launcher_alone(self):
        self.launch()
        self.wait_until_ready()
        os.killpg(self.launcher.pid, signal.SIGINT)
        self.end(0)
        self.assertEqual(len([event for event in self.events() if event.startswith("term")]), 4)

    def test_goes_on_when_nobody_reads_its_log(self):
        os.remove(self.log)
        os.mkfifo(self.log)
        reader = os.open(self.log, os.O_RDONLY | os.O_NONBLOCK)
        ready_file = self.folder / "ready"
        self.launch("--ready-file", ready_file)
        os.close(reader)
        eventually(ready_file.exists, "the ready file")
        eventually(lambda: len(self.pids()) == 4, "all start")
        pid = self.pids()["worker-0"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.pids()["worker-0"] != pid, "worker 0 starts again")
        self.launcher.send_signal(signal.SIGTERM)
        self.assertEqual(self.launcher.wait(PATIENCE_SECONDS), 0)

    def quickstart(self, *flags):
        """deploy/quickstart over the programs here: nothing is installed or built."""
        root = self.folder / "root"
        for folder in ("deploy", "oracle", "build/cpu", "stubs"):
            (root / folder).mkdir(parents=True)
        (root / "build/cpu/bin").symlink_to(self.folder)
        shutil.copy(ROOT / "deploy/quickstart", root / "deploy")
        event = 'data: {"choices": [{"text": " deep"}]}'
        for path, body in (("deploy/install-dependencies", ""), ("stubs/cmake", ""),
                           ("stubs/curl", f"echo '{event}'")):
            (root / path).write_text(f"#!/bin/sh\n{body}\n")
            (root / path).chmod(0o755)
        (root / "oracle/make_checkpoint.py").write_text(
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[1]).mkdir()\n"
            "pathlib.Path(sys.argv[1], 'config.json').write_text('{}')\n")
        with open(self.log, "w", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(
                [root / "deploy/quickstart", *flags], stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {
                    "PATH": f"{root}/stubs:{os.environ['PATH']}",
                    "XDG_RUNTIME_DIR": str(self.folder / "run")})
        self.addCleanup(self.clean_up)

    def test_ctrl_c_in_the_quickstart_drains(self):
        (self.folder / "gateway.slow").touch()
        self.quickstart("--keep", "--workers", "2")
        self.wait_for_log("Serving at http.* until Ctrl-C")
        self.wait_until_ready()
        self.assertRegex(self.log.read_text(), "\nThe sea is deep\n")
        os.killpg(self.launcher.pid, signal.SIGINT)  # as a terminal does
        self.end(130)
        self.assertIn("drained gateway", self.events())
        self.assertFalse(any(is_alive(pid) for pid in self.pids().values()))

    def test_a_second_ctrl_c_in_the_quickstart_kills(self):
        (self.folder / "gateway.stubborn").touch()
        self.quickstart("--keep", "--workers", "2")
        self.wait_for_log("Serving at http.* until Ctrl-C")
        self.wait_until_ready()
        os.killpg(self.launcher.pid, signal.SIGINT)
        eventually(lambda: "term gateway" in self.events(), "the gateway hears SIGTERM")
        os.killpg(self.launcher.pid, signal.SIGINT)
        self.end(130)
        self.assertFalse(any(is_alive(pid) for pid in self.pids().values()))

    def test_the_quickstart_judges_its_flags_before_anything_else(self):
        for flags, code, pattern in (
                (["--help"], 0, "fewer workers: 1, 2, 4 or 8"),
                (["--port"], 64, "^quickstart: --port wants a number"),
                (["--port", "99999"], 64, "^quickstart: --port 99999: expected 0 to 65535"),
                (["--workers", "3"], 64, "^quickstart: --workers 3: expected 1, 2, 4 or 8"),
                (["--frobnicate"], 64, "^quickstart: unknown argument '--frobnicate'")):
            result = subprocess.run([ROOT / "deploy/quickstart", *flags], capture_output=True,
                                    text=True, timeout=PATIENCE_SECONDS)
            self.assertEqual(result.returncode, code, flags)
            self.assertRegex((result.stdout + result.stderr).splitlines()[-1], pattern)
            self.assertNotIn("packages (", result.stdout)

    def test_tells_systemd_when_it_is_ready(self):
        path = str(self.folder / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(path)
            listener.settimeout(PATIENCE_SECONDS)
            self.launch(NOTIFY_SOCKET=path)
            self.assertIn("STATUS=", listener.recv(1000).decode())
            self.assertIn("READY=1", listener.recv(1000).decode())
            self.launcher.send_signal(signal.SIGTERM)
            self.assertIn("STOPPING=1", listener.recv(1000).decode())
        self.end(0)

    def test_refuses_a_model_that_the_worker_refuses(self):
        (self.folder / "worker.refusal").write_text(
            "E 14:02:03.123 num_attention_heads 8 is not divisible by 3")
        self.launch()
        self.refused(78, "^fathom: num_attention_heads 8 is not divisible by 3$")

    def test_refuses_what_the_coordinator_or_the_gateway_refuses(self):
        for program, flag in (("coordinator", "--grpc-listen: "), ("gateway", "")):
            refusal = self.folder / f"{program}.refusal"
            refusal.write_text("E1123 14:02:03.12 noise of a library\nE 14:02:03.123 cannot be")
            self.launch("--grpc-listen", "127.0.0.1:0")
            self.refused(78, f"^fathom: {flag}cannot be$")
            refusal.unlink()

    def test_refuses_a_port_in_use(self):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = str(other.getsockname()[1])
            self.launch("--port", port)
            self.refused(1, f"cannot listen on 127.0.0.1 port {port}: Address already in use; stop")

    def test_refuses_a_folder_without_a_model(self):
        (self.model / "config.json").unlink()
        self.launch()
        self.refused(78, "has no config.json: expected a model folder")

    def test_refuses_to_start_without_the_other_programs(self):
        (self.folder / "fathom-gateway").unlink()
        self.launch()
        self.refused(78, "there is no program fathom-gateway beside this one")

    def test_refuses_a_run_directory_that_others_can_enter(self):
        (self.folder / "open").mkdir(mode=0o755)
        self.launch("--run-directory", self.folder / "open")
        self.refused(64, "is open to others: expected our own, with mode 0700")

    def test_refuses_bad_flags(self):
        for flags, pattern in (
                (["--max-num-seqs", "0"], "--max-num-seqs: 0 is too small: expected at least 1"),
                (["--block-size", "17"], "'17' is not one of 1, 16, 32, 64, 128"),
                (["--tensor-paralel-size", "2"], "did you mean --tensor-parallel-size")):
            self.launch(*flags)
            self.refused(64, pattern)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
