"""The openai and anthropic packages against fathom-gateway: tool calls and thoughts, whole and streamed.

A model cannot be made to call tools, so a coordinator of this test's own, behind the real protocol,
generates what it is told."""
import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
from concurrent import futures

try:
    import anthropic
    import grpc
    import openai
except ImportError:
    print("the packages anthropic, grpcio and openai are not installed")
    sys.exit(77)

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = None
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
ARGUMENTS = ['{"city": "Hangzhou",\n  "days": [1, 2]}', "{}"]

V31_OUTPUT = ("I look.</think>One moment.<｜tool▁calls▁begin｜>" + "".join(
    f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>" for arguments in ARGUMENTS)
    + "<｜tool▁calls▁end｜>")
V32_OUTPUT = ('I look.</think>One moment.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
              '<｜DSML｜parameter name="city" string="true">Hangzhou</｜DSML｜parameter>\n'
              '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
              '</｜DSML｜invoke>\n<｜DSML｜invoke name="get_weather">\n</｜DSML｜invoke>\n'
              '</｜DSML｜function_calls>')


def write_model(folder):
    """The tiny tokenizer with DeepSeek's tokens for tools; returns a function from text to ids."""
    import tokenizers

    source = ROOT / "tests" / "golden" / "tokenizer_tiny"
    data = json.loads((source / "tokenizer.json").read_text())
    parts = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end",
             "output▁begin", "output▁end")
    for number, content in enumerate([f"<｜tool▁{part}｜>" for part in parts] + ["｜DSML｜"]):
        data["added_tokens"].append({"id": 512 + number, "content": content, "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": True, "special": False})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


class Coordinator:
    """Generates self.ids, several tokens at a time, whatever it is asked."""

    def __init__(self, address):
        self.ids = []
        self.messages = grpc.protos("proto/generate.proto")
        messages = self.messages
        methods = {
            "GetModelInfo": grpc.unary_unary_rpc_method_handler(
                lambda request, context: messages.ModelInfo(vocab_size=522, max_model_len=4096, eos_token_ids=[1]),
                messages.GetModelInfoRequest.FromString, messages.ModelInfo.SerializeToString),
            "GenerateMany": grpc.stream_stream_rpc_method_handler(
                self.generate, messages.GenerateCommand.FromString, messages.GenerateEvents.SerializeToString),
        }
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fathom.v1.Generate", methods),))
        self.server.add_insecure_port(address)
        self.server.start()

    def generate(self, commands, _context):
        for command in commands:
            if command.WhichOneof("command") != "start":
                continue
            ids = self.ids + [1]
            for begin in range(0, len(ids), 3):
                response = self.messages.GenerateResponse(token_ids=ids[begin:begin + 3])
                if begin + 3 >= len(ids):
                    response.finish_reason = self.messages.FINISH_REASON_STOP
                yield self.messages.GenerateEvents(
                    others=[self.messages.StreamEvent(stream=command.stream, response=response)])


class ToolClientsTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="fathom-")
        self.addCleanup(self.folder.cleanup)
        folder = pathlib.Path(self.folder.name)
        self.ids_of = write_model(folder)
        address = f"unix:{folder}/socket"
        self.coordinator = Coordinator(address)
        self.addCleanup(lambda: self.coordinator.server.stop(None))
        self.address = address

    def start(self, encoding):
        """The address of a gateway."""
        process = subprocess.Popen(
            [PROGRAM, f"--coordinator={self.address}", f"--model={self.folder.name}", "--host=127.0.0.1", "--port=0",
             f"--chat-encoding={encoding}", "--served-model-name=tiny"], stderr=subprocess.PIPE, text=True)

        def stop():
            process.kill()
            process.communicate()

        self.addCleanup(stop)
        for line in process.stderr:
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                return found[1]
        self.fail("fathom-gateway did not start")

    def check(self, encoding, output, arguments):
        """Both ways give the same thoughts, text and calls."""
        address = self.start(encoding)
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=30)
        self.check_chat(client, output, arguments)
        self.check_responses(client, output, arguments)
        self.check_messages(anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=30),
                            output, arguments)

    def check_chat(self, client, output, arguments):
        self.coordinator.ids = self.ids_of(output)
        fields = dict(model="tiny", messages=[{"role": "user", "content": "Weather?"}], tools=TOOLS,
                      extra_body={"chat_template_kwargs": {"thinking": True}})
        choice = client.chat.completions.create(**fields).choices[0]
        message = choice.message
        self.assertEqual(choice.finish_reason, "tool_calls")
        self.assertEqual(message.content, "One moment.")
        self.assertEqual(message.reasoning_content, "I look.")
        self.assertEqual([(call.type, call.function.name) for call in message.tool_calls],
                         [("function", "get_weather")] * 2)
        self.assertEqual([call.function.arguments for call in message.tool_calls], arguments)
        self.assertEqual(len({call.id for call in message.tool_calls}), 2)

        text, thoughts, calls, reasons = "", "", {}, []
        for part in client.chat.completions.create(stream=True, **fields):
            delta = part.choices[0].delta
            text += delta.content or ""
            thoughts += getattr(delta, "reasoning_content", None) or ""
            for piece in delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
                call["arguments"] += piece.function.arguments
            reasons.append(part.choices[0].finish_reason)
        self.assertEqual((text, thoughts), (message.content, message.reasoning_content))
        self.assertEqual([call["arguments"] for call in calls.values()], arguments)
        self.assertEqual([call["name"] for call in calls.values()], ["get_weather"] * 2)
        self.assertTrue(all(call["id"] for call in calls.values()))
        self.assertEqual(reasons[-1], "tool_calls")
        self.assertEqual(set(reasons[:-1]), {None})

        # The client sends what it got, with the results, and the model is told.
        messages = fields["messages"] + [message.model_dump()]
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
        self.coordinator.ids = self.ids_of("</think>It is sunny.")
        answer = client.chat.completions.create(**(fields | {"messages": messages})).choices[0]
        self.assertEqual((answer.message.content, answer.finish_reason), ("It is sunny.", "stop"))

    def check_responses(self, client, output, arguments):
        self.coordinator.ids = self.ids_of(output)
        function = TOOLS[0]["function"]
        fields = dict(model="tiny", input=[{"role": "user", "content": "Weather?"}], reasoning={"effort": "medium"},
                      tools=[{"type": "function", **function, "strict": None}])
        whole = client.responses.create(**fields)
        self.assertEqual((whole.status, whole.output_text), ("completed", "One moment."))
        self.assertEqual([item.type for item in whole.output],
                         ["reasoning", "message", "function_call", "function_call"])
        self.assertEqual(whole.output[0].content[0].text, "I look.")
        calls = whole.output[2:]
        self.assertEqual([(call.name, call.arguments) for call in calls],
                         [("get_weather", text) for text in arguments])
        self.assertEqual(len({call.call_id for call in calls}), 2)
        self.assertGreater(whole.usage.output_tokens_details.reasoning_tokens, 0)

        def shape(response):
            """All but what differs by chance."""
            return [item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in response.output]

        events = list(client.responses.create(stream=True, **fields))
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        self.assertEqual(shape(events[-1].response), shape(whole))
        done = [event.item for event in events if event.type == "response.output_item.done"]
        self.assertEqual([item.model_dump() for item in done],
                         [item.model_dump() for item in events[-1].response.output])
        for kind, texts in (("reasoning_text", ["I look."]), ("output_text", ["One moment."]),
                            ("function_call_arguments", arguments)):
            joined = {}
            for event in events:
                if event.type == f"response.{kind}.delta":
                    joined[event.output_index] = joined.get(event.output_index, "") + event.delta
            self.assertEqual(list(joined.values()), texts)
        with client.responses.stream(**fields) as stream:
            final = stream.get_final_response()
        self.assertEqual([item.type for item in final.output], [item.type for item in whole.output])
        self.assertEqual([call.arguments for call in final.output[2:]], arguments)

        # The client sends what it got, with the results, and the model is told.
        self.coordinator.ids = self.ids_of("</think>It is sunny.")
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"} for call in calls]
        answer = client.responses.create(**(fields | {"input": fields["input"] + whole.output + results}))
        self.assertEqual(answer.output_text, "It is sunny.")

    def check_messages(self, client, output, arguments):
        self.coordinator.ids = self.ids_of(output)
        function = TOOLS[0]["function"]
        fields = dict(model="tiny", max_tokens=2048, messages=[{"role": "user", "content": "Weather?"}],
                      thinking={"type": "enabled", "budget_tokens": 1024},
                      tools=[{"name": function["name"], "description": function["description"],
                              "input_schema": function["parameters"]}])
        whole = client.messages.create(**fields)
        self.assertEqual([block.type for block in whole.content], ["thinking", "text", "tool_use", "tool_use"])
        self.assertEqual((whole.content[0].thinking, whole.content[1].text), ("I look.", "One moment."))
        calls = whole.content[2:]
        self.assertEqual([(call.name, call.input) for call in calls],
                         [("get_weather", json.loads(text)) for text in arguments])
        self.assertEqual(len({call.id for call in calls}), 2)
        self.assertEqual(whole.stop_reason, "tool_use")
        with client.messages.stream(**fields) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        self.assertEqual(kinds.count("content_block_start"), 4)
        self.assertEqual([block.model_dump(exclude={"id"}) for block in final.content],
                         [block.model_dump(exclude={"id"}) for block in whole.content])
        self.assertEqual((final.stop_reason, final.usage.output_tokens), ("tool_use", whole.usage.output_tokens))

        self.coordinator.ids = self.ids_of("</think>It is sunny.")
        messages = fields["messages"] + [
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
                                         for call in calls]}]
        answer = client.messages.create(**(fields | {"messages": messages}))
        self.assertEqual([(block.type, block.text) for block in answer.content], [("text", "It is sunny.")])
        self.assertEqual(answer.stop_reason, "end_turn")

    def test_deepseek_v31(self):
        self.check("deepseek_v31", V31_OUTPUT, ARGUMENTS)

    def test_deepseek_v32(self):
        self.check("deepseek_v32", V32_OUTPUT, ['{"city": "Hangzhou", "days": [1, 2]}', "{}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True)
    options, arguments = parser.parse_known_args()
    PROGRAM = str(pathlib.Path(options.bin) / "fathom-gateway")
    sys.path.insert(0, str(ROOT))
    unittest.main(argv=[sys.argv[0], *arguments])
