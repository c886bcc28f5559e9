"""A row's numbers do not depend on its company, on how its prompt was cut, nor on its luck.

Bitwise: the texts of the JSON numbers are compared, never their values.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import oracle, safetensors_file
from fathom_server import FathomServer

# Bytes of KV per token of v3_tiny: 4 layers x (64 latent + 16 rope) x 4 bytes.
TOKEN_BYTES = 4 * (64 + 16) * 4


def prompt_of(length, seed):
    """Random token ids of v3_tiny (ids 0 and 1 are its special tokens)."""
    rng = random.Random(seed)
    return [rng.randrange(2, 512) for _ in range(length)]


# Requests of different kinds: each is asked alone, in company, in chunks and after preemption.
PROBES = [
    dict(prompt=prompt_of(1, 1), max_tokens=40, temperature=0),
    dict(prompt=prompt_of(7, 2), max_tokens=40, temperature=0, repetition_penalty=1.3),
    dict(prompt=prompt_of(64, 3), max_tokens=40, temperature=0.8, top_p=0.9, seed=11),
    dict(prompt=prompt_of(150, 4), max_tokens=40, temperature=1.5, top_k=50, min_p=0.01, seed=12,
         presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"7": 3.5}),
    dict(prompt=prompt_of(300, 5), max_tokens=40, temperature=0),
]
COMMON = dict(echo=True, logprobs=5, ignore_eos=True, return_token_ids=True,
              return_tokens_as_token_ids=True)


def ask(client, probe):
    """What must never change about an answer, with numbers as texts."""
    reply = client.post("/v1/completions", dict(COMMON, **probe))
    assert reply.status == 200, reply.body[:500]
    choice = reply.exact()["choices"][0]
    return {name: choice[name] for name in ("token_ids", "logprobs", "finish_reason")}


def ask_together(client, probes):
    """All at once, each on a connection of its own."""
    with ThreadPoolExecutor(len(probes)) as pool:
        return list(pool.map(lambda probe: ask(client, probe), probes))


def ask_one_by_one(client):
    """Each probe alone."""
    return [ask(client, probe) for probe in PROBES]


def fillers(count):
    """Other requests, of every kind and length, to keep the probes company."""
    rng = random.Random(99)
    print("fillers: seed 99")
    for number in range(count):
        yield dict(prompt=prompt_of(rng.choice((1, 3, 17, 90)), number), max_tokens=rng.randrange(
            1, 60), temperature=rng.choice((0, 0.7, 1.3)), top_p=rng.choice((1, 0.5)),
            top_k=rng.choice((0, 1, 40)), seed=number, repetition_penalty=rng.choice((1, 1.2)))


@pytest.fixture(scope="module")
def alone(model):
    """The answers when each probe has a server for itself, two workers, all defaults."""
    with FathomServer(model, tensor_parallel_size=2) as server:
        answers = ask_one_by_one(server.client)
        assert answers == ask_one_by_one(server.client), "the same question, asked again"
    assert len({str(answer) for answer in answers}) == len(PROBES)
    return answers


def test_in_a_batch_of_64_mixed_requests_as_alone(model, alone):
    """The probes among 59 others, all at once."""
    probes = [*PROBES, *fillers(64 - len(PROBES))]
    order = random.Random(5).sample(range(64), 64)
    with FathomServer(model, tensor_parallel_size=2) as server:
        shuffled = ask_together(server.client, [probes[index] for index in order])
        assert server.client.metric("vllm:num_preemptions_total") == 0
    answers = dict(zip(order, shuffled))
    assert [answers[index] for index in range(len(PROBES))] == alone


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_with_the_prompt_cut_into_chunks_as_alone(model, alone, chunk):
    """At most this many tokens a step."""
    flags = ["--max-num-batched-tokens", chunk]
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        assert ask_one_by_one(server.client) == alone
        assert ask_together(server.client, PROBES) == alone


def test_after_a_forced_preemption_as_alone(model, alone):
    """Memory for 360 tokens: the longest probe fits alone, five together do not."""
    flags = ["--kv-cache-memory-bytes", 360 * TOKEN_BYTES, "--max-model-len", 352]
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        before = server.client.metric("vllm:num_preemptions_total")
        preemptions = 0
        # Requests that happen to arrive one after another leave each other room.
        for round_number in range(30):
            if round_number >= 3 and preemptions > 0:
                break
            assert ask_together(server.client, PROBES) == alone
            preemptions = server.client.metric("vllm:num_preemptions_total") - before
        assert preemptions > 0, "the test did not force a preemption"
        server.wait_until_idle()


@pytest.mark.parametrize("block_size", [1, 128])
def test_with_any_block_size_as_with_16(model, alone, block_size):
    """Where KV lies in memory does not matter."""
    flags = ["--block-size", block_size]
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        assert ask_together(server.client, PROBES) == alone


@pytest.mark.parametrize("flags", [
    ("--dtype", "bfloat16"),
    ("--kv-cache-dtype", "bfloat16"),
    ("--quantization", "fp8"),
    ("--quantization", "fp8", "--activation-quantization", "fp8", "--kv-cache-dtype", "fp8"),
    ("--enable-expert-parallel",),
    ("--collectives", "gloo"),
    ("--threads", "2"),
], ids=" ".join)
def test_in_other_kinds_of_server_too(model, flags):
    """Alone, in a batch of 64, and in chunks of 7: other kernels, the same promise."""
    probes = [*PROBES, *fillers(64 - len(PROBES))]
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        answers = ask_one_by_one(server.client)
        assert ask_together(server.client, probes)[:len(PROBES)] == answers
    with FathomServer(model, *flags, "--max-num-batched-tokens", 7,
                      tensor_parallel_size=2) as server:
        assert ask_together(server.client, PROBES) == answers


@pytest.mark.parametrize("flags", [("--threads", "2"), ("--collectives", "gloo")], ids=" ".join)
def test_the_same_numbers_however_the_work_is_shared_out(model, alone, flags):
    """Neither threads nor the way ranks add up change a bit; sums are in rank order."""
    with FathomServer(model, *flags, tensor_parallel_size=2) as server:
        assert ask_one_by_one(server.client) == alone


POISON = 300


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=str)
def poisoned_model(request, tmp_path_factory):
    """v3_tiny whose embedding of one token is not a number."""
    folder = tmp_path_factory.mktemp("poisoned")
    tensors = oracle.make_checkpoint(str(folder), num_nextn_predict_layers=0)
    name = "model.embed_tokens.weight"
    values = tensors[name].to_float64()
    values[POISON] = request.param
    tensors[name] = safetensors_file.Stored.bfloat16(values)
    safetensors_file.save(str(folder / "model.safetensors"), tensors)
    return folder


def test_a_request_gone_wrong_harms_no_other(poisoned_model):
    """NaN or Inf ends that request with an error; its neighbours and its heirs keep their bits."""
    probes = [dict(prompt=[token for token in probe["prompt"] if token != POISON],
                   max_tokens=30, temperature=0) for probe in PROBES]
    bad = dict(COMMON, prompt=[5, POISON, 6], max_tokens=30, temperature=0)
    # Room for the probes and little more: the bad requests' blocks are used again.
    flags = ["--kv-cache-memory-bytes", 800 * TOKEN_BYTES, "--max-model-len", 352]
    with FathomServer(poisoned_model, *flags, tensor_parallel_size=2) as server:
        expected = [ask(server.client, probe) for probe in probes]
        for _ in range(3):
            with ThreadPoolExecutor(16) as pool:
                wrong = [pool.submit(server.client.post, "/v1/completions", bad)
                         for _ in range(8)]
                right = [pool.submit(ask, server.client, probe) for probe in probes]
            assert [future.result() for future in right] == expected
            for future in wrong:
                assert future.result().status == 500
                assert "finite" in future.result().error()["message"]
        server.wait_until_idle()
