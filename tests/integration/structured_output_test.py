"""Structured output: what a random model writes at temperature 1 obeys what was asked for.

    tests/integration/run.py structured_output --long      the official suite and 469 tools' schemas
"""

import collections
import contextlib
import json
import os
import random
import re
import signal
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

import schemas
from fathom_server import FathomServer, start_time
from token_bias import logit_bias

TOOL = {"type": "object", "additionalProperties": False, "required": ["place", "unit"],
        "properties": {"place": {"type": "string", "maxLength": 12},
                       "unit": {"enum": ["celsius", "kelvin"]},
                       "days": {"type": "integer", "minimum": 1, "maximum": 14}}}

# Of many tokens, so that they need many blocks.
LONG = {"type": "array", "items": {"type": "string", "minLength": 30, "maxLength": 60}, "minItems": 3}
TOKEN_BYTES = 4 * (64 + 16) * 4  # of KV

# Each is refused, or compiles and is harmless; by the CVE or issue that it is like.
HOSTILE = [
    dict(guided_regex="(a+)+b"),                                             # CVE-2026-55574
    dict(guided_regex="(" * 30000 + "a" + ")" * 30000),                      # CVE-2026-25048
    dict(guided_regex="((((a{1,9999}){1,9999}){1,9999}){1,9999}){1,9999}"),
    dict(guided_json={"$ref": "#"}),                                         # CVE-2025-57809
    dict(guided_json={"enum": [str(i) for i in range(3000)]}),               # CVE-2025-58446
    dict(guided_json={"type": "array", "minItems": 2000000000}),
    dict(guided_json={"type": "string", "minLength": 100000000}),
    dict(guided_grammar="root ::= root root | root | \"a\" |"),
    dict(guided_grammar="root ::= missing"),
    dict(guided_json={"type": "object", "properties": {"a": {"pattern": "(", "type": "string"}}}),
    dict(guided_json={"type": "stri"}),                                      # CVE-2025-48944
]


@pytest.fixture(scope="module")
def server(model):
    """One server for all of these tests."""
    with FathomServer(model, "--dtype", "float32", tensor_parallel_size=2) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def bias(model):
    """A random model hardly ever ends a string or a list: these tokens come more often."""
    wanted = {'"': 5, "}": 5, "]": 5, "<｜end▁of▁sentence｜>": 5, "Ġ": -5, "Ċ": -5, "ĉ": -5,
              "č": -5, "0": 2}
    return logit_bias(model, wanted)


def ask(server, bias, seed, **fields):
    """One completion at temperature 1: (HTTP status, text or message, finish reason)."""
    reply = server.client.post("/v1/completions", {
        "prompt": [17, 301, 44], "max_tokens": 400, "temperature": 1, "seed": seed,
        "logit_bias": bias, **fields})
    if reply.status != 200:
        return reply.status, reply.error()["message"], None
    (choice,) = reply.json()["choices"]
    return 200, choice["text"], choice["finish_reason"]


def reason_of(refusal):
    """A refusal without its place and its names, so that those alike can be counted."""
    refusal = re.sub(r"^schema at \S*: ", "", refusal)
    return re.sub(r"'\$ref' '.*?'", "a $ref", re.sub(r"\d+", "N", refusal))[:90]


def obeys_pattern(validator, pattern, instance, schema):
    """A schema's patterns are ECMA's: \\w and \\d are of ASCII, and \\s has U+FEFF too."""
    del validator, schema
    if not isinstance(instance, str):
        return
    readings = [(text, flags) for text in (instance, instance.replace("\ufeff", " ")) for flags in (0, re.ASCII)]
    if not any(re.search(pattern, text, flags) for text, flags in readings):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": obeys_pattern})


def test_what_a_random_model_writes_obeys_its_schema(server, bias, long, report):
    """Whatever is served, and ends, is valid; what cannot be honoured is refused, with a reason."""
    wanted = {"suite": schemas.official_suite(), "tools": schemas.tools()[::7]}
    seed = random.randrange(2**32)
    print("seed", seed)
    if not long:
        wanted = {name: random.Random(seed).sample(each, 25) for name, each in wanted.items()}

    def check(entry):
        name, schema = entry
        for attempt in range(5):
            status, text, reason = ask(server, bias, seed + attempt, guided_json=schema)
            if status == 400:
                assert text, name
                return "refused: " + reason_of(text)
            assert status == 200, (status, text, name)
            if reason == "stop":
                try:
                    Validator(schema).validate(json.loads(text))
                except (ValueError, jsonschema.ValidationError) as error:
                    raise AssertionError(f"{name}: {schema} gave {text}") from error
                return "valid"
        return "unfinished"

    num_valid = num_unfinished = 0
    for name, entries in wanted.items():
        with ThreadPoolExecutor(16) as pool:
            counts = collections.Counter(pool.map(check, entries))
        num_refused = len(entries) - counts["valid"] - counts["unfinished"]
        report(f"{name}: of {len(entries)} schemas {counts['valid']} gave valid JSON, {num_refused} "
               f"were refused, {counts['unfinished']} gave none within 5 x 400 tokens")
        for kind, count in counts.most_common() if long else []:
            if kind.startswith("refused"):
                report(f"  {count} {kind}")
        num_valid += counts["valid"]
        num_unfinished += counts["unfinished"]
    assert num_valid > num_unfinished * 10
    if long:
        assert num_valid >= 500


