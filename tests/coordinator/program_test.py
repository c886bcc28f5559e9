"""fathom-coordinator as a program: flags, exit codes, signals. No workers are needed for that."""
import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import unittest

PROGRAM = None


def run(*flags):
    return subprocess.run([PROGRAM, *flags], capture_output=True, text=True, timeout=30)


class CoordinatorProgramTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="fathom-")
        self.socket = f"{self.folder.name}/coordinator"
        self.workers = f"--workers=unix:{self.folder.name}/worker-0"
        self.running = []

    def tearDown(self):
        for process in self.running:
            process.kill()
            process.communicate()
        self.folder.cleanup()

    def start(self, *flags):
        process = subprocess.Popen([PROGRAM, *flags], stderr=subprocess.PIPE, text=True)
        self.running.append(process)
        for line in process.stderr:
            if "listens on" in line:
                return process
        self.fail("it did not start")

    def expect_refused(self, code, message, *flags):
        result = run(*flags)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertIn(message, result.stderr)

    def test_says_its_version(self):
        result = run("--version")
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout, r"^\d+\.\d+\.\d+\n$")

    def test_refuses_bad_flags_with_64(self):
        listen = f"--listen=unix:{self.socket}"
        self.expect_refused(64, "--listen is required")
        self.expect_refused(64, "--workers is required", listen)
        self.expect_refused(64, "--block-size", listen, self.workers, "--block-size=7")
        self.expect_refused(64, "--max-num-seqs", listen, self.workers, "--max-num-seqs=0")
        self.expect_refused(64, "--collectives", listen, self.workers, "--collectives=mpi")
        self.expect_refused(64, "--frobnicate", listen, self.workers, "--frobnicate")
        self.expect_refused(64, "'nowhere' is no address", listen, "--workers=nowhere")
        self.expect_refused(64, "--insecure", "--listen=0.0.0.0:0", self.workers)
        self.expect_refused(64, "--insecure", listen, "--workers=10.0.0.1:5000")

    def test_refuses_unreadable_tls_files_with_78(self):
        self.expect_refused(78, "/nowhere/authority", "--listen=127.0.0.1:0",
                            "--workers=10.0.0.1:5000", "--tls-certificate=/nowhere/certificate",
                            "--tls-private-key=/nowhere/key", "--tls-authority=/nowhere/authority")

    def test_check_says_whether_it_could_start(self):
        flags = ["--check", self.workers]
        result = run(*flags, f"--listen=unix:{self.socket}")
        self.assertEqual((result.returncode, result.stdout), (0, ""), result.stderr)
        self.expect_refused(64, "--insecure", *flags, "--listen=0.0.0.0:0")
        self.expect_refused(64, "'nowhere' is no address", *flags, "--listen=nowhere")
        tls = [f"--tls-{name}={__file__}" for name in ("certificate", "private-key", "authority")]
        self.expect_refused(1, "no valid PEM files", *flags, "--listen=0.0.0.0:0", *tls)

    def test_does_not_take_a_place_that_another_has(self):
        self.start(f"--listen=unix:{self.socket}", self.workers)
        self.expect_refused(1, "another process listens", f"--listen=unix:{self.socket}",
                            self.workers)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            self.expect_refused(1, "the port is in use",
                                f"--listen=127.0.0.1:{taken.getsockname()[1]}", self.workers)

    def test_takes_the_socket_of_one_that_was_killed(self):
        first = self.start(f"--listen=unix:{self.socket}", self.workers)
        first.kill()
        first.wait()
        self.assertTrue(os.path.exists(self.socket))
        self.start(f"--listen=unix:{self.socket}", self.workers)

    def test_ends_with_0_when_told_to(self):
        for told in (signal.SIGTERM, signal.SIGINT):
            process = self.start(f"--listen=unix:{self.socket}", self.workers)
            process.send_signal(told)
            self.assertEqual(process.wait(timeout=10), 0)

    def test_says_whom_it_waits_for(self):
        process = self.start(f"--listen=unix:{self.socket}", self.workers)
        for line in process.stderr:
            if "waiting for 1 of 1 workers: worker 0" in line:
                return
        self.fail("it did not say")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    PROGRAM = str(pathlib.Path(parser.parse_known_args()[0].bin) / "fathom-coordinator")
    unittest.main(argv=[sys.argv[0]])
