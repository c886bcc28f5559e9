"""What a client asks for is what it gets: seeds, stops, penalties, logprobs, usage, streams."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from checkpoints import Reference, log_softmax
from fathom_server import FathomServer

PROMPT = [17, 301, 44, 5, 260, 73]
EOS = 1


@pytest.fixture(scope="module")
def server(model):
    """One server for all of these tests."""
    with FathomServer(model, "--dtype", "float32", tensor_parallel_size=2) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def reference(model):
    """The same model in float64."""
    return Reference(model)


def choices_of(server, **fields):
    """The choices of one completion; ids on, temperature 0 and 20 tokens unless said otherwise."""
    defaults = dict(prompt=PROMPT, max_tokens=20, temperature=0, return_token_ids=True)
    return server.client.complete(**{**defaults, **fields})["choices"]


def ids_of(server, **fields):
    """The token ids of a completion with one choice."""
    (choice,) = choices_of(server, **fields)
    return choice["token_ids"]


# Chance.

def test_a_seed_gives_the_same_tokens_again(server):
    """Alone, again, and eight at a time; another seed gives others."""
    sampled = dict(temperature=1.0, seed=1234, ignore_eos=True)
    first = ids_of(server, **sampled)
    assert len(first) == 20
    with ThreadPoolExecutor(8) as pool:
        assert all(ids == first for ids in pool.map(lambda _: ids_of(server, **sampled), range(8)))
    assert ids_of(server, **{**sampled, "seed": 1235}) != first


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -1])
def test_any_64_bit_seed_is_taken(server, seed):
    """The ends of int64, as vLLM has them."""
    sampled = dict(temperature=1.0, seed=seed, ignore_eos=True)
    assert ids_of(server, **sampled) == ids_of(server, **sampled)


def test_without_a_seed_no_two_answers_are_alike(server):
    """20 tokens at temperature 2 over 512: the chance of a repetition is nil."""
    answers = [tuple(ids_of(server, temperature=2.0, ignore_eos=True)) for _ in range(4)]
    assert len(set(answers)) == 4


def test_choice_i_has_seed_plus_i(server):
    """n=3 with seed 50 is seeds 50, 51, 52."""
    sampled = dict(temperature=1.0, ignore_eos=True)
    choices = choices_of(server, n=3, seed=50, **sampled)
    assert sorted(choice["index"] for choice in choices) == [0, 1, 2]
    for choice in choices:
        assert choice["token_ids"] == ids_of(server, seed=50 + choice["index"], **sampled)


def test_n_times_prompts_are_indexed_prompt_by_prompt(server):
    """2 prompts, n=2: choices 0, 1 are the first prompt's."""
    prompts = [PROMPT, PROMPT[::-1]]
    choices = choices_of(server, prompt=prompts, n=2, seed=3, temperature=1.0, ignore_eos=True)
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        expected = ids_of(server, prompt=prompts[choice["index"] // 2], temperature=1.0,
                          seed=3 + choice["index"] % 2, ignore_eos=True)
        assert choice["token_ids"] == expected


@pytest.mark.parametrize("narrow", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0),
                                    dict(temperature=1e-6)])
def test_the_narrowest_choice_is_the_greedy_one(server, narrow):
    """Filters that leave one token leave the best."""
    greedy = ids_of(server, ignore_eos=True)
    assert ids_of(server, **{"temperature": 1.5, "seed": 8, "ignore_eos": True, **narrow}) == greedy


def test_first_tokens_are_distributed_as_the_model_says(server, reference):
    """1,280 seeds, one token each, against softmax(logits / T): Pearson's chi-squared."""
    temperature = 0.7
    counts = np.zeros(512)
    for seed in range(10):
        choices = choices_of(server, prompt=PROMPT, n=128, max_tokens=1, seed=1000 * seed,
                             temperature=temperature, ignore_eos=True)
        assert len(choices) == 128
        np.add.at(counts, [choice["token_ids"][0] for choice in choices], 1)
    logits = reference.logits(PROMPT)[-1] / temperature
    expected = np.exp(logits - logits.max())
    expected *= counts.sum() / expected.sum()
    common = expected >= 5  # the rule of thumb for chi-squared; the rest is one cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    chi_squared = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    # Mean `freedom`, deviation sqrt(2 freedom): 5 deviations happen once in millions of runs, and
    # the seeds are fixed besides.
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


# Ends.

