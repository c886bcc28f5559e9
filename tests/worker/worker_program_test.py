"""fathom-worker as an operator meets it: flags, --check, sockets, signals, exit codes."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
WORKER = BIN / "fathom-worker"
MODEL = pathlib.Path("tests/golden/v3_tiny/ckpt").resolve()
PATIENCE_SECONDS = 30  # for what takes a fraction of a second on an idle machine


class WorkerProgramTest(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)

    def run_worker(self, *flags, model=MODEL):
        command = [WORKER, "--model", model, *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    def refused(self, exit_status, pattern, *flags, model=MODEL):
        result = self.run_worker(*flags, model=model)
        self.assertEqual(result.returncode, exit_status, result.stderr)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr.strip().splitlines()[-1], pattern)

    def start(self, address):
        worker = subprocess.Popen([WORKER, "--model", MODEL, "--listen", address],
                                  stderr=subprocess.PIPE, text=True)
        self.addCleanup(worker.stderr.close)
        self.addCleanup(worker.wait)
        self.addCleanup(worker.kill)
        for line in worker.stderr:
            if "listens on" in line:
                return worker
        self.fail(f"the worker ended with {worker.wait()}")

    def copy_of_model(self):
        copy = self.folder / "model"
        shutil.copytree(MODEL, copy)
        return copy

    def test_check_prints_the_plan_as_one_line_of_json(self):
        result = self.run_worker("--check", "--rank", "1", "--world-size", "2",
                                 "--max-model-len", "1024", "--max-num-seqs", "4",
                                 "--block-size", "32")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertEqual(result.stdout.count("\n"), 1)
        plan = json.loads(result.stdout)
        self.assertEqual(plan["architecture"], "DeepseekV3ForCausalLM")
        self.assertEqual(plan["vocab_size"], 512)
        self.assertEqual(plan["max_position_embeddings"], 5120)
        self.assertEqual(plan["world_size"], 2)
        self.assertEqual((plan["dtype"], plan["kv_cache_dtype"], plan["quantization"]),
                         ("float32", "float32", "none"))
        self.assertEqual(plan["kv_block_bytes"], 32 * 4 * 80 * 4)
        self.assertEqual(plan["max_model_len"], 1024)
        self.assertEqual(plan["num_kv_blocks"], 4 * 1024 // 32)
        self.assertLessEqual(plan["num_kv_blocks"], plan["kv_block_capacity"])
        self.assertLess(plan["weight_bytes"] + plan["activation_bytes"], plan["budget_bytes"])

    def test_types_follow_the_flags(self):
        plan = json.loads(self.run_worker("--check", "--dtype", "bfloat16").stdout)
        self.assertEqual((plan["dtype"], plan["kv_cache_dtype"]), ("bfloat16", "bfloat16"))
        plan = json.loads(self.run_worker("--check", "--dtype", "bfloat16", "--kv-cache-dtype",
                                          "float32", "--quantization", "fp8").stdout)
        self.assertEqual((plan["kv_cache_dtype"], plan["quantization"]), ("float32", "fp8"))
        self.assertEqual(plan["activation_quantization"], "none")
        plan = json.loads(self.run_worker("--check", "--kv-cache-dtype", "fp8_e4m3",
                                          "--quantization", "fp8", "--activation-quantization",
                                          "fp8", "--block-size", "16").stdout)
        self.assertEqual((plan["kv_cache_dtype"], plan["activation_quantization"]), ("fp8", "fp8"))
        # A latent of 64 bytes, one factor, a key of 16 numbers of 2 bytes; four layers.
        self.assertEqual(plan["kv_block_bytes"], 16 * 4 * (64 + 4 + 16 * 2))

    def test_dummy_weights_need_no_checkpoint(self):
        model = self.folder / "model"
        model.mkdir()
        shutil.copy(MODEL / "config.json", model)
        flags = ("--check", "--dtype", "bfloat16", "--world-size", "2", "--quantization", "fp8")
        real = json.loads(self.run_worker(*flags).stdout)
        self.assertEqual(json.loads(self.run_worker(*flags, "--load-format", "dummy",
                                                    model=model).stdout), real)

    def test_check_refuses_with_the_reason(self):
        self.refused(78, "world size 3 does not divide", "--check", "--world-size", "3")
        self.refused(78, "rank is 2, expected 0 to 1", "--check", "--rank", "2", "--world-size", "2")
        self.refused(78, "block_size is 7", "--check", "--block-size", "7")
        self.refused(78, "max seq len .4096.* estimated maximum model length is 64", "--check",
                     "--max-model-len", "4096", "--kv-cache-memory-bytes", "100000")
        self.refused(78, "max_model_len is 5121", "--check", "--max-model-len", "5121")
        self.refused(78, "No such file", "--check", model=self.folder)
        self.refused(78, "activation-quantization is fp8, expected none", "--check",
                     "--activation-quantization", "fp8")

    def test_a_broken_checkpoint_is_named(self):
        model = self.copy_of_model()
        victim = model / "model-00002-of-000002.safetensors"
        victim.write_bytes(victim.read_bytes()[:-100])
        self.refused(78, victim.name, "--check", model=model)
        self.refused(78, victim.name, "--listen", f"unix:{self.folder}/socket", model=model)
        (model / "config.json").write_text("{")
        self.refused(78, "config.json", "--check", model=model)

    def test_a_configuration_that_contradicts_its_checkpoint_is_refused(self):
        model = self.copy_of_model()
        config = json.loads((model / "config.json").read_text())
        for field, value, pattern in (
                ("model_type", "llama", 'model_type is "llama", expected "deepseek_v3"'),
                ("num_hidden_layers", 2, r"num_hidden_layers is 2 .*model\.layers\.3\."),
                ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]},
                 'quant_method is "fp8".*no tensor .*F8_E4M3')):
            (model / "config.json").write_text(json.dumps(config | {field: value}))
            self.refused(78, pattern, "--check", model=model)
            self.refused(78, pattern, "--listen", f"unix:{self.folder}/socket", model=model)

    def test_bad_flags_are_refused_before_anything_starts(self):
        for flags in (["--listen", "unix:x", "--dtype", "float16"],
                      ["--listen", "unix:x", "--threads", "0"],
                      ["--listen", "unix:x", "--gpu-memory-utilization", "1.5"],
                      ["--listen", "unix:x", "--kv-cache-memory-bytes", "-1"],
                      ["--listen", "unix:x", "--frobnicate"]):
            self.refused(64, flags[2].lstrip("-") + ".*see fathom-worker --help", *flags)
        self.refused(64, "--listen is required")
        self.refused(64, "expected .*--device cpu", "--check", "--device", "cuda")
        self.refused(64, "is no address", "--listen", "nonsense")
        self.refused(64, "reachable from other hosts", "--listen", "0.0.0.0:0")

    def test_version_and_help(self):
        self.assertRegex(self.run_worker("--version").stdout, r"\d+\.\d+\.\d+")
        self.assertIn("512 MiB", self.run_worker("--help").stdout)

    def test_the_socket_of_a_dead_worker_is_replaced_and_a_live_one_is_not(self):
        address = f"unix:{self.folder}/worker.sock"
        first = self.start(address)
        self.refused(1, "worker.sock", "--listen", address)
        first.kill()
        first.wait()
        self.assertTrue((self.folder / "worker.sock").exists())
        self.start(address)

    def test_places_where_it_cannot_listen(self):
        (self.folder / "file").touch()
        self.refused(1, "file", "--listen", f"unix:{self.folder}/file")
        self.refused(1, "there is no folder", "--listen", f"unix:{self.folder}/none/worker.sock")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.refused(1, f"127.0.0.1:{port}", "--listen", f"127.0.0.1:{port}")

    def test_sigterm_ends_an_idle_worker_at_once_with_0(self):
        worker = self.start(f"unix:{self.folder}/worker.sock")
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        self.assertEqual(worker.wait(PATIENCE_SECONDS), 0)
        self.assertLess(time.monotonic() - began, PATIENCE_SECONDS)


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    unittest.main()
