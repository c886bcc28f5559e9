"""kill -9 of any process under load: streams go on, or get a clear end; the system comes back."""

import concurrent.futures
import http.client
import os
import random
import signal
import threading
import time

import pytest

from fathom_server import FathomServer
from http_client import StreamBroken

NUM_CLIENTS = 8
# For the tests of how requests end: none waits for lost workers to come back.
NO_RECOVERY = ("--recovery-timeout-seconds", 0)
CLEAR_END_SECONDS = 5
RECOVERY_SECONDS = 60


class LoadedClient(threading.Thread):
    """One endless stream; notes how and when it ended."""

    def __init__(self, client, number):
        super().__init__(daemon=True)
        self.client = client
        self.number = number
        self.streaming = threading.Event()  # the first token has come
        self.ended_at = None
        self.end = None

    def run(self):
        """Streams until something ends it."""
        body = dict(prompt=[5 + self.number] * 20, max_tokens=4000, ignore_eos=True, temperature=1)
        try:
            with self.client.stream("/v1/completions", body) as stream:
                if stream.status != 200:
                    self.end = ("refused", stream.error()["message"])
                    return
                self.end = ("done", None)
                for event in stream:
                    if "error" in event:
                        self.end = ("error", event["error"]["message"])
                    self.streaming.set()
        except StreamBroken as error:
            # After an error event the closing [DONE] is a courtesy that a dying server may owe.
            self.end = ("broken", str(error))
        except (OSError, http.client.HTTPException) as error:
            self.end = ("broken", repr(error))
        finally:
            self.ended_at = time.monotonic()
            self.streaming.set()


