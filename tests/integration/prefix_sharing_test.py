"""Requests that begin alike share KV: less is computed, and no number changes.

Bitwise: the texts of the JSON numbers are compared, never their values.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

import checkpoints
from fathom_server import FathomServer
from invariance_test import TOKEN_BYTES, prompt_of

SYSTEM_PROMPTS = [prompt_of(160, 1000 + number) for number in range(4)]
# 16 questions: four after each system prompt; greedy and drawn, with penalties too.
QUESTIONS = [dict(prompt=SYSTEM_PROMPTS[number % 4] + prompt_of(5 + number, number), max_tokens=24,
                  temperature=(0, 0.9)[number % 2], seed=number,
                  repetition_penalty=(1, 1.2)[number // 8]) for number in range(16)]
COMMON = dict(logprobs=5, ignore_eos=True, return_token_ids=True, return_tokens_as_token_ids=True)


def ask(client, question):
    """What must not change, and how many tokens were found."""
    reply = client.post("/v1/completions", dict(COMMON, **question))
    assert reply.status == 200, reply.body[:500]
    answer = reply.exact()
    choice = answer["choices"][0]
    numbers = {name: choice[name] for name in ("token_ids", "logprobs", "finish_reason")}
    return numbers, int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def ask_all(client):
    """One after the other, then all at once."""
    alone = [ask(client, question) for question in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = list(pool.map(lambda question: ask(client, question), QUESTIONS))
    return alone, together


@pytest.fixture(scope="module")
def apart(model):
    """The answers of a server that shares nothing."""
    with FathomServer(model, "--no-enable-prefix-caching", tensor_parallel_size=2) as server:
        alone, together = ask_all(server.client)
        assert server.client.metric("vllm:prefix_cache_queries_total") == 0
    assert alone == together
    assert {found for _, found in alone} == {0}
    return [numbers for numbers, _ in alone]


@pytest.mark.parametrize("block_size", [1, 16, 32, 64, 128])
def test_the_same_numbers_with_sharing_as_without(model, apart, block_size):
    """Whatever the block size; and as much is found as there is."""
    with FathomServer(model, "--block-size", block_size, tensor_parallel_size=2) as server:
        alone, together = ask_all(server.client)
        queries = server.client.metric("vllm:prefix_cache_queries_total")
        hits = server.client.metric("vllm:prefix_cache_hits_total")
    assert [numbers for numbers, _ in alone] == apart
    assert [numbers for numbers, _ in together] == apart
    for number, (_, found) in enumerate(alone):
        length = 160 if number >= 4 else 0  # the first four find no system prompt
        assert found == length // block_size * block_size
    for question, (_, found) in zip(QUESTIONS, together):
        assert found == (len(question["prompt"]) - 1) // block_size * block_size
    assert hits == sum(found for _, found in alone + together)
    assert queries == 2 * sum(len(question["prompt"]) for question in QUESTIONS)


def test_the_same_numbers_in_little_memory_and_small_chunks(model, apart):
    """Room for a few at a time: blocks are evicted and sequences preempted all the while."""
    flags = ["--kv-cache-memory-bytes", 480 * TOKEN_BYTES, "--max-model-len", 256,
             "--max-num-batched-tokens", 50]
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        for _ in range(2):
            alone, together = ask_all(server.client)
            assert [numbers for numbers, _ in alone] == apart
            assert [numbers for numbers, _ in together] == apart
        assert server.client.metric("vllm:prefix_cache_hits_total") > 0
        server.wait_until_idle()


def test_choices_of_one_prompt_compute_it_once(model):
    """n choices arrive together; all but the first find what is computed in the same step."""
    question = dict(prompt=prompt_of(97, 7), n=8, max_tokens=4, temperature=1, seed=3)
    with FathomServer(model) as server:
        reply = server.client.post("/v1/completions", dict(COMMON, **question))
        assert reply.status == 200
        assert server.client.metric("vllm:prefix_cache_hits_total") == 7 * 96


def test_prompt_logprobs_and_salts_share_less(model):
    """Who wants prompt logprobs computes all of the prompt; salts keep strangers apart."""
    question = dict(prompt=prompt_of(100, 8), max_tokens=4, temperature=0)
    with FathomServer(model) as server:
        first, _ = ask(server.client, question)
        echo = dict(question, echo=True)
        assert [ask(server.client, echo)[1] for _ in range(2)] == [0, 0]
        salted = dict(question, cache_salt="mine")
        assert [ask(server.client, salted) for _ in range(2)] == [(first, 0), (first, 96)]
        assert ask(server.client, question) == (first, 96)


def answers_and_computed_tokens(*flags):
    """64 clients at once with 8 system prompts of 1,500 tokens: tokens, prompt tokens computed."""
    rng = random.Random(7)
    system_prompts = [[rng.randrange(2, 129000) for _ in range(1500)] for _ in range(8)]
    bodies = [dict(prompt=system_prompts[number % 8] + [rng.randrange(2, 129000) for _ in range(50)],
                   max_tokens=20, seed=number, return_token_ids=True) for number in range(64)]
    with FathomServer(checkpoints.ROOT / "bench/models/DeepSeek-V3", "--device", "sim",
                      "--sim-profile", checkpoints.ROOT / "bench/profiles/constant-2ms.json",
                      *flags) as server:
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: server.client.complete(**body), bodies))
        computed = server.client.metric("vllm:iteration_tokens_total_sum")
    tokens = [answer["choices"][0]["token_ids"] for answer in answers]
    assert [len(ids) for ids in tokens] == [20] * 64
    return tokens, computed - 64 * 19  # the last token of an answer is never computed


def test_what_64_clients_of_8_system_prompts_compute_falls_by_the_ideal_factor():
    """Every system prompt and every question once, within 5 %; the same tokens."""
    tokens_apart, computed_apart = answers_and_computed_tokens("--no-enable-prefix-caching")
    tokens, computed = answers_and_computed_tokens()
    assert tokens == tokens_apart
    assert computed_apart == 64 * 1550
    ideal = 8 * 1500 + 64 * 50
    assert ideal <= computed <= 1.05 * ideal, (computed, ideal)
