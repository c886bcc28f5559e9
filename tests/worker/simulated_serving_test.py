"""`fathom serve --device sim`: every token that clients get is the hash of what stands before it.

The hash is written here from the words of worker/sim_token.h, apart from its code.
"""

import concurrent.futures
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/integration"))

from fathom_server import FathomServer, run_to_exit, run_program  # noqa: E402
from http_client import StreamBroken  # noqa: E402

BIN = pathlib.Path(sys.argv[sys.argv.index("--bin") + 1])
FathomServer.binaries = BIN
NUM_STREAMS = 32
SEED = random.SystemRandom().randrange(1 << 32)


def mix(x):
    """The finaliser of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def continuation(prompt, count, vocab_size, eos_token_ids):
    """What a simulated model answers to a prompt of token ids."""
    state = 0
    tokens = []
    for token in prompt:
        state = mix(((state ^ token) + 0x9E3779B97F4A7C15) % 2**64)
    while len(tokens) < count:
        token = state % vocab_size
        while token in eos_token_ids:
            token = (token + 1) % vocab_size
        tokens.append(token)
        state = mix(((state ^ token) + 0x9E3779B97F4A7C15) % 2**64)
    return tokens


class SimulatedServingTest(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)
        self.model = self.folder / "model"
        self.model.mkdir()
        source = ROOT / "tests/golden/v3_tiny/ckpt/config.json"
        shutil.copy(source, self.model)
        config = json.loads(source.read_text())
        self.vocab_size = config["vocab_size"]
        eos = config["eos_token_id"]
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.random = random.Random(SEED)

    def profile(self, **fields):
        """A file with a millisecond a step, unless told otherwise."""
        profile = dict(kv_cache_tokens=100_000, fixed_us=1000, us_per_token=0, us_per_sequence=0,
                       us_per_context_token=0)
        path = self.folder / "profile.json"
        path.write_text(json.dumps(profile | fields))
        return path

    def serve(self, *flags, **fields):
        return FathomServer(self.model, "--device", "sim", "--sim-profile", self.profile(**fields),
                            *flags, tensor_parallel_size=4)

    def request(self, index):
        prompt = [self.random.randrange(self.vocab_size)
                  for _ in range(self.random.randrange(1, 100))]
        return dict(prompt=prompt, max_tokens=self.random.randrange(20, 120), seed=index,
                    temperature=index % 2, return_token_ids=True)

    def right(self, request):
        return continuation(request["prompt"], request["max_tokens"], self.vocab_size, self.eos)

    def stream(self, server, request):
        """The token ids that a stream brought, and whether it was whole."""
        tokens = []
        try:
            with server.client.stream("/v1/completions", request) as stream:
                if stream.status != 200:
                    return tokens, False
                for event in stream:
                    if "error" in event:
                        return tokens, False
                    for choice in event["choices"]:
                        tokens += choice["token_ids"] or []
        except (StreamBroken, OSError):
            return tokens, False
        return tokens, True

    def stream_all(self, server, requests):
        with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
            return list(pool.map(lambda request: self.stream(server, request), requests))

    def test_all_tokens_of_many_streams_are_right(self):
        requests = [self.request(index) for index in range(2 * NUM_STREAMS)]
        with self.serve() as server:
            for request, (tokens, whole) in zip(requests, self.stream_all(server, requests)):
                self.assertTrue(whole)
                self.assertEqual(tokens, self.right(request))

    def test_preemption_changes_no_token(self):
        requests = [self.request(index) for index in range(NUM_STREAMS)]
        with self.serve("--max-model-len", 256, kv_cache_tokens=1024) as server:
            for request, (tokens, whole) in zip(requests, self.stream_all(server, requests)):
                self.assertTrue(whole)
                self.assertEqual(tokens, self.right(request))
            self.assertGreater(server.client.metric("vllm:num_preemptions_total"), 0)
            server.wait_until_idle()

    def test_when_a_worker_dies_under_load_all_tokens_stay_right(self):
        """Requests that lose their worker pause, and go on with the tokens that are right."""
        requests = [self.request(index) for index in range(8 * NUM_STREAMS)]
        with self.serve(fixed_us=3000) as server:
            with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
                futures = [pool.submit(self.stream, server, request) for request in requests]
                futures[NUM_STREAMS].result()
                server.kill_one("fathom-worker")
                answers = [future.result() for future in futures]
            self.assertGreater(server.client.metric("fathom:requests_resumed_total"), 0)
            for request, answer in zip(requests, answers):
                self.assertEqual(answer, (self.right(request), True))

    def test_logprobs_are_valid(self):
        with self.serve() as server:
            answer = server.client.complete(prompt=[5, 9, 2], max_tokens=4, logprobs=3, echo=True)
            logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
            self.assertEqual(len(logprobs), 7)
            self.assertTrue(all(value <= 0 for value in logprobs[1:]))

    def test_a_bad_profile_is_one_clear_line(self):
        whole = json.loads(self.profile().read_text())
        missing = {key: value for key, value in whole.items() if key != "us_per_token"}
        for text, expected in ((json.dumps(missing), "us_per_token is missing, expected a number"),
                               (json.dumps(whole | {"fixed_us": -1}), "fixed_us is -1, expected"),
                               (json.dumps(whole | {"kv_cache_tokens": 100}), "kv_cache_tokens.*100"),
                               ("{", "it is not valid JSON")):
            path = self.folder / "bad.json"
            path.write_text(text)
            flags = ("--device", "sim", "--sim-profile", path)
            returncode, log = run_to_exit(self.model, *flags, "--max-model-len", 512)
            self.assertEqual(returncode, 78, log)
            self.assertRegex(log.strip().splitlines()[-1], f"^fathom: .*{expected}")
            returncode, _, log = run_program("fathom-worker", "--model", self.model, *flags,
                                             "--max-model-len", 512, "--check")
            self.assertEqual((returncode, log.count("\n")), (78, 1), log)
            self.assertRegex(log, expected)

    def test_the_flags_go_together(self):
        for flags in (("--device", "sim"), ("--sim-profile", self.profile())):
            returncode, log = run_to_exit(self.model, *flags)
            self.assertEqual(returncode, 64, log)
            self.assertIn("--device sim and --sim-profile go together", log)
        returncode, log = run_to_exit(self.model, "--device", "sim", "--sim-profile", "/nowhere")
        self.assertEqual(returncode, 78, log)
        self.assertIn("--sim-profile /nowhere: No such file", log)

    def test_the_shipped_profiles_are_what_the_script_writes(self):
        subprocess.run([ROOT / "bench/make_profiles", self.folder / "profiles"], check=True)
        shipped = {path.name: path.read_text() for path in (ROOT / "bench/profiles").iterdir()}
        written = {path.name: path.read_text() for path in (self.folder / "profiles").iterdir()}
        self.assertEqual(shipped, written)
        for name in ("h200.json", "b200.json"):
            self.assertIn("A MODEL, NOT A MEASUREMENT", shipped[name])


if __name__ == "__main__":
    at = sys.argv.index("--bin")
    del sys.argv[at:at + 2]
    print(f"seed {SEED}", flush=True)
    unittest.main()
