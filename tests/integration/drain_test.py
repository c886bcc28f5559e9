"""SIGTERM: streams finish, the exit code is 0, nothing is left; a second SIGTERM does not wait."""

import signal
import threading
import time

import pytest

from fathom_server import FathomServer, starting
from http_client import StreamBroken


class Streamer(threading.Thread):
    """One stream of `max_tokens` tokens; counts what came."""

    def __init__(self, client, max_tokens):
        super().__init__(daemon=True)
        self.client = client
        self.max_tokens = max_tokens
        self.streaming = threading.Event()
        self.num_tokens = 0
        self.errors = []
        self.finish_reason = None

    def run(self):
        """Streams to the end, whatever it is."""
        body = dict(prompt=[9, 8, 7], max_tokens=self.max_tokens, ignore_eos=True,
                    return_token_ids=True)
        try:
            with self.client.stream("/v1/completions", body) as stream:
                for event in stream:
                    if "error" in event:
                        self.errors.append(event["error"]["message"])
                        continue
                    choice = event["choices"][0]
                    self.num_tokens += len(choice["token_ids"] or [])
                    self.finish_reason = choice["finish_reason"] or self.finish_reason
                    self.streaming.set()
        except StreamBroken as error:
            self.errors.append(str(error))
        finally:
            self.streaming.set()


def start_streams(server, count, max_tokens):
    """Streams that have all begun."""
    streamers = [Streamer(server.client, max_tokens) for _ in range(count)]
    for streamer in streamers:
        streamer.start()
    for streamer in streamers:
        assert streamer.streaming.wait(30) and not streamer.errors, streamer.errors
    return streamers


def test_sigterm_lets_running_streams_finish(model):
    """Every token of every stream comes, then all exit with 0 and nothing is left."""
    with FathomServer(model, tensor_parallel_size=4) as server:
        streamers = start_streams(server, 8, 300)
        server.stop()  # asserts exit code 0 and that nothing is left
        for streamer in streamers:
            streamer.join(5)
            assert not streamer.errors, streamer.errors
            assert (streamer.num_tokens, streamer.finish_reason) == (300, "length")


def test_new_requests_are_refused_while_draining(model):
    """503 with Retry-After to all but who asks how it is; the streams that run finish."""
    with FathomServer(model, "--max-model-len", 5000, "--drain-timeout-seconds", 200,
                      tensor_parallel_size=2) as server:
        streamers = start_streams(server, 2, 1500)
        server.terminate()
        wait_until(lambda: b"draining" in server.client.get("/health").body)
        for path in ("/health", "/ready", "/ping", "/v1/models"):
            reply = server.client.get(path)
            assert reply.status == 503 and "draining" in reply.error()["message"], reply
        reply = server.client.post("/v1/completions", dict(prompt=[1], max_tokens=1))
        assert reply.status == 503 and "draining" in reply.error()["message"], reply
        assert reply.headers["Retry-After"] and reply.headers["Connection"] == "close"
        assert server.client.get("/live").status == 200
        assert any(streamer.is_alive() for streamer in streamers), "make the streams longer"
        server.process.wait(220)
        for streamer in streamers:
            streamer.join(5)
            assert not streamer.errors and streamer.num_tokens == 1500
        server.stop()


def test_a_second_sigterm_ends_at_once(model):
    """Streams are cut; the clients are told by an error or a closed connection."""
    with FathomServer(model, "--max-model-len", 5000, tensor_parallel_size=4) as server:
        streamers = start_streams(server, 4, 4500)
        server.terminate()
        time.sleep(0.3)
        assert server.process.poll() is None, "it did not wait for the streams"
        server.terminate()
        started = time.monotonic()
        server.process.wait(10)
        assert time.monotonic() - started < 5
        for streamer in streamers:
            streamer.join(5)
            assert not streamer.is_alive() and streamer.num_tokens < 4500
        assert not server.processes_left() and not server.files_left()


@pytest.mark.parametrize("delay_seconds", [0.02, 0.3, 0.6])
def test_sigterm_while_starting_leaves_nothing(model, delay_seconds):
    """Wherever in its start it was; at the very first it has no handler yet and dies of it."""
    with starting(model, tensor_parallel_size=8) as server:
        time.sleep(delay_seconds)
        server.terminate()
        assert server.process.wait(20) in (0, -signal.SIGTERM), server.log()
        wait_until(lambda: not server.processes_left() and not server.files_left())


def test_ready_is_said_when_it_is_ready(model):
    """The line with the address comes once steps can be made, and the plan before it."""
    with FathomServer(model, "--max-model-len", 1024, tensor_parallel_size=2) as server:
        log = server.log()
        assert "KV cache size: " in log and " tokens" in log
        assert "Maximum concurrency for 1,024 tokens per request: " in log
        wait_until(lambda: f":{server.port}" in server.log().lower().partition("ready")[2])


def test_the_launcher_killed_leaves_no_process(model):
    """kill -9 of `fathom serve` itself: its children go too."""
    with starting(model, tensor_parallel_size=2) as server:
        server.wait_until_ready()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not server.processes_left())


def wait_until(condition, timeout_seconds=10):
    """Polls until it holds."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)


@pytest.mark.parametrize("level", ["debug", "info", "warn", "error"])
def test_every_log_level_suits_every_process(model, level):
    """The launcher passes its level on to programs that must know it."""
    with FathomServer(model, "--log-level", level) as server:
        server.client.complete(prompt=[1], max_tokens=1)
