"""fathom-gateway as a program: flags, exit codes, signals. No coordinator is needed for that."""
import argparse
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import unittest
import unittest.mock
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
            if found := re.search(r"listening on https?://127\.0\.0\.1:(\d+)", line):
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

    def test_reads_lists_of_origins_as_vllm_does(self):
        _, port = self.start("--allowed-origins", '["https://a.example", "https://b.example"]')
        request = urllib.request.Request(f"http://127.0.0.1:{port}/version",
                                         headers={"Origin": "https://b.example"})
        self.assertEqual(urllib.request.urlopen(request).headers["Access-Control-Allow-Origin"],
                         "https://b.example")
        for wrong in ("https://a.example", '["https://a.example"', "[7]", '{"a": 1}'):
            self.expect_refused(64, "expected a JSON list of strings", COORDINATOR, MODEL,
                                "--host=127.0.0.1", "--port=0", "--allowed-origins", wrong)
        self.expect_refused(64, r"""such as '["GET", "POST"]'""", COORDINATOR, MODEL,
                            "--host=127.0.0.1", "--port=0", "--allowed-methods", "[POST]")
        self.expect_refused(64, "'nonsense' is no origin", COORDINATOR, MODEL, "--host=127.0.0.1",
                            "--port=0", "--allowed-origins", '["nonsense"]')

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

    def ask(self, port, path, key=None, context=None):
        """The HTTP status."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        scheme = "https" if context else "http"
        request = urllib.request.Request(f"{scheme}://127.0.0.1:{port}{path}", headers=headers)
        try:
            return urllib.request.urlopen(request, context=context).status
        except urllib.error.HTTPError as error:
            return error.code

    def test_takes_keys_from_flags_and_the_environment(self):
        process, port = self.start("--api-key", "one", "--api-key", "two")
        self.assertEqual([self.ask(port, "/version", key) for key in (None, "one", "two", "six")],
                         [401, 200, 200, 401])
        self.assertEqual(self.ask(port, "/live"), 200)
        with unittest.mock.patch.dict(os.environ, VLLM_API_KEY="three"):
            process, port = self.start()
        self.assertEqual([self.ask(port, "/version", key) for key in ("one", "three")], [401, 200])

    def test_reads_its_key_file_again_on_sighup(self):
        def line(key):
            return f"{hashlib.sha256(key.encode()).hexdigest()} somebody\n"

        with tempfile.NamedTemporaryFile("w", prefix="fathom-keys-") as keys:
            keys.write(line("old"))
            keys.flush()
            process, port = self.start("--api-key-file", keys.name)
            self.assertEqual(self.ask(port, "/version", "old"), 200)
            keys.write(line("new"))
            keys.flush()
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 30
            while self.ask(port, "/version", "new") != 200:
                self.assertLess(time.monotonic(), deadline)
            self.assertEqual(self.ask(port, "/version", "old"), 200)

    def test_warns_when_everybody_may_ask(self):
        process = subprocess.Popen([PROGRAM, COORDINATOR, MODEL, "--host=0.0.0.0", "--port=0"],
                                   stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        log = ""
        for line in process.stderr:
            log += line
            if "listening on" in line:
                break
        self.assertIn("open to everybody who can reach this host", log)

    def make_certificate(self, folder, name):
        """NAME.crt and NAME.key for 127.0.0.1, signed by itself."""
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.crt", "-days", "1", "-subj",
             f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"],
            cwd=folder, check=True, capture_output=True)

    def test_speaks_https_and_changes_its_certificate_on_sighup(self):
        with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
            self.make_certificate(folder, "old")
            self.make_certificate(folder, "new")
            for kind in ("crt", "key"):
                shutil.copy(f"{folder}/old.{kind}", f"{folder}/now.{kind}")
            process, port = self.start(f"--ssl-certfile={folder}/now.crt",
                                       f"--ssl-keyfile={folder}/now.key")
            old, new = (ssl.create_default_context(cafile=f"{folder}/{name}.crt")
                        for name in ("old", "new"))
            self.assertEqual(self.ask(port, "/live", context=old), 200)
            self.assertEqual(self.ask(port, "/health", context=old), 503)
            with self.assertRaises(urllib.error.URLError):
                self.ask(port, "/live", context=new)
            # Plain HTTP to this port is no request, and harms nobody.
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
                with contextlib.suppress(ConnectionResetError):
                    self.assertNotIn(b"HTTP", client.recv(4096))
            # A long answer takes many records and writes.
            self.assertIn(b"</html>", urllib.request.urlopen(
                f"https://127.0.0.1:{port}/", context=old).read())
            for kind in ("crt", "key"):
                shutil.copy(f"{folder}/new.{kind}", f"{folder}/now.{kind}")
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 30
            while True:
                try:
                    self.assertEqual(self.ask(port, "/live", context=new), 200)
                    break
                except urllib.error.URLError:
                    self.assertLess(time.monotonic(), deadline)

    def test_hangs_up_on_who_does_not_finish_the_handshake(self):
        with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
            self.make_certificate(folder, "one")
            _, port = self.start(f"--ssl-certfile={folder}/one.crt",
                                 f"--ssl-keyfile={folder}/one.key",
                                 "--header-timeout-seconds=0.1")
            context = ssl.create_default_context(cafile=f"{folder}/one.crt")
            for beginning in (b"", b"\x16\x03\x01"):
                with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
                    slow.sendall(beginning)
                    self.assertEqual(slow.recv(1), b"")
            # The head of a request has the same limit, and its refusal arrives.
            with socket.create_connection(("127.0.0.1", port), timeout=30) as plain, \
                    context.wrap_socket(plain, server_hostname="127.0.0.1") as slow:
                slow.sendall(b"GET /live HT")
                self.assertIn(b" 408 ", slow.recv(4096))
            self.assertEqual(self.ask(port, "/live", context=context), 200)

    def test_refuses_certificates_it_cannot_use(self):
        with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
            self.make_certificate(folder, "one")
            self.make_certificate(folder, "two")
            self.expect_refused(64, "--ssl-keyfile", COORDINATOR, MODEL, "--port=0",
                                f"--ssl-certfile={folder}/one.crt")
            for certificate, key, what in (("one.crt", "two.key", "the private key"),
                                           ("nothing", "one.key", "the certificate"),
                                           ("one.key", "one.key", "the certificate")):
                self.expect_refused(64, what, COORDINATOR, MODEL, "--port=0",
                                    f"--ssl-certfile={folder}/{certificate}",
                                    f"--ssl-keyfile={folder}/{key}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, required=True)
    arguments, rest = parser.parse_known_args()
    PROGRAM = arguments.bin.resolve() / "fathom-gateway"
    unittest.main(argv=[sys.argv[0], *rest])
