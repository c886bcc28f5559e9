"""Several groups of workers behind one coordinator (--data-parallel-size).

The workers are simulated: bench/stream_bench asks, and compares every token with the hash that it
must be.
"""

import json
import os
import random
import signal
import subprocess
import threading
import time

import pytest

import checkpoints
from fathom_server import HOST, FathomServer

GROUPS = 2
RANKS = 2
STREAMS = 32
RECOVERY_SECONDS = 60


@pytest.fixture
def profile(tmp_path):
    """Steps of 5 ms."""
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(dict(kv_cache_tokens=100_000, fixed_us=5000, us_per_token=0,
                                    us_per_sequence=0, us_per_context_token=0)))
    return path


@pytest.fixture(scope="module")
def simulated_model(tmp_path_factory):
    """A folder with config.json alone, and its object."""
    folder = tmp_path_factory.mktemp("simulated")
    source = checkpoints.ROOT / "tests/golden/v3_tiny/ckpt/config.json"
    (folder / "config.json").write_text(source.read_text())
    return folder, json.loads(source.read_text())


def serving(server, group):
    """Whether that group makes steps."""
    return server.client.metric("fathom:serving", engine=str(group)) == 1


def wait_until_all_serve(server):
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not all(serving(server, group) for group in range(GROUPS)):
        assert server.process.poll() is None and time.monotonic() < deadline, server.log()[-4000:]
        time.sleep(0.02)


def workers_of(server, group):
    """Pids of the group's workers that run, told by their sockets."""
    pids = []
    for pid in server.pids("fathom-worker"):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().decode().split("\0")
        except OSError:
            continue
        number = int(arguments[arguments.index("--listen") + 1].rsplit("-", 1)[1].split(".")[0])
        if number // RANKS == group:
            pids.append(pid)
    return pids


def run_clients(server, config, seed, rounds):
    """Requests of all clients; raises if one fails, is cut short or has a wrong token."""
    eos = config["eos_token_id"]
    eos = eos if isinstance(eos, list) else [eos]
    subprocess.run([server.binaries / "stream_bench", "--http", f"{HOST}:{server.port}",
                    "--streams", str(STREAMS), "--rounds", str(rounds), "--output-tokens", "60",
                    "--seed", str(seed), "--vocab-size", str(config["vocab_size"]),
                    "--eos-token-id", *map(str, eos)], check=True, timeout=300)


def test_no_request_is_lost_when_one_group_of_two_is_killed(simulated_model, profile, long, report):
    """4 kills (--long: 100) of a random worker of a random group, whenever both serve."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder, config = simulated_model
    num_kills = 100 if long else 4
    with FathomServer(folder, "--device", "sim", "--sim-profile", profile, "--data-parallel-size",
                      GROUPS, tensor_parallel_size=RANKS) as server:
        wait_until_all_serve(server)
        failures = []
        killed = threading.Event()

        def kill():
            try:
                for _ in range(num_kills):
                    time.sleep(rng.uniform(0.2, 0.8))
                    wait_until_all_serve(server)
                    os.kill(rng.choice(workers_of(server, rng.randrange(GROUPS))), signal.SIGKILL)
                    time.sleep(0.1)
            except Exception as error:  # whatever it was, the test reports it
                failures.append(error)
            finally:
                killed.set()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        num_requests = 0
        while not killed.is_set():
            run_clients(server, config, seed + num_requests, rounds=3)
            num_requests += 3 * STREAMS
        killer.join()
        assert not failures, failures
        resumed = server.client.metric("fathom:requests_resumed_total")
        broken = server.client.metric("fathom:group_failures_total")
        assert broken == num_kills and resumed > 0, (broken, resumed)
        wait_until_all_serve(server)
        server.wait_until_idle()
    report(f"{num_kills} kills: {num_requests} requests, {resumed:.0f} of them moved, none lost")


def test_metrics_tell_groups_apart_and_requests_find_their_prefix(simulated_model, profile):
    """The label engine, as vLLM's dashboards know it."""
    folder, _ = simulated_model
    with FathomServer(folder, "--device", "sim", "--sim-profile", profile, "-dp", GROUPS,
                      tensor_parallel_size=RANKS) as server:
        wait_until_all_serve(server)
        assert len(server.pids("fathom-worker")) == GROUPS * RANKS
        for number in range(5):
            for asked in range(2):
                answer = server.client.complete(prompt=[5 + number] * 200, max_tokens=4)
                found = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (found > 0) == (asked == 1), (number, asked, found)
        for engine in "01":
            assert server.client.metric("vllm:prompt_tokens_total", engine=engine) >= 400
