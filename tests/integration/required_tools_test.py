"""tool_choice required, or a tool by name: a random model at temperature 1 calls it, in the form of
each checkpoint, and its arguments obey the tool's schema."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

import checkpoints
from fathom_server import FathomServer
from token_bias import logit_bias

MARKERS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
           "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>",
           "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "｜DSML｜",
           "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
           "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_system|>", "<|im_middle|>",
           "<|im_user|>", "<|im_assistant|>", "<|im_end|>", "[BOS]", "[EOS]")

WEATHER = {"type": "object", "required": ["place", "days"],
           "properties": {"place": {"type": "string"},
                          "unit": {"type": "string", "enum": ["celsius", "kelvin"]},
                          "days": {"type": "integer", "minimum": 1, "maximum": 14},
                          "hours": {"type": "array", "items": {"type": "boolean"}}}}
NOW = {"type": "object", "properties": {}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}}
         for name, schema in (("get_weather", WEATHER), ("now", NOW))]
SCHEMAS = {"get_weather": WEATHER, "now": NOW}


@pytest.fixture(scope="module")
def marked_model(tmp_path_factory):
    """A model whose tokenizer has the markers of every form."""
    folder = tmp_path_factory.mktemp("marked")
    checkpoints.oracle.make_checkpoint(str(folder), "v3_tiny", tokenizer=True, vocab_size=640)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for i, text in enumerate(MARKERS):
        tokenizer["added_tokens"].append(
            {"id": 512 + i, "content": text, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True})
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module", params=["deepseek_v3_0324", "deepseek_r1_0528", "deepseek_v31",
                                        "deepseek_v32", "kimi_k2"])
def server(request, marked_model):
    """One for each form."""
    with FathomServer(marked_model, "--dtype", "float32", "--chat-encoding",
                      request.param) as running:
        running.encoding = request.param
        yield running
        running.wait_until_idle()


def biases(model, **more):
    """What ends strings, lists and calls comes more often than a random model would have it."""
    wanted = {'"': 5, "}": 5, "]": 5, "</think>": 9, "<｜end▁of▁sentence｜>": 5,
              "Ġ": -5, "Ċ": -5, "ĉ": -5, "č": -5, **{text: 5 for text in MARKERS if "end" in text}, **more}
    return logit_bias(model, wanted)


# A string of DSML ends with </｜DSML｜parameter>, of the others with a quote.
ENDS_OF_STRINGS = {"deepseek_v32": {"<": 9, "/": 10, "｜DSML｜": 8}}


@pytest.fixture(scope="module")
def bias(server, marked_model):
    """For models that do not think."""
    return biases(marked_model, **ENDS_OF_STRINGS.get(server.encoding, {}))


@pytest.fixture(scope="module")
def thinking_bias(server, marked_model):
    """Its thoughts call nothing: outside of the grammar anything may come but the end."""
    never = {text: -100 for text in MARKERS if text != "｜DSML｜"}
    return biases(marked_model, **{**never, **ENDS_OF_STRINGS.get(server.encoding, {})})


def body(bias, seed, choice, **fields):
    """A chat that must call tools."""
    return {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": choice,
            "max_tokens": 400, "temperature": 1, "seed": seed, "logit_bias": bias, **fields}


def check(choice):
    """That one choice of an answer calls tools and does nothing else, unless it was cut short."""
    calls = choice["message"]["tool_calls"]
    if choice["finish_reason"] == "length":
        return None
    assert calls, choice
    assert not choice["message"]["content"], choice
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]),
                            SCHEMAS[call["function"]["name"]])
    return [call["function"]["name"] for call in calls]


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice, fields", [
    ("required", {}), ("required", {"parallel_tool_calls": False}), (NAMED, {}),
    ("required", {"chat_template_kwargs": {"thinking": True}, "parallel_tool_calls": False}),
])
def test_calls_that_must_come_do(server, bias, thinking_bias, choice, fields):
    """Whatever the model would rather write."""
    bias = thinking_bias if "chat_template_kwargs" in fields else bias
    seed = random.randrange(2**31)
    print("seed", seed)

    def run(i):
        reply = server.client.post("/v1/chat/completions",
                                   body(bias, seed + i, choice, **fields))
        assert reply.status == 200, reply.body
        (answer,) = reply.json()["choices"]
        names = check(answer)
        if names is None:
            return 0
        if choice == NAMED:
            assert names == ["get_weather"] and answer["finish_reason"] == "stop", answer
        else:
            assert answer["finish_reason"] == "tool_calls", answer
        if choice == NAMED or fields.get("parallel_tool_calls") is False:
            assert len(names) == 1
        return len(names)

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(run, range(16)))
    print(server.encoding, counts)
    assert sum(count > 0 for count in counts) >= 4, "hardly any call ended within 400 tokens"


def test_streamed_calls_are_the_same(server, bias):
    """The arguments of a stream, joined."""
    for seed in range(3):
        whole = server.client.post("/v1/chat/completions", body(bias, seed, NAMED)).json()
        name, arguments = "", ""
        with server.client.stream("/v1/chat/completions", body(bias, seed, NAMED)) as stream:
            for event in stream:
                for choice in event["choices"]:
                    for call in choice["delta"].get("tool_calls", []):
                        name += call["function"].get("name") or ""
                        arguments += call["function"].get("arguments") or ""
        (call,) = whole["choices"][0]["message"]["tool_calls"]
        assert (name, arguments) == (call["function"]["name"], call["function"]["arguments"])


def test_a_schema_that_cannot_be_honoured_is_refused(server, bias):
    """With the keyword's name, and the field's."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"not": {}}}}}}]
    reply = server.client.post("/v1/chat/completions",
                               {**body(bias, 1, "required"), "tools": tools})
    assert reply.status == 400
    assert "not is not supported" in reply.error()["message"]
    assert reply.error()["param"] == "tools"
