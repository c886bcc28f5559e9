"""The clients people have: the openai and anthropic packages, whole answers and streams."""

import asyncio

import anthropic
import openai
import pytest

from fathom_server import FathomServer

NAME = "fathom-test-model"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def server(model):
    """One server with two names of its own."""
    flags = ["--served-model-name", NAME, "alias"]
    with FathomServer(model, *flags, tensor_parallel_size=2) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server):
    """The openai client, without retries: a failure must show."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none",
                         max_retries=0, timeout=30)


def test_models_are_listed_and_found(client):
    """Every served name, with its length limit."""
    models = client.models.list().data
    assert [model.id for model in models] == [NAME, "alias"]
    assert models[0].object == "model" and models[0].max_model_len == 5120
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_completions_work_whole_and_streamed(client):
    """The same text either way."""
    fields = dict(model=NAME, prompt="Once upon a time", max_tokens=24, temperature=0)
    whole = client.completions.create(**fields)
    assert whole.object == "text_completion" and whole.choices[0].text
    assert whole.usage.completion_tokens <= 24
    parts = list(client.completions.create(stream=True, **fields))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_works_whole_and_streamed(client):
    """The same text either way; usage on demand."""
    fields = dict(model=NAME, messages=MESSAGES, max_tokens=24, temperature=0.9, seed=6)
    whole = client.chat.completions.create(**fields)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.content
    parts = list(client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **fields))
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == message.content
    assert parts[-1].usage == whole.usage


def test_extra_body_fields_reach_the_sampler(client):
    """What vLLM's users pass with extra_body."""
    answer = client.completions.create(
        model=NAME, prompt=[5, 6, 7], max_tokens=9, temperature=1.0,
        extra_body=dict(top_k=1, ignore_eos=True, min_tokens=9, return_token_ids=True))
    assert len(answer.choices[0].token_ids) == 9


def test_errors_arrive_as_the_clients_own_exceptions(client):
    """400 and 404, with the message."""
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        client.completions.create(model="other", prompt="x")


def test_responses_work_whole_and_streamed(client):
    """The same text either way, from `instructions` and `input` as from a chat's messages."""
    fields = dict(model=NAME, instructions="Be brief.", input="Hi there", max_output_tokens=24,
                  temperature=0.0)
    whole = client.responses.create(**fields)
    assert whole.status in ("completed", "incomplete") and whole.output_text
    assert whole.usage.output_tokens <= 24
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=24,
                                          temperature=0.0)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    events = list(client.responses.create(stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events
                   if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert events[-1].type == f"response.{whole.status}" and last.usage == whole.usage
    # This helper of the client's knows completed responses only.
    stop = whole.output_text[1]
    with client.responses.stream(extra_body={"stop": stop}, **fields) as stream:
        final = stream.get_final_response()
    assert final.output_text == whole.output_text[:whole.output_text.index(stop)]
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(previous_response_id=whole.id, **fields)


@pytest.fixture
def anthropic_client(server):
    """Anthropic's client."""
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="none",
                               max_retries=0, timeout=30)


def test_messages_work_whole_and_streamed(client, anthropic_client):
    """The same text either way, and the same as a chat's."""
    fields = dict(model=NAME, system="Be brief.", max_tokens=24, extra_body={"temperature": 0.0},
                  messages=[{"role": "user", "content": "Hi there"}])
    # The client has no word for the temperature any more; the API has.
    whole = anthropic_client.messages.create(**fields)
    text = whole.content[0].text
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=24,
                                          temperature=0.0)
    assert text == chat.choices[0].message.content
    with anthropic_client.messages.stream(**fields) as stream:
        assert "".join(stream.text_stream) == text
        final = stream.get_final_message()
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    stopped = anthropic_client.messages.create(stop_sequences=[text[1]], **fields)
    assert stopped.content[0].text == text[:text.index(text[1])]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[1])


def test_messages_are_counted_and_refused_as_the_client_expects(anthropic_client):
    """Tokens of a prompt; errors as its own exceptions."""
    messages = [{"role": "user", "content": "Hi there"}]
    counted = anthropic_client.messages.count_tokens(model=NAME, messages=messages)
    answer = anthropic_client.messages.create(model=NAME, max_tokens=1, messages=messages)
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        anthropic_client.messages.create(model=NAME, max_tokens=1, messages=messages,
                                         extra_body={"temperature": -1.0})
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        anthropic_client.messages.create(model="other", max_tokens=1, messages=messages)


def test_32_asynchronous_clients_share_the_server(server):
    """AsyncOpenAI: half whole, half streamed, over kept connections."""
    async def main():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1",
                                      api_key="none", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    async def ask(client, number):
        fields = dict(model=NAME, messages=MESSAGES, max_tokens=12, seed=number // 2)
        if number % 2:
            answer = await client.chat.completions.create(**fields)
            return answer.choices[0].message.content
        stream = await client.chat.completions.create(stream=True, **fields)
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    texts = asyncio.run(main())
    assert texts[0::2] == texts[1::2]