@pytest.mark.parametrize("fields, pattern", [
    (dict(guided_regex="[a-c]{2,5}x?"), "[a-c]{2,5}x?"),
    (dict(guided_choice=["yes", "no", "may\"be"]), "yes|no|may\"be"),
    (dict(guided_grammar="root ::= \"<\" [0-9]{1,9} \">\""), "<[0-9]{1,9}>"),
    (dict(structured_outputs={"regex": "(ab|cd)"}), "ab|cd"),
])
def test_other_kinds_of_grammars(server, bias, fields, pattern):
    """Regular expressions, choices and rules."""
    for seed in range(5):
        status, text, reason = ask(server, bias, seed, **fields)
        assert (status, reason) == (200, "stop"), text
        assert re.fullmatch(pattern, text), text


def test_response_format_in_a_chat(server, bias):
    """json_schema and json_object, as OpenAI's clients write them."""
    for response_format in (
            {"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": TOOL}},
            {"type": "json_object"}):
        reply = server.client.post("/v1/chat/completions", {
            "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "seed": 4,
            "logit_bias": bias, "response_format": response_format})
        assert reply.status == 200, reply.body
        (choice,) = reply.json()["choices"]
        assert choice["finish_reason"] == "stop"
        value = json.loads(choice["message"]["content"])
        assert isinstance(value, dict)
        if response_format["type"] == "json_schema":
            jsonschema.validate(value, TOOL)


@pytest.mark.parametrize("fields, param", [
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": {"not": {}}}}),
     "response_format"),
    (dict(structured_outputs={"regex": "(a"}), "structured_outputs.regex"),
    (dict(guided_grammar="root ::= missing"), "guided_grammar"),
])
def test_a_refusal_names_the_field(server, fields, param):
    """Whatever compiles it has found, streamed or not."""
    for stream in (False, True):
        reply = server.client.post("/v1/completions", {"prompt": [17], "stream": stream, **fields})
        assert reply.status == 400, reply.body
        assert reply.error()["param"] == param


def test_the_same_seed_gives_the_same_output(server, bias):
    """Alone and among others, streamed or not."""
    def run(seed):
        return ask(server, bias, seed, guided_json=TOOL)

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(8))) == alone
    body = {"prompt": [17, 301, 44], "max_tokens": 400, "temperature": 1, "seed": 3,
            "logit_bias": bias, "guided_json": TOOL}
    with server.client.stream("/v1/completions", body) as stream:
        text = "".join(choice["text"] for event in stream for choice in event["choices"])
    assert text == alone[3][1]


def test_sequences_that_were_preempted_still_obey(model, bias):
    """Memory for 360 tokens: sequences come and go, and the same text comes of it."""
    def run(server, seed):
        return ask(server, bias, seed, guided_json=LONG, max_tokens=200)

    with FathomServer(model, "--dtype", "float32") as server:
        alone = [run(server, seed) for seed in range(6)]
    flags = ["--kv-cache-memory-bytes", 360 * TOKEN_BYTES, "--max-model-len", 352]
    with FathomServer(model, "--dtype", "float32", *flags) as server:
        for _ in range(30):
            with ThreadPoolExecutor(6) as pool:
                assert list(pool.map(lambda seed: run(server, seed), range(6))) == alone
            if server.client.metric("vllm:num_preemptions_total") > 0:
                break
        assert server.client.metric("vllm:num_preemptions_total") > 0, "nothing was preempted"


class Pace:
    """A stream without a grammar, and the times between its tokens."""

    def __init__(self, server):
        self.gaps, self.stop = [], threading.Event()
        self.thread = threading.Thread(target=self.run, args=(server,))
        self.thread.start()

    def run(self, server):
        while not self.stop.is_set():
            body = dict(prompt=[5, 9, 2], max_tokens=200, temperature=1, ignore_eos=True)
            last = None
            with server.client.stream("/v1/completions", body) as stream:
                for event in stream:
                    assert "error" not in event, event
                    now = time.monotonic()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now

    def take(self):
        gaps, self.gaps = self.gaps, []
        return gaps


def test_hostile_grammars_are_their_own_requests_matter(server, bias, report):
    """Refused with a reason or served; other streams go on, and so does the server."""
    pace = Pace(server)
    try:
        time.sleep(2)
        before = pace.take()
        slowest = 0
        for fields in HOSTILE:
            began = time.monotonic()
            status, text, _ = ask(server, bias, 1, max_tokens=20, **fields)
            if status != 200:
                slowest = max(slowest, time.monotonic() - began)
            assert status in (200, 400, 500, 503), (fields, text)  # 503: this host is busy
            assert text or status == 200
        during = pace.take()
    finally:
        pace.stop.set()
        pace.thread.join()
    report(f"slowest refusal {slowest * 1000:.0f} ms; between tokens of another stream "
           f"{statistics.median(before) * 1000:.1f} ms before (p50), "
           f"{statistics.median(during) * 1000:.1f} ms meanwhile, longest "
           f"{max(before) * 1000:.0f} and {max(during) * 1000:.0f} ms")
    assert ask(server, bias, 1, guided_json=TOOL)[0] == 200
    assert not re.search("worker .* was lost", server.log())


def test_what_compiles_grammars_may_be_killed(server, bias):
    """Under load: no request but those that used it notices, and it is there again."""
    expected = ask(server, bias, 1, guided_regex="[ab]{5}")
    for _ in range(3):
        pids = server.pids("fathom-grammar")
        assert pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(pid, signal.SIGKILL)
        # One that is still dying may be given the request, which then ends with it.
        while any(start_time(pid) for pid in pids):
            time.sleep(0.001)
        assert ask(server, bias, 1, guided_regex="[ab]{5}") == expected
        assert ask(server, bias, 1)[0] == 200
    server.wait_until_idle()
