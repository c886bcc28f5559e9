"""What `vllm bench serve` and lm-eval's `local-completions` ask, and what they make of the answers.

Both are large packages; these are their requests, field by field, and the assumptions that their
parsers make (vllm/benchmarks/lib/endpoint_request_func.py 0.16, lm_eval/models/openai_completions.py
0.4): a server that satisfies them satisfies the programs.
"""

import http.client
import json
import math

import pytest

from fathom_server import FathomServer
from http_client import HOST

NAME = "fathom-test-model"


@pytest.fixture(scope="module")
def server(model):
    """One server."""
    with FathomServer(model, "--served-model-name", NAME) as running:
        yield running
        running.wait_until_idle()


# vllm bench serve

def benchmark(server, path, payload):
    """One measured request: (texts of the choice events, usage), as the benchmark reads them."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    connection.request("POST", path, json.dumps(payload),
                       {"Content-Type": "application/json", "x-request-id": "benchmark-0"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    texts, usage, buffer, done = [], None, "", False
    while piece := response.read1():
        piece = piece.strip()
        if not piece:
            continue
        buffer += piece.decode()  # each piece for itself: no character may be cut in two
        messages = [part.strip() for part in buffer.split("\n\n")]
        buffer = ""
        for message in filter(None, messages):
            if message.startswith(":"):
                continue
            data = message.removeprefix("data: ")
            if data == "[DONE]":
                done = True
                continue
            data = json.loads(data)  # events arrive whole
            if choices := data.get("choices"):
                texts.append(choices[0]["text"] if "text" in choices[0]
                             else choices[0]["delta"].get("content"))
            elif found := data.get("usage"):
                usage = found
    connection.close()
    assert done
    return texts, usage


def test_vllm_bench_measures_completions(server):
    """Backend `openai`, dataset `random`: a text prompt, the end of sequence ignored."""
    texts, usage = benchmark(server, "/v1/completions", {
        "model": NAME, "prompt": "żółw 龜 🐢 \ufffd code();" * 3, "repetition_penalty": 1.0,
        "max_tokens": 24, "logprobs": None, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True})
    assert usage["completion_tokens"] == 24
    assert usage["prompt_tokens"] > 3
    # Between two events there are one or more tokens: the gaps are those of the server's steps.
    assert 1 <= len(texts) <= 24 and all(isinstance(text, str) for text in texts)


def test_vllm_bench_measures_chats(server):
    """Backend `openai-chat`: the first event is the role's, and counts as the first token."""
    texts, usage = benchmark(server, "/v1/chat/completions", {
        "model": NAME, "messages": [{"role": "user",
                                     "content": [{"type": "text", "text": "Hello there"}]}],
        "max_completion_tokens": 12, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True, "temperature": 0.0})
    assert usage["completion_tokens"] == 12
    assert texts[0] == "" and "".join(text or "" for text in texts)


def test_vllm_bench_finds_the_model_and_the_metrics_it_wants(server):
    """It asks for the first model when none is named, and reads counters of the scheduler."""
    assert server.client.get("/v1/models").json()["data"][0]["id"] == NAME
    assert server.client.get("/health").status == 200
    assert server.client.metric("vllm:num_requests_running") == 0


# lm-eval, local-completions

def loglikelihoods(answer, context_lengths):
    """(sum, is greedy) of each continuation, as the harness takes them from an answer."""
    results = []
    for choice, context_length in zip(sorted(answer["choices"], key=lambda c: c["index"]),
                                      context_lengths):
        logprobs = choice["logprobs"]["token_logprobs"][context_length:-1]
        top = choice["logprobs"]["top_logprobs"][context_length:-1]
        greedy = all(mine == max(best.values()) for mine, best in zip(logprobs, top))
        results.append((sum(logprobs), greedy))
    return results


def test_lm_eval_tokenizes_by_the_server(server):
    """Its remote tokenizer: special tokens by name, there and back."""
    client = server.client
    info = client.get("/tokenizer_info").json()
    for name in ("bos_token", "eos_token"):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert client.post("/tokenize", body).json()["count"] == 1
    tokens = client.post("/tokenize", {"prompt": "test 龜", "add_special_tokens": False}).json()
    assert client.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"] == "test 龜"


def test_lm_eval_scores_continuations(server):
    """Token ids in batches, echoed with logprobs, one token generated and ignored."""
    def ids(text):
        return server.client.post("/tokenize", {"prompt": text}).json()["tokens"]

    contexts = [ids("The sea is"), ids("Once upon a")]
    answer = server.client.complete(model=NAME, prompt=contexts, max_tokens=3, temperature=0,
                                    seed=1234)
    best = [ids_of(server, choice["text"]) for choice in answer["choices"]]
    prompts = [context + continuation for context, continuation in zip(contexts, best)]
    scored = server.client.complete(model=NAME, prompt=prompts, temperature=0, max_tokens=1,
                                    logprobs=1, seed=1234, echo=True)
    results = loglikelihoods(scored, [len(context) for context in contexts])
    assert len(results) == 2
    for (score, _), choice, prompt in zip(results, scored["choices"], prompts):
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert math.isfinite(score) and score < 0
    # A continuation that greedy decoding gave, token by token, is recognised as greedy.
    generated = server.client.complete(model=NAME, prompt=contexts[0], max_tokens=4, temperature=0,
                                       ignore_eos=True, return_token_ids=True)
    continuation = generated["choices"][0]["token_ids"]
    scored = server.client.complete(model=NAME, prompt=[contexts[0] + continuation], temperature=0,
                                    max_tokens=1, logprobs=1, seed=1234, echo=True)
    assert loglikelihoods(scored, [len(contexts[0])])[0][1]


def ids_of(server, text):
    """Without BOS; at least one."""
    body = {"prompt": text or "a", "add_special_tokens": False}
    return server.client.post("/tokenize", body).json()["tokens"] or [5]


def test_lm_eval_generates_until_a_string(server):
    """As its `generate_until`: greedy, with stop strings."""
    fields = dict(model=NAME, prompt=["The sea is"], max_tokens=32, temperature=0, seed=1234)
    whole = server.client.complete(**fields)["choices"][0]["text"]
    assert whole
    stop = whole[len(whole) // 2]
    answer = server.client.complete(**fields, stop=[stop])
    assert answer["choices"][0]["text"] == whole[:whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
