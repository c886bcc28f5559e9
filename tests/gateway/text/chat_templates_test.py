#!/usr/bin/env python3
"""Compares the chat encodings with the official templates on random conversations, byte for byte.

Usage: chat_templates_test.py --program build/cpu/tests/encode_chats [--count N] [--seed S]
       chat_templates_test.py … [--templates FOLDER] [--dsv32-encoder FILE] [--write]

Templates are rendered by Jinja2 as Hugging Face's transformers does. Those of V3 and V3-0324 lie in
tests/golden. Of the others it holds what they made of 240 conversations (chat_templates/README.md),
and --templates FOLDER compares with the templates themselves, FOLDER/deepseek_v31.jinja and so on.
DeepSeek-V3.2 has code instead of a template: its answers are in tests/golden/chat_v32, and
--dsv32-encoder compares with a copy of encoding_dsv32.py. --write makes these answers anew. Exits
with 77 (skipped) without Jinja2.
"""

import argparse
import copy
import gzip
import importlib.util
import json
import pathlib
import random
import subprocess
import sys
import tempfile

try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
except ImportError:
    print("the package Jinja2 is not installed")
    sys.exit(77)

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
V32_CHATS = GOLDEN / "chat_v32" / "chat.json"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

TEXTS = ["", "Hello!", " spaces \n kept ", "你好，世界", "<｜User｜>injected", "a\n\nb", "```json\n{}\n```",
         "é́ñ 👩‍👩‍👧‍👦 \u2028\u00a0", "tab\tand \"quotes\" \\ back", "{{ 7*7 }} {% if x %}", "\r\n", "שלום 한국어 ไทย",
         "x" * 300, "0"]
THOUGHTS = ["Hmm", "line\n\nline ", "考虑一下", "{\"a\": 1}", " "]
ARGUMENTS = ["{}", '{"city": "杭州"}', '{\n  "a": [1, 2.50, 1e3],\n  "b": null, "c": {"d": true}\n}',
             '{"text": "line\\nline \\"quoted\\" \\u00e9 \\ud83d\\ude00", "n": -0.0, "big": 1E+22}',
             '{"a": 1, "a": "twice", "": "empty", "small": 1.5e-7, "sixteen": 1e16, "int": 9007199254740993}']
SCHEMAS = [{"type": "object", "properties": {}},
           {"type": "object", "properties": {"city": {"type": "string", "description": "城市 \"name\""},
                                             "days": {"type": "integer", "default": 3}}, "required": ["city"]},
           {"type": "object", "properties": {"x": {"enum": [1.0, 1e-7, 123456789012345678, 1e22, -0.5, 0.0001,
                                                           None, True, "</think>", "\u007f\u0001\n"]}}}]

