"""Several workers on GPUs: tokens of one rank, and a death that is noticed.

Workers that share a GPU do so through peer memory; without MPS their kernels take turns on it, some
milliseconds each: right, and slow. Where there are two GPUs, also through NCCL.
"""

import os
import signal
import subprocess
import time

import pytest

from checkpoints import golden_checkpoint
from fathom_server import FathomServer
from faults_test import NO_RECOVERY, start_load, wait_until_back, wait_until_ends
from golden_test import ask

LEAVING_SECONDS = 5  # the promise


@pytest.fixture(autouse=True)
def needs_a_gpu():
    """Skips unless workers compute on one."""
    if FathomServer.device != "cuda":
        pytest.skip("no GPU here: needs --device cuda")


def num_gpus():
    """Of this machine."""
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.stdout.count("UUID")


def flags_of(way):
    """Of two workers: "shared" on one GPU, else each on its own with these collectives."""
    if way == "shared":
        return ["--collectives", "peer"]
    if num_gpus() < 2:
        pytest.skip("needs two GPUs")
    return ["--gpus", "0,1", "--collectives", way]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_on_one_gpu_give_the_tokens_of_one(world_size, report):
    """And these are the golden ones."""
    checkpoint = golden_checkpoint("v3_tiny")
    flags = ["--dtype", "float32", "--collectives", "peer"]
    answers, seconds = {}, {}
    for size in (1, world_size):
        with FathomServer(checkpoint.folder, *flags, tensor_parallel_size=size) as server:
            started = time.monotonic()
            answers[size] = ask(server.client, checkpoint.cases)
            seconds[size] = time.monotonic() - started
    for (alone, _), (together, _), case in zip(answers[1], answers[world_size], checkpoint.cases):
        assert together == alone == case.greedy
    report(f"v3_tiny, {len(checkpoint.cases)} prompts: one rank {seconds[1]:.2f} s, "
           f"{world_size} ranks on the GPU {seconds[world_size]:.2f} s")


@pytest.mark.parametrize("way", ["peer", "nccl"])
def test_ranks_on_gpus_of_their_own_give_the_golden_tokens(way, report):
    """Each on its own, in float32."""
    checkpoint = golden_checkpoint("v3_tiny")
    flags = ["--dtype", "float32", *flags_of(way)]
    with FathomServer(checkpoint.folder, *flags, tensor_parallel_size=2) as server:
        started = time.monotonic()
        answers = ask(server.client, checkpoint.cases)
        seconds = time.monotonic() - started
    assert [tokens for tokens, _ in answers] == [case.greedy for case in checkpoint.cases]
    report(f"{way}: {len(answers)} prompts, {seconds:.2f} s")


def wait_for_line(server, line, count):
    """Waits until the log has the line so often; gives the seconds."""
    started = time.monotonic()
    while server.log().count(line) < count:
        assert time.monotonic() - started < 60, server.log()[-4000:]
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.mark.parametrize("way", ["shared", "peer", "nccl"])
def test_a_killed_rank_ends_the_other_within_5_seconds_and_the_group_forms_again(
        way, model, report):
    """kill -9 under load, each rank in turn."""
    lines = [way]
    with FathomServer(model, "--max-model-len", 5000, *flags_of(way), *NO_RECOVERY,
                      tensor_parallel_size=2) as server:
        for rank in (0, 1, 1):
            clients = start_load(server)
            workers = sorted(server.pids("fathom-worker"))
            survivor, victim = workers[1 - rank], workers[rank]
            num_left = server.log().count("left epoch")
            os.kill(victim, signal.SIGKILL)
            killed_at = time.monotonic()
            left = wait_for_line(server, "left epoch", num_left + 1)
            told = wait_until_ends(clients, killed_at)
            back = wait_until_back(server)
            kept = survivor in server.pids("fathom-worker")
            lines.append(f"worker {rank} killed: the other left its epoch after {left:.3f} s, "
                         f"{'and lived on' if kept else 'and was replaced'}; clients told after "
                         f"{told:.2f} s, serving again after {time.monotonic() - killed_at:.2f} s "
                         f"({back:.2f} s of waiting)")
            assert left < LEAVING_SECONDS
    report("\n    ".join(lines))


def test_a_frozen_rank_ends_the_other_by_the_step_timeout(model, report):
    """What a hung peer looks like: it neither computes nor answers."""
    with FathomServer(model, "--max-model-len", 5000, "--step-timeout-seconds", 2,
                      tensor_parallel_size=2) as server:
        start_load(server)
        victim = server.pids("fathom-worker")[1]
        num_left = server.log().count("left epoch")
        os.kill(victim, signal.SIGSTOP)
        left = wait_for_line(server, "left epoch", num_left + 1)
        os.kill(victim, signal.SIGKILL)  # nothing else ends it, and the launcher starts it again
        back = wait_until_back(server)
    report(f"frozen worker: the other left its epoch after {left:.2f} s (limit of a step: 2 s), "
           f"serving {back:.2f} s after it was killed")
