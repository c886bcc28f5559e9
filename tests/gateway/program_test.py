"""fathom-gateway as a program: flags, exit codes, signals. No coordinator is needed for that."""
import argparse
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
import urllib.error
import urllib.request

PROGRAM = None
MODEL = "--model=tests/golden/tokenizer_tiny"
COORDINATOR = "--coordinator=unix:/nonexistent/socket"


class GatewayProgramTest(unittest.TestCase):
    def setUp(self):
        self.running = []

    def tearDown(self):
        for process in self.running:
            process.kill()
            process.communicate()

    def start(self, *flags):
        process = subprocess.Popen(
            [PROGRAM, COORDINATOR, MODEL, "--host=127.0.0.1", "--port=0", *flags],
            stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        for line in process.stderr:
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                return process, int(found[1])
        self.fail("it did not start")

    def expect_refused(self, code, message, *flags):
        result = subprocess.run([PROGRAM, *flags], capture_output=True, text=True, timeout=30)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertIn(message, result.stderr)

    def test_says_its_version_and_flags(self):
        for flag, pattern in (("--version", r"^\d+\.\d+\.\d+\n$"), ("--help", "--max-body-bytes")):
            result = subprocess.run([PROGRAM, flag], capture_output=True, text=True, timeout=30)
            self.assertEqual(result.returncode, 0)
            self.assertRegex(result.stdout, pattern)

    def test_refuses_bad_flags_with_64(self):
        self.expect_refused(64, "--coordinator is required", MODEL)
        self.expect_refused(64, "--model is required", COORDINATOR)
        self.expect_refused(64, "does not exist", COORDINATOR, "--model=/nonexistent")
        self.expect_refused(64, "--frobnicate", COORDINATOR, MODEL, "--frobnicate")
        self.expect_refused(64, "--port", COORDINATOR, MODEL, "--port=70000")
        self.expect_refused(64, "--max-logprobs", COORDINATOR, MODEL, "--max-logprobs=21")
        self.expect_refused(64, "--served-model-name: must not be empty", COORDINATOR, MODEL,
                            "--served-model-name", "")
        self.expect_refused(64, "--log-level", COORDINATOR, MODEL, "--log-level=loud")
        self.expect_refused(64, "'nowhere' is no address", MODEL, "--coordinator=nowhere")
        self.expect_refused(64, "--insecure", MODEL, "--coordinator=10.0.0.1:5000")
        self.expect_refused(64, "no address of this machine", COORDINATOR, MODEL,
                            "--host=256.1.1.1", "--port=0")

    def test_refuses_a_model_it_cannot_use_with_78(self):
        with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
            model = pathlib.Path(folder)
            (model / "tokenizer.json").write_text("{}")
            self.expect_refused(78, "tokenizer.json", COORDINATOR, f"--model={folder}")
            (model / "tokenizer.json").unlink()
            (model / "generation_config.json").write_text('{"temperature": -1}')
            self.expect_refused(78, "temperature is -1, expected at least 0", COORDINATOR,
                                f"--model={folder}")

    def test_says_when_the_port_is_in_use(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            self.expect_refused(1, f"port {port} of 127.0.0.1 is in use", COORDINATOR, MODEL,
                                "--host=127.0.0.1", f"--port={port}")

    def test_answers_without_a_coordinator_and_ends_on_sigterm(self):
        process, port = self.start()
        self.assertEqual(urllib.request.urlopen(f"http://127.0.0.1:{port}/live").status, 200)
        with self.assertRaises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        self.assertEqual(refused.exception.code, 503)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=30), 0)

    def test_writes_one_line_per_request_that_a_client_cannot_forge(self):
        process, port = self.start()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /a%0ab\x80?secret=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(4096)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        lines = [line for line in log.splitlines() if "GET" in line]
        self.assertEqual(len(lines), 1, log)
        self.assertRegex(lines[0], r'^I \d\d:\d\d:\d\d\.\d+ 127\.0\.0\.1:\d+ "GET /a')
        self.assertNotIn("secret", log)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    arguments, rest = parser.parse_known_args()
    PROGRAM = arguments.bin.resolve() / "fathom-gateway"
    unittest.main(argv=[sys.argv[0], *rest])
