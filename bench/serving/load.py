"""Clients of an OpenAI completions endpoint in a closed loop, and what each of them saw when.

The clock of a request starts before its connection is opened and stops at the last event that
carries a choice; every such event is one "token", however many the server put into it. These are
the rules of `vllm bench serve` (vLLM 0.16, vllm/benchmarks/lib/endpoint_request_func.py).

One thread, one connection per request. Events are timed when they are read and not parsed beyond
what that takes, so that 1,024 streams do not measure this program.
"""

import asyncio
import gc
import json
import random
import re
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# A quote within a JSON string is escaped, so this is never part of a text.
HAS_CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')


class BrokenResponse(Exception):
    """What came is not a complete stream of events."""


@dataclass(frozen=True)
class Request:
    """A body that is ready to be sent."""

    prompt_len: int
    body: bytes


@dataclass
class Output:
    """What one client saw of one request; seconds."""

    prompt_len: int
    start_time: float = 0.0
    success: bool = False
    ttft: float = 0.0
    itl: list = field(default_factory=list)
    latency: float = 0.0
    output_tokens: int = 0
    generated_text: str = ""
    error: str = ""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go: POST to `base_url` + `path`."""

    base_url: str
    path: str = "/v1/completions"
    headers: tuple = ()  # of (name, value)

    def head(self, body_bytes):
        """The request's line and headers."""
        url = urlsplit(self.base_url)
        lines = [f"POST {url.path.rstrip('/')}{self.path} HTTP/1.1", f"Host: {url.netloc}",
                 "Content-Type: application/json", "Accept: text/event-stream",
                 f"Content-Length: {body_bytes}", "Connection: close",
                 *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def connect(self, make_protocol):
        """Opens a connection; https is what the URL says."""
        url = urlsplit(self.base_url)
        is_tls = url.scheme == "https"
        return await asyncio.get_running_loop().create_connection(
            make_protocol, url.hostname, url.port or (443 if is_tls else 80), ssl=is_tls or None)


def random_requests(count, seed, model, prompt_len, output_len, vocab_size, extra_body=None):
    """Requests with prompts of random token ids; the same for the same arguments."""
    randomness = random.Random(seed)
    ids = [str(token_id) for token_id in range(vocab_size)]
    fields = json.dumps({
        "model": model, "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": output_len,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        **(extra_body or {})})
    return [Request(prompt_len, (fields[:-1] + ', "prompt": [' +
                                 ",".join(randomness.choices(ids, k=prompt_len)) + "]}").encode())
            for _ in range(count)]


class EventStream(asyncio.BufferedProtocol):
    """One response: headers, chunks, events; `done` is set when it has ended, well or not."""

    # What is read is taken out at once, so one buffer is enough for all; asyncio's own way makes
    # and shrinks a quarter of a megabyte for every event.
    _buffer = memoryview(bytearray(64 << 10))

    def __init__(self, output, keeps_text):
        self.output = output
        self.done = asyncio.get_running_loop().create_future()
        self._keeps_text = keeps_text
        self._raw = b""        # not understood yet, as it came
        self._events = b""     # of the body, the beginning of an event
        self._status = None
        self._is_chunked = False
        self._body_left = None  # bytes, where a length was announced
        self._latest = output.start_time
        self._num_events = 0
        self._texts = []

    def get_buffer(self, sizehint):
        return self._buffer

    def buffer_updated(self, nbytes):
        self.take_in(bytes(self._buffer[:nbytes]))

    def take_in(self, data):
        """The next bytes of the response."""
        now = time.perf_counter()
        try:
            self._raw = self._raw + data if self._raw else data
            if self._status is None and not self._read_headers():
                return
            if self._read_body(now):
                self._end(None)
        except (BrokenResponse, ValueError, KeyError) as error:
            self._end(error)

    def connection_lost(self, exc):
        if self.done.done():
            return
        ends_by_closing = self._status == 200 and not self._is_chunked and self._body_left is None
        self._end(exc if ends_by_closing else
                  exc or BrokenResponse("the connection ended before the response did"))

    def _read_headers(self):
        head, separator, rest = self._raw.partition(b"\r\n\r\n")
        if not separator:
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip()
                   for name, _, value in (line.partition(":") for line in lines)}
        self._status = int(first.split()[1])
        self._is_chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._is_chunked and "content-length" in headers:
            self._body_left = int(headers["content-length"])
        self._raw = rest
        return True

    def _read_body(self, now):
        """Takes what has arrived; whether the body is complete."""
        if not self._is_chunked:
            body, self._raw = self._raw, b""
            self._take(body, now)
            if self._body_left is not None:
                self._body_left -= len(body)
            return self._body_left == 0
        raw, at = self._raw, 0
        while True:
            line_end = raw.find(b"\r\n", at)
            if line_end < 0:
                break
            size = int(raw[at:line_end].split(b";")[0], 16)
            end = line_end + 2 + size
            if len(raw) < end + 2:
                break
            if size == 0:
                return True
            self._take(raw[line_end + 2:end], now)
            at = end + 2
        self._raw = raw[at:]
        return False

    def _take(self, body, now):
        if self._status != 200:
            self._events += body  # the reason
            return
        *events, self._events = (self._events + body).split(b"\n\n")
        for event in events:
            event = event.strip()
            if event.startswith(b"data:"):
                self._on_event(event[5:].strip(), now)

    def _on_event(self, payload, now):
        if HAS_CHOICE.search(payload):
            if self._num_events == 0:
                self.output.ttft = now - self.output.start_time
            else:
                self.output.itl.append(now - self._latest)
            self._latest = now
            self._num_events += 1
            if self._keeps_text:
                self._texts.append(json.loads(payload)["choices"][0].get("text") or "")
        elif payload != b"[DONE]":
            event = json.loads(payload)
            if "error" in event:
                raise BrokenResponse(json.dumps(event["error"]))
            if event.get("usage"):
                self.output.output_tokens = event["usage"].get("completion_tokens") or 0

    def _end(self, error):
        if self.done.done():
            return
        output = self.output
        if error is None and self._status != 200:
            error = f"HTTP {self._status}: {self._events.decode(errors='replace').strip()[:500]}"
        if error is None and self._num_events == 0:
            error = "the stream ended without a token"
        output.success = error is None
        output.error = "" if error is None else str(error) or repr(error)
        output.latency = self._latest - output.start_time
        output.output_tokens = output.output_tokens or self._num_events
        output.generated_text = "".join(self._texts)
        self.done.set_result(None)


async def send(endpoint, request, keeps_text):
    """Sends one request and follows its stream to the end."""
    output = Output(request.prompt_len, start_time=time.perf_counter())
    try:
        transport, stream = await endpoint.connect(lambda: EventStream(output, keeps_text))
    except OSError as error:
        output.error = f"no connection: {error}"
        return output
    transport.write(endpoint.head(len(request.body)) + request.body)
    try:
        await stream.done
    finally:
        transport.abort()
    return output


async def run_closed_loop(endpoint, requests, concurrency, keeps_text=False):
    """Each of `concurrency` clients sends its next request when its last has ended.

    Gives (outputs in the order of requests, seconds from the first byte to the last).
    """
    outputs = [None] * len(requests)
    waiting = iter(enumerate(requests))

    async def client():
        for i, request in waiting:  # shared: each takes the next one
            outputs[i] = await send(endpoint, request, keeps_text)

    gc.collect()
    gc.disable()  # a pause would look like the server's
    try:
        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(concurrency, len(requests)))))
        return outputs, time.perf_counter() - start
    finally:
        gc.enable()
