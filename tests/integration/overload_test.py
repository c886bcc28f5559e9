"""Too much, too slow or gone: what one client does is not felt by the others."""

import http.client
import json
import socket
import threading
import time

import pytest

from fathom_server import FathomServer
from http_client import HOST

ENDLESS = dict(prompt=[4, 5, 6], max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope="module")
def server(model):
    """Room for 4 running requests and 8 waiting ones."""
    flags = ["--max-num-seqs", 4, "--max-queued-requests", 8]
    with FathomServer(model, *flags, tensor_parallel_size=2) as running:
        yield running
        running.wait_until_idle()


def open_request(server, body, receive_buffer_bytes=None):
    """A connection with a request on its way, and nobody who reads the answer."""
    connection = socket.socket()
    if receive_buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.connect((HOST, server.port))
    data = json.dumps(body).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                       b"\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    return connection


def fill(server, body, num_waiting):
    """4 running requests and these waiting; gives the connections."""
    connections = [open_request(server, body) for _ in range(4)]
    wait_for_metric(server, "vllm:num_requests_running", 4)
    connections += [open_request(server, body) for _ in range(num_waiting)]
    wait_for_metric(server, "vllm:num_requests_waiting", num_waiting)
    return connections


def hang_up(connections):
    """Closes them all."""
    for connection in connections:
        connection.close()


def wait_for_metric(server, name, value, timeout_seconds=15):
    """Until a gauge has this value."""
    deadline = time.monotonic() + timeout_seconds
    while server.client.metric(name) != value:
        assert time.monotonic() < deadline, (name, server.client.metric(name))
        time.sleep(0.02)


def test_a_full_queue_is_said_at_once(server):
    """429 with Retry-After; the requests that were taken are not disturbed."""
    connections = fill(server, ENDLESS, num_waiting=8)
    try:
        started = time.monotonic()
        reply = server.client.post("/v1/completions", dict(prompt=[1], max_tokens=1))
        assert reply.status == 429 and time.monotonic() - started < 2
        assert "Retry-After" in reply.headers and "queue" in reply.error()["message"]
        assert server.client.metric("vllm:num_requests_running") == 4
    finally:
        hang_up(connections)
    server.wait_until_idle()


def test_who_hangs_up_is_forgotten_wherever_it_stood(server):
    """Whole answers and streams, running and waiting: all blocks free within seconds."""
    for stream in (False, True):
        hang_up(fill(server, dict(ENDLESS, stream=stream), num_waiting=6))
        server.wait_until_idle(5)


def test_many_choices_are_given_up_together(server):
    """One request with 8 choices; its client goes."""
    connection = open_request(server, dict(ENDLESS, n=8, temperature=1))
    wait_for_metric(server, "vllm:num_requests_running", 4)
    connection.close()
    server.wait_until_idle(5)


def test_a_client_that_does_not_read_holds_up_nobody(server):
    """Megabytes of events for a buffer of kilobytes; others are served as ever."""
    body = dict(ENDLESS, stream=True, logprobs=20, max_tokens=3000)
    lazy = [open_request(server, body, receive_buffer_bytes=4096) for _ in range(2)]
    try:
        wait_for_metric(server, "vllm:num_requests_running", 2)
        before = server.rss_bytes()
        for _ in range(20):
            server.client.complete(prompt=[1, 2, 3], max_tokens=20, ignore_eos=True)
        time.sleep(2)
        grown = {key: size - before[key] for key, size in server.rss_bytes().items()}
        # Everything that 2 x 3,000 tokens could say is about 12 MB of JSON.
        assert max(grown.values()) < 24 << 20, grown
    finally:
        hang_up(lazy)
    server.wait_until_idle()


def test_a_hundred_idle_connections_cost_nothing(server):
    """And each of them is still good for a request."""
    connections = [http.client.HTTPConnection(HOST, server.port, timeout=10) for _ in range(100)]
    try:
        for connection in connections:
            connection.connect()
        server.client.complete(prompt=[1], max_tokens=2, ignore_eos=True)
        for connection in connections:
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b""
    finally:
        hang_up(connections)


def test_a_stream_goes_on_while_a_long_prompt_is_read(model):
    """A prompt is read in steps of the budget, and whoever generates has a token in each."""
    with FathomServer(model, "--max-num-batched-tokens", 64, tensor_parallel_size=2) as server:
        with server.client.stream("/v1/completions", ENDLESS) as stream:
            events = iter(stream)
            next(events)
            reading = threading.Thread(
                target=server.client.complete, kwargs=dict(prompt=[7] * 3000, max_tokens=1))
            reading.start()
            wait_for_metric(server, "vllm:num_requests_running", 2)
            num_events = 0
            while reading.is_alive():
                next(events)
                num_events += 1
        # 3,000 tokens take 48 steps; a few pass before the second request is seen to run.
        assert num_events > 20
        server.wait_until_idle()
