"""`fathom check` and `fathom serve` refuse what any of the programs would refuse, with its reason."""

import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
MODEL = pathlib.Path("tests/golden/v3_tiny/ckpt").resolve()
PATIENCE_SECONDS = 60  # for what takes a fraction of a second on an idle machine


def limits_of(*command):
    """{flag: default} of the flags with a default that is a number, from --help."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^ +(--[a-z-]+) [^=\n]*=(\d+)", text, re.MULTILINE))


class CheckTest(unittest.TestCase):
    def fathom(self, *arguments, model=MODEL):
        command, *flags = arguments
        return subprocess.run(
            [BIN / "fathom", command, model, "--port", "0", "--host", "127.0.0.1",
             "--kv-cache-memory-bytes", "16M", *flags],
            capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def refused(self, code, pattern, *flags, model=MODEL):
        for command in ("check", "serve"):
            result = self.fathom(command, *flags, model=model)
            self.assertEqual(result.returncode, code, result.stderr)
            self.assertRegex(result.stderr.splitlines()[-1], pattern)
            self.assertNotIn("listens on", result.stderr)

    def test_says_yes_to_what_would_be_served(self):
        for flags in ([], ["--grpc-listen", "127.0.0.1:0"],
                      ["--grpc-listen", "0.0.0.0:0", "--insecure"]):
            result = self.fathom("check", "--tensor-parallel-size", "2", *flags)
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_refuses_addresses_that_cannot_be_listened_on(self):
        self.refused(64, "^fathom: --grpc-listen: .* --insecure$", "--grpc-listen", "0.0.0.0:50051")
        self.refused(64, "^fathom: --grpc-listen: 'nonsense' is no address", "--grpc-listen",
                     "nonsense")
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            address = f"127.0.0.1:{other.getsockname()[1]}"
            self.refused(1, f"cannot listen on .*{address}.* in use", "--grpc-listen", address)

    def test_refuses_a_ready_file_that_cannot_be_written(self):
        self.refused(64, "^fathom: --ready-file: cannot write '/nowhere/ready'", "--ready-file",
                     "/nowhere/ready")

    def test_refuses_origins_that_no_browser_sends(self):
        for wrong in ("https://a.example", '["a.example"]'):
            self.refused(64, "^fathom: --allowed-origins", "--allowed-origins", wrong)
        self.refused(64, "^fathom: --allow-credentials would let every web page",
                     "--allowed-origins", '["*"]', "--allow-credentials")

    def test_refuses_a_run_directory_that_cannot_be_used(self):
        self.refused(64, "^fathom: --run-directory /nowhere/run cannot be made: No such file",
                     "--run-directory", "/nowhere/run")
        with tempfile.TemporaryDirectory(prefix="fathom-") as folder:
            path = pathlib.Path(folder)
            path.chmod(0o755)
            self.refused(64, "is open to others", "--run-directory", folder)
            self.refused(64, "too long", "--run-directory", f"{folder}/{'x' * 100}")
            path.chmod(0o700)
            (path / "worker.sock").touch()  # of one that runs
            for name in (folder, f"{folder}/new"):
                result = self.fathom("check", "--run-directory", name)
                self.assertEqual(result.returncode, 0, result.stderr)
            self.assertEqual([each.name for each in path.iterdir()], ["worker.sock"])

    def test_refuses_tls_files_that_do_not_exist(self):
        self.refused(78, "cannot read '/nowhere/authority'", "--grpc-listen", "0.0.0.0:0",
                     "--tls-certificate", "/nowhere/certificate", "--tls-private-key",
                     "/nowhere/key", "--tls-authority", "/nowhere/authority")

    def test_refuses_a_tokenizer_that_is_none(self):
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / "model"
            shutil.copytree(MODEL, model)
            (model / "tokenizer.json").write_text("{")
            self.refused(78, "tokenizer.json is not valid JSON", model=model)

    def test_names_the_flag_whose_value_the_model_cannot_have(self):
        self.refused(78, "--tensor-parallel-size can be 1, 2, 4, 8", "--tensor-parallel-size", "3")
        self.refused(78, "is 32000, .*--max-model-len", "--max-model-len", "32k")
        self.refused(78, "1 worker has a host of", "--kv-cache-memory-bytes", "900T")

    def test_a_clean_stop_warns_of_nothing(self):
        server = subprocess.Popen(
            [BIN / "fathom", "serve", MODEL, "-tp=2", "--port", "0", "--host", "127.0.0.1",
             "--kv-cache-memory-bytes", "16M"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True)
        self.addCleanup(server.stdout.close)
        self.addCleanup(server.kill)
        log = []
        for line in server.stdout:
            log.append(line)
            if "Fathom is ready" in line:
                server.send_signal(signal.SIGTERM)
        self.assertEqual(server.wait(PATIENCE_SECONDS), 0)
        self.assertEqual(sum("the coordinator ended epoch" in line for line in log), 2, log)
        self.assertEqual([line for line in log if re.search(r"\| [WE] \d", line)], [])
        self.assertEqual(sum("KV cache size" in line for line in log), 1, log)

    def test_help_has_the_gateways_defaults(self):
        ours = limits_of(BIN / "fathom", "serve", "--help")
        theirs = limits_of(BIN / "fathom-gateway", "--help")
        shared = (ours.keys() & theirs.keys()) - {"--drain-timeout-seconds"}
        self.assertGreaterEqual(len(shared), 18)
        for flag in shared:
            self.assertEqual(ours[flag], theirs[flag], flag)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