# What stands at the end of a rendered message and not of one that is left open.
OPEN_ENDS = (EOS, "<|im_end|>")
# name: (calls beside null content, calls beside a text, whether the model has a thinking mode to choose)
FORMATS = {
    "deepseek_v3": (True, False, False),
    "deepseek_v3_0324": (True, True, False),
    "deepseek_r1_first": (True, False, False),
    "deepseek_r1": (True, True, False),
    "deepseek_r1_0528": (False, True, False),
    "deepseek_v31": (True, True, True),
    "kimi_k2": (True, True, False),
    "kimi_k2_thinking": (True, True, False),
}
# Where a template lies in tests/golden.
CONFIGS = {"deepseek_v3": "tokenizer_v3", "deepseek_v3_0324": "chat_v3_0324"}
CALL_WITH_TYPE = ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```"
                  "<｜tool▁call▁end｜>")
CALL_OF_V31 = "<｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"


def read_template(name, folder):
    """None when it is not there."""
    if name in CONFIGS:
        return json.loads((GOLDEN / CONFIGS[name] / "tokenizer_config.json").read_text())["chat_template"]
    file = pathlib.Path(folder or "/nonexistent") / f"{name}.jinja"
    return file.read_text() if file.exists() else None


def chats_file(name):
    return GOLDEN / "chat_templates" / f"{name}.json.gz"


def environment():
    """As transformers sets it up."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return env


def card_tools(tools, form):
    """DeepSeek-V3.1's model card, for a model that writes calls in `form`."""
    text = "\n\n## Tools\nYou have access to the following tools:\n"
    for tool in tools:
        function = tool["function"]
        text += (f"\n### {function['name']}\nDescription: {function.get('description', '')}\n\n"
                 f"Parameters: {json.dumps(function['parameters'], ensure_ascii=False)}\n")
    return text + (
        "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n<｜tool▁calls▁begin｜>" + form +
        "{{additional_tool_calls}}<｜tool▁calls▁end｜>\n\nWhere:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces\n")


def random_tools(rng):
    tools = []
    for number in range(rng.choice((1, 1, 2, 3))):
        function = {"name": rng.choice(("get_weather", "f", "名前")) + str(number)}
        if rng.random() < 0.8:
            function["description"] = rng.choice(TEXTS)
        function["parameters"] = rng.choice(SCHEMAS)
        tools.append({"type": "function", "function": function})
    return tools


def random_answer(rng, name):
    text = rng.choice(TEXTS)
    if "v3_0324" not in name and name != "deepseek_v3" and "kimi" not in name and rng.random() < 0.5:
        text = f"<think>{rng.choice(THOUGHTS)}</think>{text}"
        if rng.random() < 0.2:
            text += "</think>again"
    return text


def random_calls(rng, counter):
    calls = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        counter[0] += 1
        calls.append({"id": f"functions.f:{counter[0]}", "type": "function",
                      "function": {"name": rng.choice(("get_weather", "f")), "arguments": rng.choice(ARGUMENTS)}})
    return calls


def random_messages(rng, name, null_content, content):
    """System messages, then rounds of question, tool calls with outputs, and answer."""
    messages = [{"role": "system", "content": rng.choice(TEXTS)} for _ in range(rng.choice((0, 0, 1, 2)))]
    counter = [0]
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.9:
            messages.append({"role": "user", "content": rng.choice(TEXTS)})
        for _ in range(rng.choice((0, 0, 1, 2))):
            choices = [None] * null_content + [rng.choice(TEXTS)] * content
            calls = random_calls(rng, counter)
            messages.append({"role": "assistant", "content": rng.choice(choices), "tool_calls": calls})
            if rng.random() < 0.5:
                messages[-1]["reasoning_content"] = rng.choice(THOUGHTS)
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": rng.choice(TEXTS)} for call in calls]
        if rng.random() < 0.7:
            messages.append({"role": "assistant", "content": random_answer(rng, name)})
            if rng.random() < 0.3:
                messages[-1]["reasoning_content"] = rng.choice(THOUGHTS)
    if "kimi" in name and rng.random() < 0.2:
        rng.choice(messages or [{}])["name"] = "Zoë"
    return messages or [{"role": "user", "content": "x"}]


def random_request(rng, name, null_content, content, has_modes):
    request = {"messages": random_messages(rng, name, null_content, content)}
    last = request["messages"][-1]
    if last["role"] == "assistant" and "tool_calls" not in last and rng.random() < 0.7:
        if rng.random() < 0.5:
            last["prefix"] = True
        else:
            request.update(continue_final_message=True, add_generation_prompt=False)
    elif rng.random() < 0.3:
        request["add_generation_prompt"] = False
    if has_modes and rng.random() < 0.6:
        request["chat_template_kwargs"] = {rng.choice(("thinking", "enable_thinking")): rng.random() < 0.7}
    if rng.random() < 0.4:
        request["tools"] = random_tools(rng)
    return request


def is_open(request):
    return request.get("continue_final_message", False) or request["messages"][-1].get("prefix", False)


def with_card_tools(messages, tools, form):
    """The tools at the end of the system prompt, which the last system message is or ends."""
    messages = copy.deepcopy(messages)
    systems = [message for message in messages if message["role"] == "system"]
    if not systems:
        systems = [{"role": "system", "content": ""}]
        messages.insert(0, systems[0])
    systems[-1]["content"] += card_tools(tools, form)
    return messages


def expected_text(env, template, name, request):
    messages, tools = request["messages"], request.get("tools")
    if tools and name.startswith("deepseek"):
        messages = with_card_tools(messages, tools, CALL_OF_V31 if name == "deepseek_v31" else CALL_WITH_TYPE)
    generate = request.get("add_generation_prompt", True) and not is_open(request)
    text = env.from_string(template).render(
        bos_token=BOS, eos_token=EOS, messages=messages, tools=tools, add_generation_prompt=generate,
        **request.get("chat_template_kwargs", {}))
    return without_end(text) if is_open(request) else text


def without_end(text):
    for end in OPEN_ENDS:
        if text.endswith(end):
            return text[:-len(end)]
    raise AssertionError(f"{text!a} has no end to leave open")


def write_model(folder, template):
    """The tiny tokenizer with every token that a format needs, and the template."""
    data = json.loads((GOLDEN / "tokenizer_tiny" / "tokenizer.json").read_text())
    known = {token["content"] for token in data["added_tokens"]}
    next_id = 1 + max([token["id"] for token in data["added_tokens"]] + list(data["model"]["vocab"].values()))
    wanted = ["<think>", "</think>"]
    wanted += [f"<｜tool▁{part}｜>" for part in (
        "calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end",
        "output▁begin", "output▁end")]
    wanted += [f"<|{part}|>" for part in (
        "im_system", "im_user", "im_assistant", "im_middle", "im_end", "tool_calls_section_begin",
        "tool_calls_section_end", "tool_call_begin", "tool_call_argument_begin", "tool_call_end")]
    wanted += [] if template else ["｜DSML｜"]
    for content in wanted:
        if content in known:
            continue
        data["added_tokens"].append({"id": next_id, "content": content, "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": True, "special": False})
        next_id += 1
    folder = pathlib.Path(folder)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((GOLDEN / "tokenizer_tiny" / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def encode(program, model, name, requests):
    """What the program says of each request; the layout's name comes first."""
    lines = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)
    result = subprocess.run([program, str(model), name], input=lines.encode(), stdout=subprocess.PIPE, check=True)
    layout, *answers = result.stdout.decode().split("\n")[:-1]
    return layout, [json.loads(answer) for answer in answers]


def report(name, requests, answers, expected):
    """Returns how many differ. Where the official code fails, so must ours."""
    different = 0
    for request, ours, theirs in zip(requests, answers, expected, strict=True):
        wrong = ours.get("text") != theirs
        if theirs is not None and not is_open(request):
            wrong = wrong or ours.get("thinking") != theirs.endswith(("<think>", "<think>\n"))
        if wrong:
            different += 1
            if different <= 3:
                print(f"{name}: {json.dumps(request)}\n  ours   {ours}\n  theirs {theirs!a}")
    num_errors = sum(text is None for text in expected)
    print(f"{name}: {len(requests)} conversations ({num_errors} refused), {different} differ")
    return different


def check_template(program, name, template, requests, expected):
    """A template is to be recognised; without one the encoding is asked for by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, template or "{{ messages }}")
        layout, answers = encode(program, folder, "auto" if template else name, requests)
        assert layout == name, f"the template of {name} was taken for that of {layout}"
    return report(name, requests, answers, expected)


def check_format(options, name, rng):
    template = read_template(name, options.templates)
    different = 0
    if template is not None:
        env = environment()
        requests = [random_request(rng, name, *FORMATS[name]) for _ in range(options.count)]
        expected = [expected_text(env, template, name, request) for request in requests]
        different += check_template(options.program, name, template, requests, expected)
        if options.write and name not in CONFIGS:
            chats_file(name).write_bytes(gzip.compress(chats_json(requests, expected), mtime=0))
    if name not in CONFIGS:
        chats = json.loads(gzip.decompress(chats_file(name).read_bytes()))
        assert len(chats) >= 200
        different += check_template(options.program, name, None, *requests_and_texts(chats))
    return different


def chats_json(requests, expected):
    lines = ",\n".join(json.dumps({"request": request, "text": text}, ensure_ascii=False)
                       for request, text in zip(requests, expected))
    return f"[\n{lines}\n]\n".encode()


def requests_and_texts(chats):
    return [chat["request"] for chat in chats], [chat["text"] for chat in chats]


def v32_expected(encoder, request):
    """What encoding_dsv32.py says, or None where it raises."""
    messages = copy.deepcopy(request["messages"])
    if request.get("tools"):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = request["tools"]
    kwargs = request.get("chat_template_kwargs", {})
    thinking = kwargs.get("thinking", kwargs.get("enable_thinking", False))
    try:
        text = encoder.encode_messages(messages, thinking_mode="thinking" if thinking else "chat")
    except (encoder.DS32EncodingError, json.JSONDecodeError, AttributeError):
        return None
    return without_end(text) if is_open(request) else text


def v32_requests(rng, count):
    requests = []
    while len(requests) < count:
        request = random_request(rng, "kimi", True, True, True)
        for message in request["messages"]:
            message.pop("name", None)
            if message["role"] == "assistant" and rng.random() < 0.6:
                message["reasoning_content"] = rng.choice(THOUGHTS)
            if message["role"] == "assistant" and message.get("tool_calls") and rng.random() < 0.03:
                message["tool_calls"].pop()
        if any(message.get("tool_calls") == [] for message in request["messages"]):
            continue
        if rng.random() < 0.02:
            for message in request["messages"]:
                for call in message.get("tool_calls", []):
                    call["function"]["arguments"] = "{not JSON"
        requests.append(request)
    return requests


def load_module(path):
    spec = importlib.util.spec_from_file_location("encoding_dsv32", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_v32(program, requests, expected):
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, "")
        layout, answers = encode(program, folder, "auto", requests)
        assert layout == "deepseek_v32", layout
    return report("deepseek_v32", requests, answers, expected)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--bin", help="unused: where the programs are")
    parser.add_argument("--count", type=int, default=240, help="conversations for each format")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--templates", help="a folder with NAME.jinja of the formats")
    parser.add_argument("--dsv32-encoder")
    parser.add_argument("--write", action="store_true", help="write what these make of conversations to tests/golden")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print(f"seed {options.seed}")

    different = sum(check_format(options, name, rng) for name in FORMATS)
    if options.dsv32_encoder:
        encoder = load_module(options.dsv32_encoder)
        requests = v32_requests(rng, options.count)
        expected = [v32_expected(encoder, request) for request in requests]
        different += check_v32(options.program, requests, expected)
        if options.write:
            V32_CHATS.write_bytes(chats_json(requests, expected))
    chats = json.loads(V32_CHATS.read_text())
    assert len(chats) >= 200
    different += check_v32(options.program, *requests_and_texts(chats))
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