def start_load(server):
    """Clients that are all in the middle of a stream."""
    clients = [LoadedClient(server.client, number) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.streaming.wait(30)
        assert client.end in (None, ("done", None)), client.end
    return clients


def wait_until_ends(clients, killed_at):
    """Asserts that each client was told within 5 seconds; gives the slowest."""
    for client in clients:
        client.join(max(0, killed_at + CLEAR_END_SECONDS - time.monotonic()))
    waiting = [client.number for client in clients if client.is_alive()]
    assert not waiting, f"clients {waiting} heard nothing for {CLEAR_END_SECONDS} s"
    return max(client.ended_at for client in clients) - killed_at


def wait_until_back(server):
    """Waits for /health; gives the seconds. The next request must then succeed at once."""
    started = time.monotonic()
    while not server.is_healthy():
        assert server.process.poll() is None, server.log()[-4000:]
        assert time.monotonic() - started < RECOVERY_SECONDS, server.log()[-4000:]
        time.sleep(0.05)
    answer = server.client.complete(prompt=[1, 2, 3], max_tokens=5, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5
    return time.monotonic() - started


def wait_until_served(server):
    """Asks until it is answered: right after a kill /health may not know of it yet."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        try:
            if server.client.post("/v1/completions", dict(prompt=[1], max_tokens=1)).status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        assert time.monotonic() < deadline, server.log()[-4000:]
        time.sleep(0.05)


class FiniteClient(threading.Thread):
    """One stream of tokens that are known; notes what came and the longest pause."""

    def __init__(self, client, body):
        super().__init__(daemon=True)
        self.client = client
        self.body = body
        self.streaming = threading.Event()  # tokens have come
        self.tokens = []
        self.longest_pause = 0
        self.end = None

    def run(self):
        """Streams to the end."""
        try:
            last = time.monotonic()
            with self.client.stream("/v1/completions", self.body) as stream:
                for event in stream:
                    assert "error" not in event, event
                    now = time.monotonic()
                    self.longest_pause = max(self.longest_pause, now - last)
                    last = now
                    for choice in event["choices"]:
                        self.tokens += choice["token_ids"] or []
                    if len(self.tokens) > 5:
                        self.streaming.set()
            self.end = "done"
        except Exception as error:  # whatever it was, the test reports it
            self.end = repr(error)
        finally:
            self.streaming.set()


# Gloo's steps are slow.
@pytest.mark.parametrize("collectives, num_tokens", [("shm", 400), ("gloo", 80)])
def test_streams_go_on_after_kill_9_of_a_worker(model, collectives, num_tokens, long, report):
    """2 rounds (--long: 20): a pause, and the tokens that there would have been."""
    longest_pause = 0
    bodies = [dict(prompt=[5 + number] * 20, max_tokens=num_tokens, ignore_eos=True, seed=number,
                   temperature=number % 2, return_token_ids=True) for number in range(NUM_CLIENTS)]
    with FathomServer(model, "--collectives", collectives, "--max-model-len", 1000,
                      tensor_parallel_size=4) as server:
        with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answers = list(pool.map(lambda body: server.client.complete(**body), bodies))
        for _ in range(20 if long else 2):
            clients = [FiniteClient(server.client, body) for body in bodies]
            for client in clients:
                client.start()
            for client in clients:
                assert client.streaming.wait(30)
            assert all(client.end is None for client in clients), "they ended before the kill"
            server.kill_one("fathom-worker")
            for client, answer in zip(clients, answers):
                client.join(2 * RECOVERY_SECONDS)
                assert client.end == "done", client.end
                assert client.tokens == answer["choices"][0]["token_ids"]
                longest_pause = max(longest_pause, client.longest_pause)
        server.wait_until_idle()
        resumed = server.client.metric("fathom:requests_resumed_total")
        assert resumed >= NUM_CLIENTS, resumed
    report(f"{collectives}: longest pause {longest_pause:.2f} s")


@pytest.mark.parametrize("role", ["fathom-worker", "fathom-coordinator", "fathom-gateway"])
def test_kill_9_is_told_to_every_client_and_healed(model, role, long, report):
    """3 rounds of each kind (--long: 20)."""
    slowest_end = slowest_return = 0
    with FathomServer(model, "--max-model-len", 5000, *NO_RECOVERY,
                      tensor_parallel_size=8) as server:
        for round_number in range(20 if long else 3):
            clients = start_load(server)
            killed = server.kill_one(role)
            killed_at = time.monotonic()
            slowest_end = max(slowest_end, wait_until_ends(clients, killed_at))
            for client in clients:
                check_end(client.end, role)
            slowest_return = max(slowest_return, wait_until_back(server))
            assert killed not in server.descendants(), f"round {round_number}"
        server.wait_until_idle()
        assert len(server.pids("fathom-worker")) == 8
        assert len(server.pids("fathom-coordinator")) == len(server.pids("fathom-gateway")) == 1
    report(f"{role}: slowest end {slowest_end:.2f} s, slowest return {slowest_return:.2f} s")


def test_a_worker_killed_among_gloo_peers_is_healed(model, long):
    """TCP between ranks instead of shared memory: the same promise."""
    with FathomServer(model, "--collectives", "gloo", *NO_RECOVERY,
                      tensor_parallel_size=4) as server:
        for _ in range(20 if long else 3):
            clients = start_load(server)
            server.kill_one("fathom-worker")
            wait_until_ends(clients, time.monotonic())
            for client in clients:
                check_end(client.end, "fathom-worker")
            wait_until_back(server)
        server.wait_until_idle()


def check_end(end, role):
    """A gateway can say why; without one the connection closes."""
    kind, detail = end
    if role == "fathom-gateway":
        assert kind == "broken", end
    else:
        assert kind == "error" and detail, end
    if role == "fathom-worker":
        assert "worker" in detail, end


def test_a_request_while_the_system_is_down_is_refused_clearly(model):
    """Until steps can be made again: 503 with a reason, on /health too."""
    with FathomServer(model, *NO_RECOVERY, tensor_parallel_size=8) as server:
        server.kill_one("fathom-worker")
        refused = None
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            reply = server.client.post("/v1/completions", dict(prompt=[1], max_tokens=1))
            if reply.status == 200 and refused:
                break
            if reply.status != 200:
                refused = reply
        assert refused and refused.status == 503 and refused.error()["message"], refused
        wait_until_back(server)


def test_a_silent_worker_is_noticed_and_taken_back(model):
    """SIGSTOP: clients are told when the step's time is up; SIGCONT: it joins again."""
    with FathomServer(model, "--step-timeout-seconds", 2, *NO_RECOVERY,
                      tensor_parallel_size=4) as server:
        clients = start_load(server)
        stopped = random.choice(server.pids("fathom-worker"))
        os.kill(stopped, signal.SIGSTOP)
        try:
            wait_until_ends(clients, time.monotonic() + 2)
            for client in clients:
                check_end(client.end, "fathom-worker")
            assert not server.is_healthy()
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_until_back(server)
        assert stopped in server.pids("fathom-worker")


def test_a_worker_that_freezes_while_idle_is_noticed_before_anything_breaks(model):
    """SIGSTOP: /health says 503; SIGCONT: it says 200 again, and the group is the same."""
    with FathomServer(model, tensor_parallel_size=4) as server:
        stopped = random.choice(server.pids("fathom-worker"))
        os.kill(stopped, signal.SIGSTOP)
        try:
            while server.is_healthy():
                time.sleep(0.01)
        finally:
            os.kill(stopped, signal.SIGCONT)
        wait_until_back(server)
        assert "no answer from" in server.log() and "broke" not in server.log(), server.log()[-4000:]


def test_kills_at_random_times_are_healed_too(model, long):
    """One to three kills within a second, in the middle of recovering as well."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with FathomServer(model, "--max-model-len", 5000, *NO_RECOVERY,
                      tensor_parallel_size=4) as server:
        for _ in range(20 if long else 4):
            clients = start_load(server)
            for _ in range(rng.randrange(1, 4)):
                time.sleep(rng.uniform(0, 0.4))
                children = server.pids_of_children()
                if children:
                    os.kill(rng.choice(children), signal.SIGKILL)
            wait_until_ends(clients, time.monotonic())
            wait_until_served(server)
        server.wait_until_idle()
        assert len(server.pids_of_children()) == 6
