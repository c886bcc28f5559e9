"""64 streaming clients against 8 workers, with random cancels: no error, no hang, no leak."""

import random
import threading
import time

from fathom_server import FathomServer

NUM_CLIENTS = 64
KV_CACHE_BYTES = 4 << 20  # small, so that all of it has been touched when the warm-up ends

# Growth of resident memory from the end of the warm-up to the end: allocators keep what a burst
# needed once and fragment a little, a leak of one message per token would be far above this.
MAX_GROWTH_BYTES = 6 << 20
MAX_GROWTH_RATIO = 0.10


class Soak:
    """The clients and what they saw."""

    def __init__(self, client, deadline):
        self.client = client
        self.deadline = deadline
        self.lock = threading.Lock()
        self.counts = {"finished": 0, "cancelled": 0, "tokens": 0}
        self.failures = []

    def run_client(self, number):
        """One stream after another until the deadline."""
        rng = random.Random(number)
        while time.monotonic() < self.deadline and not self.failures:
            try:
                self.one_stream(rng)
            except Exception as error:  # whatever it was, the test reports it
                with self.lock:
                    self.failures.append(f"client {number}: {error!r}")

    def one_stream(self, rng):
        """A random request; one in three hangs up at a random token."""
        max_tokens = rng.choice((1, 5, 30, 120))
        hang_up_after = rng.randrange(max_tokens) if rng.random() < 0.33 else None
        body = dict(prompt=[rng.randrange(2, 512) for _ in range(rng.choice((1, 10, 60, 200)))],
                    max_tokens=max_tokens, temperature=rng.choice((0, 1)), ignore_eos=True,
                    return_token_ids=True, stream_options={"include_usage": True})
        tokens = []
        usage = None
        with self.client.stream("/v1/completions", body) as stream:
            assert stream.status == 200, stream.error()
            for event in stream:
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    tokens += choice["token_ids"] or []
                if hang_up_after is not None and len(tokens) > hang_up_after:
                    return self.count("cancelled", len(tokens))
        assert len(tokens) == max_tokens == usage["completion_tokens"], (tokens, usage)
        return self.count("finished", len(tokens))

    def count(self, kind, num_tokens):
        """Tallies one stream."""
        with self.lock:
            self.counts[kind] += 1
            self.counts["tokens"] += num_tokens


def growth(before, after):
    """{(program, pid): (before, after)} of the processes that grew too much."""
    return {key: (before[key], after[key]) for key in before
            if after[key] - before[key] > max(MAX_GROWTH_BYTES, MAX_GROWTH_RATIO * before[key])}


def test_64_streams_with_random_cancels_leave_nothing_behind(model, long, report):
    """20 seconds (--long: 2 minutes) of load; the first quarter is the warm-up."""
    seconds = 120 if long else 20
    flags = ["--kv-cache-memory-bytes", KV_CACHE_BYTES, "--max-model-len", 1024]
    with FathomServer(model, *flags, tensor_parallel_size=8) as server:
        soak = Soak(server.client, time.monotonic() + seconds)
        threads = [threading.Thread(target=soak.run_client, args=(number,), daemon=True)
                   for number in range(NUM_CLIENTS)]
        pids = server.descendants()
        for thread in threads:
            thread.start()
        time.sleep(seconds / 4)
        before = server.rss_bytes()
        for thread in threads:
            thread.join(max(0, soak.deadline - time.monotonic()) + 30)
        assert not soak.failures, soak.failures[:5]
        assert not any(thread.is_alive() for thread in threads), "a client hangs"
        after = server.rss_bytes()
        server.wait_until_idle()
        report(f"{seconds} s: {soak.counts}; resident MB before, after: " + ", ".join(
            f"{key[0]} {before[key] / 1e6:.1f} {after[key] / 1e6:.1f}" for key in before))
        assert sorted(server.descendants()) == sorted(pids), "a process was restarted"
        assert soak.counts["cancelled"] and soak.counts["finished"]
        assert not growth(before, after)
