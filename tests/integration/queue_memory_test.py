"""What 10,000 queued requests cost the coordinator, and that it stays at that."""

import subprocess
import time

import checkpoints
from fathom_server import FathomServer, rss_bytes

NUM_REQUESTS = 10_000
PROMPT_TOKENS = 1000
SLOTS = 64
# Of a request that waits: its prompt, as it came and as it is computed, with room to grow; names of
# blocks; and what does not depend on its length.
MOST_BYTES_PER_REQUEST = 16 * PROMPT_TOKENS + 4096
FLAT = 1.1  # what allocators may add from one time to the next


def start_streams(server, address, streams, prompt_tokens, output_tokens):
    """stream_bench with so many clients."""
    return subprocess.Popen([server.binaries / "stream_bench", "--grpc", address, "--streams",
                             str(streams), "--prompt-tokens", str(prompt_tokens), "--output-tokens",
                             str(output_tokens)], stdout=subprocess.DEVNULL)


def queue_them(server, address):
    """Asks all at once, behind others; the coordinator's largest size, and the most that waited."""
    # For about five seconds, so that nothing is begun before all, on a slow machine too, wait.
    before = start_streams(server, address, SLOTS, 16, 250)
    while before.poll() is None and server.client.metric("vllm:num_requests_running") < SLOTS:
        time.sleep(0.05)
    bench = start_streams(server, address, NUM_REQUESTS, PROMPT_TOKENS, 4)
    (coordinator,) = server.pids("fathom-coordinator")
    largest = waiting = 0
    while bench.poll() is None:
        largest = max(largest, rss_bytes(coordinator))
        waiting = max(waiting, server.client.metric("vllm:num_requests_waiting"))
        time.sleep(0.1)
    assert (before.wait(), bench.returncode) == (0, 0), "a token was wrong, or a request failed"
    return largest, waiting


def test_10000_queued_requests_cost_what_is_said_and_no_more_each_time(tmp_path, report):
    """Three times the same: bounded, then flat."""
    address = f"unix:{tmp_path}/grpc"
    with FathomServer(checkpoints.ROOT / "bench/models/DeepSeek-V3", "--device", "sim",
                      "--sim-profile", checkpoints.ROOT / "bench/profiles/constant-20ms.json",
                      "--max-num-seqs", SLOTS, "--max-num-batched-tokens", 65536,
                      "--max-queued-requests", NUM_REQUESTS,
                      "--grpc-listen", address) as server:
        (coordinator,) = server.pids("fathom-coordinator")
        before = rss_bytes(coordinator)
        largest = []
        for _ in range(3):
            size, waiting = queue_them(server, address)
            assert waiting > 0.8 * NUM_REQUESTS, waiting
            largest.append(size)
        server.wait_until_idle()
        after = rss_bytes(coordinator)
    megabytes = [round(size / 1e6, 1) for size in (before, *largest, after)]
    report(f"resident MB before, with {NUM_REQUESTS} requests three times, after: {megabytes}")
    assert largest[0] - before <= NUM_REQUESTS * MOST_BYTES_PER_REQUEST
    assert max(largest[1:]) <= FLAT * largest[0] and after <= FLAT * largest[0]
