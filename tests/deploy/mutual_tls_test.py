"""Processes as if on several hosts: TCP, mutual TLS and Gloo, as in kubernetes/pod-per-role.yaml."""

import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import grpc

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
PATIENCE_SECONDS = 60
sys.path.insert(0, str(ROOT / "oracle"))
sys.path.insert(0, str(ROOT))

from make_checkpoint import make_checkpoint  # noqa: E402

generate, services = grpc.protos_and_services("proto/generate.proto")


def free_ports(number):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def openssl(*arguments, folder):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def make_certificates(folder):
    """ca.crt, and tls.crt with tls.key for localhost."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "1",
            "-subj", "/CN=authority", folder=folder)
    openssl("req", *key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=fathom",
            folder=folder)
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", "tls.crt", "-days", "1", "-extfile", "names", folder=folder)


class MutualTlsTest(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)
        make_certificates(self.folder)
        make_checkpoint(self.folder / "model", num_hidden_layers=2, num_nextn_predict_layers=0)
        self.logs = []

    def start(self, program, *flags):
        log = self.folder / f"log{len(self.logs)}"
        self.logs.append(log)
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [BIN / program, *flags, "--tls-certificate", self.folder / "tls.crt",
                 "--tls-private-key", self.folder / "tls.key", "--tls-authority",
                 self.folder / "ca.crt"], stdout=output, stderr=output)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)

    def start_everything(self):
        *workers, self.coordinator, self.http = free_ports(4)
        for port in workers:
            self.start("fathom-worker", "--model", self.folder / "model", "--listen",
                       f"0.0.0.0:{port}", "--kv-cache-memory-bytes", "4000000")
        self.start("fathom-coordinator", "--listen", f"0.0.0.0:{self.coordinator}", "--workers",
                   ",".join(f"localhost:{port}" for port in workers), "--collectives", "gloo")
        self.start("fathom-gateway", "--coordinator", f"localhost:{self.coordinator}", "--model",
                   self.folder / "model", "--host", "127.0.0.1", "--port", str(self.http))
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/health"):
                    return
            except OSError:
                time.sleep(0.05)
        self.fail("not healthy in time:\n" + "\n".join(log.read_text() for log in self.logs))

    def test_serves_those_with_a_certificate_and_nobody_else(self):
        self.start_everything()
        body = json.dumps({"prompt": [5, 9, 2], "max_tokens": 4, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/v1/completions", body,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            self.assertEqual(json.load(response)["usage"]["completion_tokens"], 4)

        authority = (self.folder / "ca.crt").read_bytes()
        mine = ((self.folder / "tls.key").read_bytes(), (self.folder / "tls.crt").read_bytes())
        address = f"localhost:{self.coordinator}"
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, *mine)) as good:
            info = services.GenerateStub(good).GetServerInfo(generate.GetServerInfoRequest(),
                                                             timeout=PATIENCE_SECONDS)
            self.assertEqual(info.num_workers, 2)
        strangers = (grpc.insecure_channel(address),
                     grpc.secure_channel(address, grpc.ssl_channel_credentials(authority)))
        for stranger in strangers:
            with stranger, self.assertRaises(grpc.RpcError) as refused:
                services.GenerateStub(stranger).GetServerInfo(generate.GetServerInfoRequest(),
                                                              timeout=PATIENCE_SECONDS)
            self.assertEqual(refused.exception.code(), grpc.StatusCode.UNAVAILABLE)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
