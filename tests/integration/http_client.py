"""A small HTTP client: what a test needs and a library would hide (exact bytes, broken streams).

Every request opens its own connection unless said otherwise, so a test can kill or stall one
without touching another.
"""

import http.client
import json
import re
import socket
from dataclasses import dataclass

HOST = "127.0.0.1"


class StreamBroken(Exception):
    """The connection ended, or went silent, before the stream said [DONE]."""


@dataclass(frozen=True)
class Reply:
    """A whole response."""

    status: int
    headers: dict
    body: bytes

    def json(self):
        """The body as JSON."""
        return json.loads(self.body)

    def exact(self):
        """The body as JSON with every number as the text that was sent: compares bit for bit."""
        return json.loads(self.body, parse_float=str, parse_int=str)

    def error(self):
        """The error object of a refused request; fails when there is none."""
        return self.json()["error"]


class Client:
    """Requests to one server. Thread-safe: it keeps no connection."""

    def __init__(self, port, timeout_seconds=60):
        self.port = port
        self.timeout_seconds = timeout_seconds

    def request(self, method, path, body=None, headers=None):
        """Sends one request; `body` is bytes, or anything JSON can say."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self.timeout_seconds)
        try:
            connection.request(method, path, *_encode(body, headers))
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def get(self, path):
        """GET."""
        return self.request("GET", path)

    def post(self, path, body):
        """POST of a JSON body."""
        return self.request("POST", path, body)

    def complete(self, **fields):
        """POST /v1/completions that must succeed; gives the JSON answer."""
        reply = self.post("/v1/completions", fields)
        assert reply.status == 200, (reply.status, reply.body[:500])
        return reply.json()

    def stream(self, path, body):
        """POST with `stream` set; gives a Stream."""
        return Stream(self.port, path, body, self.timeout_seconds)

    def raw(self, data, half_close=False):
        """Sends these bytes as they are and reads until the server closes or falls silent."""
        with socket.create_connection((HOST, self.port), self.timeout_seconds) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return _read_reply(connection)

    def metric(self, name, **labels):
        """The sum of a metric's samples that carry these labels; None when it is absent."""
        samples = parse_metrics(self.get("/metrics").body.decode())
        values = [value for (sample, sample_labels), value in samples.items()
                  if sample == name and labels.items() <= dict(sample_labels).items()]
        return sum(values) if values else None


class Stream:
    """A server-sent event stream: iterate for the events, close early to cancel."""

    def __init__(self, port, path, body, timeout_seconds):
        self.done = False  # [DONE] was seen
        self._connection = http.client.HTTPConnection(HOST, port, timeout=timeout_seconds)
        self._connection.request("POST", path, *_encode(dict(body, stream=True), None))
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = dict(self._response.getheaders())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Hangs up."""
        self._response.close()
        self._connection.close()

    def error(self):
        """The error object of a refused stream (any status but 200)."""
        return json.loads(self._response.read())["error"]

    def __iter__(self):
        """Events as JSON until [DONE]; StreamBroken when the connection ends before it."""
        while not self.done:
            data = self._next_data()
            if data == b"[DONE]":
                self.done = True
            else:
                yield json.loads(data)

    def _next_data(self):
        """The next `data:` payload; everything else in the stream must be a blank line."""
        while True:
            try:
                line = self._response.readline()
            except (OSError, http.client.HTTPException) as error:
                raise StreamBroken(repr(error)) from error
            if not line:
                raise StreamBroken("the connection ended before [DONE]")
            line = line.rstrip(b"\r\n")
            if line.startswith(b"data: "):
                return line[len(b"data: "):]
            assert not line or line.startswith(b":"), f"not an event line: {line!r}"


def parse_metrics(text):
    """Prometheus text -> {(name, ((label, value), …)): number}."""
    samples = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?", line)
        if match:
            labels = tuple(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            samples[(match[1], labels)] = float(match[3])
    return samples


def _encode(body, headers):
    """(bytes, headers) of a request."""
    if body is None:
        return None, headers or {}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return data, {"Content-Type": "application/json", **(headers or {})}


def _read_reply(connection):
    """Status and body of the first response on a raw socket; status 0 when it just closed."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return Reply(response.status, dict(response.getheaders()), response.read())
    except (http.client.HTTPException, ConnectionError):
        return Reply(0, {}, b"")
