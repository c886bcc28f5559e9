"""The programs that measure servers and models.

lm-eval's `local-completions` is the package itself, unmodified. `vllm bench serve` comes only with all of
vLLM; here are its requests, field by field, and what its parser assumes
(vllm/benchmarks/lib/endpoint_request_func.py 0.16).
"""

import http.client
import json
import math

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

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


# lm-eval, local-completions: the package's own class, as its command line makes it

@pytest.fixture(scope="module")
def harness(server):
    """What `lm_eval run --model local-completions --model_args base_url=…,num_concurrent=4` uses."""
    return get_model("local-completions").create_from_arg_string(
        f"model={NAME},base_url=http://{HOST}:{server.port}/v1/completions,num_concurrent=4,"
        "max_retries=1,batch_size=2,max_length=512")


def requests_of(kind, *arguments):
    """What a task asks the harness for."""
    return [Instance(request_type=kind, doc={}, arguments=each, idx=index)
            for index, each in enumerate(arguments)]


def test_lm_eval_tokenizes_by_the_server(harness):
    """It finds the server's tokenizer by itself."""
    assert harness.tokenizer_backend == "remote"
    assert harness.tokenizer.decode(harness.tok_encode("test 龜")) == "test 龜"
    assert len(harness.tok_encode(harness.eos_string)) == 1
    ends = harness.tokenizer.bos_token_id, harness.tokenizer.eos_token_id
    assert harness.prefix_token_id == (ends[0] or ends[1])  # id 0 is none to it


def test_lm_eval_scores_continuations(server, harness):
    """What greedy decoding gave is greedy, anything else is not; both as the logprobs say."""
    context = "The sea is"
    prompt = harness.tok_encode(context)
    made = server.client.complete(model=NAME, prompt=prompt, max_tokens=6, temperature=0,
                                  ignore_eos=True, return_token_ids=True, logprobs=0)["choices"][0]
    greedy = made["token_ids"]
    other = [greedy[0], (greedy[1] + 1) % 500, *greedy[2:]]
    results = harness._loglikelihood_tokens([(None, prompt, greedy), (None, prompt, other)])
    assert [is_greedy for _, is_greedy in results] == [True, False]
    assert results[0][0] == pytest.approx(sum(made["logprobs"]["token_logprobs"]), abs=1e-3)
    assert results[1][0] < 0
    texts = [(context, " blue"), (context, " green and deep"), ("", "Once")]
    scores = harness.loglikelihood(requests_of("loglikelihood", *texts))
    assert len(scores) == 3 and all(math.isfinite(score) and score < 0 for score, _ in scores)
    rolled = harness.loglikelihood_rolling(
        requests_of("loglikelihood_rolling", ("The sea is blue. " * 3,)))
    assert rolled[0] < 0


def test_lm_eval_generates_until_a_string(harness):
    """Greedy, the stop string left out."""
    options = {"until": ["\u0000"], "max_gen_toks": 32, "do_sample": False}
    contexts = ["The sea is", "Once upon a time"]
    texts = harness.generate_until(
        requests_of("generate_until", *((context, options) for context in contexts)))
    assert len(texts) == 2 and all(texts)
    stop = texts[0][len(texts[0]) // 2]
    again = harness.generate_until(
        requests_of("generate_until", (contexts[0], options | {"until": [stop]})))
    assert again == [texts[0][:texts[0].index(stop)]]
