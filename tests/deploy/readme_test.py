"""README.md keeps its word: its lines work as printed, its table has every flag."""

import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATIENCE_SECONDS = 60
sys.path.insert(0, str(ROOT / "oracle"))

from make_checkpoint import make_checkpoint  # noqa: E402


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ReadmeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        folder = pathlib.Path(holder.name)
        make_checkpoint(folder / "model", "v3_tiny", tokenizer=True)
        cls.http, cls.grpc = free_port(), free_port()
        ready = folder / "ready"
        cls.server = subprocess.Popen(
            [BIN / "fathom", "serve", folder / "model", "--served-model-name", "quickstart",
             "--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", str(cls.http),
             "--grpc-listen", f"127.0.0.1:{cls.grpc}", "--kv-cache-memory-bytes", "16M",
             "--ready-file", ready])
        cls.addClassCleanup(cls.stop)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not ready.exists():
            if cls.server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the server did not become ready")
            time.sleep(0.05)

    @classmethod
    def stop(cls):
        cls.server.send_signal(signal.SIGTERM)
        cls.server.wait(PATIENCE_SECONDS)

    def here(self, text):
        return text.replace(":8000", f":{self.http}").replace(":50051", f":{self.grpc}")

    def test_the_curl_lines_work(self):
        lines = [line for block in blocks("sh")
                 for line in re.findall(r"^curl (?:.*\\\n)*.*$", block, re.MULTILINE)]
        self.assertGreaterEqual(len(lines), 6)
        for line in lines:
            command = self.here(line).replace("curl", "curl -sS --fail-with-body", 1)
            result = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                                    timeout=PATIENCE_SECONDS)
            self.assertEqual(result.returncode, 0, command + result.stdout + result.stderr)
            self.assertNotIn('"error"', result.stdout)
            if '"stream": true' in line:
                self.assertTrue(result.stdout.rstrip().endswith("data: [DONE]"), result.stdout)

    def test_the_grpc_client_works(self):
        (program,) = blocks("python")
        self.assertLessEqual(len([line for line in program.splitlines() if line.strip()]), 20)
        result = subprocess.run([sys.executable, "-c", self.here(program)], cwd=ROOT, text=True,
                                capture_output=True, timeout=PATIENCE_SECONDS)
        self.assertEqual(result.returncode, 0, result.stderr)
        lines = result.stdout.splitlines()
        self.assertEqual(lines[0], "DeepseekV3ForCausalLM with 512 tokens, up to 5120")
        self.assertEqual(len(lines), 18)  # the model, 16 tokens, the end
        self.assertEqual(lines[-1], "finished: FINISH_REASON_LENGTH")

    def test_the_table_has_every_flag_and_no_other(self):
        text = subprocess.run([BIN / "fathom", "serve", "--help"], capture_output=True, text=True,
                              check=True).stdout
        flags = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
        table = README.split("## Flags")[1].split("\n## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| `")]
        named = {flag for row in rows for flag in re.findall(r"--[a-z][a-z-]+", row.split(" | ")[0])}
        self.assertEqual(named, flags)

    def test_the_files_it_names_exist(self):
        for name in re.findall(r"`((?:deploy|tests|oracle)/[\w./-]+)", README):
            self.assertTrue((ROOT / name).exists(), name)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