def test_a_stop_string_cuts_the_text_before_it(server):
    """finish_reason stop, stop_reason the string; the string itself only on demand."""
    (whole,) = choices_of(server, max_tokens=40, ignore_eos=True)
    text = whole["text"]
    stop = text[len(text) // 2:len(text) // 2 + 3]
    (cut,) = choices_of(server, max_tokens=40, ignore_eos=True, stop=["never seen", stop])
    assert cut["text"] == text[:text.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert len(cut["token_ids"]) < 40
    (kept,) = choices_of(server, max_tokens=40, ignore_eos=True, stop=stop,
                         include_stop_str_in_output=True)
    assert kept["text"] == text[:text.index(stop) + len(stop)]


def test_a_stop_token_ends_the_answer(server):
    """finish_reason stop, stop_reason the id, which is the last of the ids."""
    greedy = ids_of(server, ignore_eos=True)
    stop = greedy[7]
    (choice,) = choices_of(server, stop_token_ids=[stop], ignore_eos=True)
    assert choice["token_ids"] == greedy[:greedy.index(stop) + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_end_of_sequence_ends_the_answer_unless_ignored(server):
    """A bias makes it certain; its stop_reason is null."""
    forced = dict(logit_bias={str(EOS): 100})
    (choice,) = choices_of(server, **forced)
    assert choice["token_ids"] == [EOS]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    (choice,) = choices_of(server, ignore_eos=True, **forced)
    assert choice["token_ids"] == [EOS] * 20
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_min_tokens_holds_every_stop_back(server):
    """Neither end-of-sequence nor a stop token before 10 tokens; then it comes at once."""
    forced = dict(logit_bias={str(EOS): 100, "9": 99})
    (choice,) = choices_of(server, min_tokens=10, stop_token_ids=[9], **forced)
    assert len(choice["token_ids"]) == 11 and choice["token_ids"][-1] == EOS
    assert not {EOS, 9} & set(choice["token_ids"][:-1])


def test_max_tokens_0_with_echo_reads_only_the_prompt(server, reference):
    """The prompt's logprobs and no token."""
    answer = server.client.complete(prompt=PROMPT, max_tokens=0, echo=True, logprobs=0,
                                    return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and not choice["token_ids"]
    expected = reference.prompt_logprobs(PROMPT)
    got = choice["logprobs"]["token_logprobs"]
    assert got[0] is None
    np.testing.assert_allclose(got[1:], expected, atol=1e-3)
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)


# Steering.

def test_logit_bias_forces_and_forbids(server):
    """+100 is always chosen, -100 never."""
    assert ids_of(server, logit_bias={"77": 100}) == [77] * 20
    greedy = ids_of(server, ignore_eos=True)
    banned = ids_of(server, logit_bias={str(token): -100 for token in greedy}, ignore_eos=True)
    assert not set(banned) & set(greedy)


@pytest.mark.parametrize("penalties", [dict(repetition_penalty=1.8), dict(presence_penalty=1.9),
                                       dict(frequency_penalty=-1.5),
                                       dict(repetition_penalty=0.7, frequency_penalty=0.6)])
def test_penalties_do_what_their_formulas_say(server, reference, penalties):
    """Greedy tokens under penalties equal a float64 replay; near ties (0.01) end the comparison."""
    prompt = [17, 17, 301, 44, 17, 260]
    ids = ids_of(server, prompt=prompt, ignore_eos=True, max_tokens=16, **penalties)
    compared = 0
    for position, token in enumerate(ids):
        logits = penalised(reference.logits(prompt + ids[:position])[-1],
                           prompt, ids[:position], **penalties)
        best, second = np.sort(logits)[:-3:-1]
        if best - second < 0.01:
            break
        assert token == logits.argmax(), f"token {position}"
        compared += 1
    assert compared >= 8, "choose another prompt"


def penalised(logits, prompt, output, repetition_penalty=1, presence_penalty=0,
              frequency_penalty=0):
    """The formulas of OpenAI (presence, frequency: output only) and CTRL (repetition: both)."""
    logits = logits.copy()
    seen = list(set(prompt + output))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition_penalty,
                            logits[seen] * repetition_penalty)
    counts = np.bincount(output, minlength=len(logits)) if output else np.zeros(len(logits))
    return logits - frequency_penalty * counts - presence_penalty * (counts > 0)


# Reports.

def test_completion_logprobs_have_their_shape_and_values(server, reference):
    """tokens, token_logprobs, top_logprobs, text_offset: parallel; values as the model's."""
    (choice,) = choices_of(server, logprobs=5, max_tokens=6, ignore_eos=True)
    logprobs = choice["logprobs"]
    assert {len(logprobs[name]) for name in
            ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {6}
    rows = log_softmax(reference.logits(PROMPT + choice["token_ids"])[len(PROMPT) - 1:-1])
    for row, token, logprob, top in zip(rows, choice["token_ids"], logprobs["token_logprobs"],
                                        logprobs["top_logprobs"]):
        assert abs(logprob - row[token]) < 1e-3
        assert len(top) >= 4  # a dictionary by text: two ids may be spelled alike
        best = np.sort(row)[::-1][:5]
        assert all(np.abs(best - value).min() < 1e-3 for value in top.values())
    # A token with half a character is named with a replacement character; no other differs.
    names = logprobs["tokens"]
    assert "\ufffd" in "".join(names) or "".join(names) == choice["text"]
    assert logprobs["text_offset"] == [len("".join(names[:i])) for i in range(6)]


def test_sampled_tokens_report_the_models_own_logprobs(server, reference):
    """Taken before temperature, penalties and bias."""
    (choice,) = choices_of(server, logprobs=0, temperature=1.7, seed=4, ignore_eos=True,
                           logit_bias={"30": 4}, presence_penalty=1.5, max_tokens=12)
    expected = reference.prompt_logprobs(PROMPT + choice["token_ids"])[len(PROMPT) - 1:]
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], expected, atol=1e-3)


def test_chat_logprobs_have_their_shape(server):
    """content[{token, logprob, bytes, top_logprobs}]."""
    reply = server.client.post("/v1/chat/completions", dict(
        messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0,
        logprobs=True, top_logprobs=3, ignore_eos=True))
    assert reply.status == 200, reply.body
    (choice,) = reply.json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    for token in content:
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        assert len(token["top_logprobs"]) == 3
        assert abs(token["top_logprobs"][0]["logprob"] - token["logprob"]) < 1e-9
    text = b"".join(bytes(token["bytes"]) for token in content)
    assert text.decode(errors="replace") == choice["message"]["content"]


@pytest.mark.parametrize("fields", [
    dict(temperature=0, ignore_eos=True),
    dict(temperature=1.2, seed=21, ignore_eos=True, logprobs=3),
    dict(temperature=1.2, seed=22, n=3, logprobs=0, ignore_eos=True),
    dict(temperature=0, echo=True, logprobs=2, ignore_eos=True),
    dict(temperature=0, prompt="Once upon a time", ignore_eos=True),
    dict(temperature=1.0, seed=23, stop=["e", "a", "\n"]),
    dict(logit_bias={"1": 100}),
])
def test_a_stream_says_what_the_whole_answer_says(server, fields):
    """Text, ids, logprobs, finish and usage, put together from the events."""
    body = {"prompt": PROMPT, "max_tokens": 30, "return_token_ids": True, **fields}
    whole = server.client.complete(**body)
    with server.client.stream(
            "/v1/completions", dict(body, stream_options={"include_usage": True})) as stream:
        assert stream.status == 200
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        events = list(stream)
    assert stream.done
    assert events[-1]["choices"] == [] and events[-1]["usage"] == counts(whole["usage"])
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"]
                 if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert joined(parts, "token_ids") == choice["token_ids"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [
            choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"]:
            logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert joined(logprobs, name) == choice["logprobs"][name]


def counts(usage):
    """The fields with a value: a usage event leaves the others out."""
    return {name: value for name, value in usage.items() if value is not None}


def joined(parts, name):
    """The concatenation of a list field."""
    return [item for part in parts for item in part[name] or []]


def test_a_chat_stream_says_what_the_whole_answer_says(server):
    """A role event first, then content, then the reason, then the usage."""
    body = dict(messages=[{"role": "user", "content": "Tell me"}], max_tokens=25, temperature=1,
                seed=5, ignore_eos=True)
    whole = server.client.post("/v1/chat/completions", body).json()
    with server.client.stream("/v1/chat/completions",
                              dict(body, stream_options={"include_usage": True})) as stream:
        events = list(stream)
    deltas = [event["choices"][0] for event in events if event["choices"]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(delta["delta"].get("content") or "" for delta in deltas)
    (choice,) = whole["choices"]
    assert text == choice["message"]["content"]
    assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "length"
    assert events[-1]["usage"] == counts(whole["usage"])


def test_usage_counts_each_prompt_once_and_every_choice(server):
    """prompt_tokens per prompt, completion_tokens over all choices."""
    answer = server.client.complete(prompt=[PROMPT, PROMPT[:2]], n=2, max_tokens=7,
                                    temperature=1, ignore_eos=True)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 4 * 7
    assert usage["prompt_tokens"] == len(PROMPT) + 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_text_and_its_token_ids_are_the_same_prompt(server):
    """/tokenize, /detokenize and a text prompt agree; a text prompt gets the BOS it asks for."""
    text = "The quick brown fox, 数字 123 é"
    reply = server.client.post("/tokenize", dict(prompt=text))
    tokens = reply.json()["tokens"]
    assert reply.json()["count"] == len(tokens)
    by_text = server.client.complete(prompt=text, max_tokens=10, temperature=0,
                                     return_token_ids=True, ignore_eos=True)["choices"][0]
    assert by_text["prompt_token_ids"] == tokens
    assert by_text["token_ids"] == ids_of(server, prompt=tokens, max_tokens=10, ignore_eos=True)
    plain = server.client.post("/tokenize", dict(prompt=text, add_special_tokens=False)).json()
    back = server.client.post("/detokenize", dict(tokens=plain["tokens"])).json()
    assert back["prompt"] == text
