"""The client people have: the openai package, whole answers and streams."""

import asyncio

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
