"""Many streams, through the gateway and past it: every token is the one that it must be."""

import json
import subprocess

import checkpoints
from fathom_server import HOST, FathomServer, free_port

STREAMS, ROUNDS, OUTPUT_TOKENS, SLOW_CLIENTS = 64, 3, 40, 100


def test_streams_beside_clients_that_only_wait(tmp_path, report):
    """stream_bench compares the tokens; here its ways are counted."""
    address = f"unix:{tmp_path}/grpc"
    with FathomServer(checkpoints.ROOT / "bench/models/DeepSeek-V3", "--device", "sim",
                      "--sim-profile", checkpoints.ROOT / "bench/profiles/constant-20ms.json",
                      "--grpc-listen", address) as server:
        done = subprocess.run(
            [server.binaries / "stream_bench", "--grpc", address, "--http",
             f"{HOST}:{server.port}", "--slow-clients", str(SLOW_CLIENTS), "--streams",
             str(STREAMS), "--rounds", str(ROUNDS), "--output-tokens", str(OUTPUT_TOKENS),
             "--staggered", "--pause-ms", "20", "--json"], stdout=subprocess.PIPE, check=True, timeout=300)
        server.wait_until_idle()
        assert server.is_healthy()
    *runs, compared = map(json.loads, done.stdout.splitlines())
    assert [run["clients"] for run in runs] == ["grpc", "http", "http beside slow clients"]
    for run in runs:
        assert (run["requests"], run["failed"], run["wrong_tokens"]) == (ROUNDS * STREAMS, 0, 0)
    report(f"the gateway added {compared['added_ttft_ms_p50']:.1f} ms of TTFT")


def test_a_bench_without_answers_has_no_figures():
    """A reason and an exit code instead."""
    done = subprocess.run([FathomServer.binaries / "stream_bench", "--http", f"{HOST}:{free_port()}",
                           "--streams", "4", "--json"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert "none of 4 requests was answered" in done.stderr
