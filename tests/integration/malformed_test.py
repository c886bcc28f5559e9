"""Every malformed input gets a clear error, and the server goes on serving.

Three lists: requests (checked against one server that must survive them all, its workers the same
processes at the end), checkpoints and configurations, and command lines (each refused before
anything starts, with an exit code and a last line that says what to do).
"""

import json
import re
import shutil
import socket
import struct

import pytest

from checkpoints import GOLDEN, oracle, safetensors_file
from fathom_server import FathomServer, free_port, run_program, run_to_exit
from presets import PRESETS

MAX_MODEL_LEN = 512
VOCABULARY = 512

EX_USAGE, EX_CONFIG = 64, 78


@pytest.fixture(scope="module")
def server(model):
    """The one that must survive."""
    with FathomServer(model, "--max-model-len", MAX_MODEL_LEN, tensor_parallel_size=2) as running:
        pids = sorted(running.descendants())
        yield running
        running.wait_until_idle()
        assert sorted(running.descendants()) == pids, "a malformed request killed a process"
        running.client.complete(prompt=[1, 2], max_tokens=2, ignore_eos=True)


# Requests.

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = dict(prompt=[3, 4, 5], max_tokens=2)
GOOD_CHAT = dict(messages=[{"role": "user", "content": "hi"}], max_tokens=2)


def completion(pattern, status=400, **fields):
    """A completion with one bad field."""
    return pytest.param(COMPLETIONS, {**GOOD, **fields}, status, pattern,
                        id="completion " + json.dumps(fields)[:60])


def chat(pattern, status=400, **fields):
    """A chat with one bad field."""
    return pytest.param(CHAT, {**GOOD_CHAT, **fields}, status, pattern,
                        id="chat " + json.dumps(fields)[:60])


def body(pattern, data, path=COMPLETIONS):
    """A body that is not a request at all."""
    return pytest.param(path, data, 400, pattern, id=f"body {path} {data[:40]!r}")


BAD_REQUESTS = [
    # Out of range; the sentences are vLLM's where it has one.
    completion(r"temperature must be non-negative, got -1", temperature=-1),
    completion(r"temperature", temperature=1e9),
    completion(r"top_p must be in \(0, 1\], got 0", top_p=0),
    completion(r"top_p must be in \(0, 1\], got 1\.1", top_p=1.1),
    completion(r"top_k must be 0 \(disable\), or at least 1, got -2", top_k=-2),
    completion(r"min_p must be in \[0, 1\], got 2", min_p=2),
    completion(r"repetition_penalty must be greater than zero, got 0", repetition_penalty=0),
    completion(r"presence_penalty must be in \[-2, 2\], got 3", presence_penalty=3),
    completion(r"frequency_penalty must be in \[-2, 2\], got -2\.5", frequency_penalty=-2.5),
    completion(r"n must be at least 1, got 0", n=0),
    completion(r"n must be 1 when using greedy sampling, got 2", n=2, temperature=0),
    completion(r"max_tokens must be at least 1, got -1", max_tokens=-1),
    completion(r"max_tokens", max_tokens=0),
    completion(r"min_tokens must be less than or equal to max_tokens=2, got 3", min_tokens=3),
    completion(r"min_tokens", min_tokens=-1),
    completion(r"logprobs", logprobs=-2),
    completion(r"logprobs.*20|20.*logprobs", logprobs=21),
    completion(r"stop cannot contain an empty string", stop=["a", ""]),
    completion(r"stop", stop=7),
    completion(r"seed", seed="x"),
    completion(r"seed", seed=1.5),
    completion(r"JSON.*number|seed", seed=2**70),
    completion(r"stop_token_ids.*512|512.*vocab", stop_token_ids=[VOCABULARY]),
    completion(r"stop_token_ids", stop_token_ids=list(range(200))),
    completion(r"stop_token_ids", stop_token_ids=["a"]),
    completion(r"logit_bias", logit_bias={str(VOCABULARY): 1}),
    completion(r"logit_bias", logit_bias={"-1": 1}),
    completion(r"logit_bias", logit_bias={"cat": 1}),
    completion(r"logit_bias", logit_bias={"5": "high"}),
    completion(r"logit_bias", logit_bias=[1, 2]),
    # Prompts.
    completion(r"out of vocabulary|vocab", prompt=[1, VOCABULARY]),
    completion(r"prompt", prompt=[-1]),
    completion(r"prompt", prompt=[1.5]),
    completion(r"prompt", prompt=[2**40]),
    completion(r"prompt", prompt=[]),
    completion(r"prompt", prompt=[[]]),
    completion(r"prompt", prompt=[[1], "a"]),
    completion(r"prompt", prompt={"text": "a"}),
    completion(r"prompt", prompt=None),
    completion(r"maximum context length|context length is only 512", prompt=[7] * 600),
    completion(r"context length is only 512 tokens, resulting in a maximum input length of",
               prompt=[7] * 400, max_tokens=300),
    # Types, and what is not there.
    completion(r"max_tokens", max_tokens="many"),
    completion(r"stream", stream="yes"),
    completion(r"Stream options can only be defined when `stream=True`",
               stream_options={"include_usage": True}),
    completion(r"prompt_logprobs.*stream", stream=True, prompt_logprobs=1),
    completion(r"suffix", suffix="end"),
    completion(r"The model `gpt-4` does not exist", status=404, model="gpt-4"),
    # Chat.
    chat(r"messages", messages=[]),
    chat(r"messages", messages="hi"),
    chat(r"role", messages=[{"content": "hi"}]),
    chat(r"role", messages=[{"role": "wizard", "content": "hi"}]),
    chat(r"content", messages=[{"role": "user", "content": 5}]),
    chat(r"content|image", messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    chat(r"when using `top_logprobs`, `logprobs` must be set to true", top_logprobs=3),
    chat(r"top_logprobs", logprobs=True, top_logprobs=21),
    chat(r"context length", messages=[{"role": "user", "content": "word " * 2000}]),
    chat(r"The model `x` does not exist", status=404, model="x"),
    # Bodies.
    body(r"", b""),
    body(r"", b"{"),
    body(r"", b'{"prompt": [1], "max_tokens": 1,}'),
    body(r"", b"[1, 2]"),
    body(r"", b'"text"'),
    body(r"prompt", b"{}"),
    body(r"messages", b"{}", CHAT),
    body(r"", b'{"prompt": [1], "max_tokens": 1} trailing'),
    body(r"", b'{"prompt": "\xff\xfe"}'),
    body(r"", b'{"prompt": "\\ud800", "max_tokens": 1}'),
    body(r"", b"[" * 100000),
    body(r"", b'{"prompt": [' + b"1e999" + b'], "max_tokens": 1}'),
    body(r"temperature", b'{"prompt": [1], "temperature": NaN}'.replace(b"NaN", b'"NaN"')),
    body(r"tokens", b"{}", "/detokenize"),
    body(r"", b'{"tokens": [99999]}', "/detokenize"),
    body(r"prompt|messages", b"{}", "/tokenize"),
]


@pytest.mark.parametrize("path,data,status,pattern", BAD_REQUESTS)
def test_a_malformed_request_is_refused_with_its_reason(server, path, data, status, pattern):
    """The status, the error object with its four fields, and a message that names the fault."""
    reply = server.client.post(path, data)
    assert reply.status == status, (reply.status, reply.body[:500])
    error = reply.error()
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert error["message"] and re.search(pattern, error["message"]), error


def raw(name, request, *statuses):
    """Bytes on the wire, and the statuses that are a clear answer (0: the connection closes)."""
    return pytest.param(request, statuses, id=name)


def http(method="POST", path=COMPLETIONS, headers=(), payload=b"", version="HTTP/1.1"):
    """A request by hand."""
    lines = [f"{method} {path} {version}", "Host: x", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


BAD_HTTP = [
    raw("not http", b"hello\r\n\r\n", 400, 0),
    raw("tls to a plain port", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
        400, 0),
    raw("http/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 505, 0),
    raw("unknown method", http("BREW"), 400, 405, 501),
    raw("get where only post is", http("GET"), 405),
    raw("post where only get is", http("POST", "/health", ["Content-Length: 0"]), 405),
    raw("unknown path", http("GET", "/v1/nothing"), 404),
    raw("path with dots", http("GET", "/../../etc/passwd"), 404, 400),
    raw("bad content length", http(headers=["Content-Length: ten"], payload=b"{}"), 400),
    raw("negative content length", http(headers=["Content-Length: -5"], payload=b"{}"), 400),
    raw("two content lengths",
        http(headers=["Content-Length: 2", "Content-Length: 3"], payload=b"{} "), 400),
    raw("length and chunked",
        http(headers=["Content-Length: 2", "Transfer-Encoding: chunked"], payload=b"{}"), 400),
    raw("bad chunk size",
        http(headers=["Transfer-Encoding: chunked"], payload=b"zz\r\n{}\r\n0\r\n\r\n"), 400, 0),
    raw("huge content length", http(headers=["Content-Length: 99999999999999"]), 413),
    raw("endless header", http(headers=["X-Long: " + "a" * 200_000]), 431, 400, 413, 0),
    raw("thousands of headers", http(headers=[f"X-{i}: {'b' * 100}" for i in range(5000)]),
        431, 400, 0),
    raw("no body, half closed", http(headers=["Content-Length: 50"], payload=b'{"pro'), 400, 0),
    raw("wrong content type",
        http(headers=["Content-Type: text/plain", "Content-Length: 30"],
             payload=b'{"prompt":[1],"max_tokens": 1}'), 200, 400, 415),
]


@pytest.mark.parametrize("request_bytes,statuses", BAD_HTTP)
def test_malformed_http_is_answered_or_closed(server, request_bytes, statuses):
    """Never a hang: an error status with a body, or a closed connection where HTTP ends."""
    reply = server.client.raw(request_bytes, half_close=request_bytes.endswith(b'{"pro'))
    assert reply.status in statuses, (reply.status, reply.body[:300])
    if reply.status >= 400 and reply.headers.get("Content-Type", "").startswith("application/json"):
        assert reply.error()["message"]
    server.client.complete(**GOOD)


def test_half_a_request_does_not_hold_up_others(server):
    """40 connections that say nothing or stop in the middle; the 41st is served."""
    idle = []
    try:
        for number in range(40):
            connection = socket.create_connection(("127.0.0.1", server.port), 5)
            connection.sendall(http(headers=["Content-Length: 100"])[:number * 2])
            idle.append(connection)
        server.client.complete(**GOOD)
    finally:
        for connection in idle:
            connection.close()


def test_text_without_a_tokenizer_is_refused_saying_so(tmp_path):
    """A folder without tokenizer.json serves token ids only."""
    with FathomServer(GOLDEN / "v3_tiny" / "ckpt") as bare:
        assert bare.client.complete(prompt=[3, 4], max_tokens=3, ignore_eos=True)["choices"]
        for path, fields in ((COMPLETIONS, dict(prompt="text")), (CHAT, GOOD_CHAT),
                             ("/tokenize", dict(prompt="text")), ("/detokenize", dict(tokens=[1])),
                             (COMPLETIONS, dict(prompt=[1], stop=["x"]))):
            reply = bare.client.post(path, fields)
            assert reply.status == 400, (path, reply.body)
            assert "tokenizer.json" in reply.error()["message"]


# Checkpoints and configurations.

def tiny(folder):
    """A small good checkpoint to spoil."""
    oracle.make_checkpoint(str(folder), num_nextn_predict_layers=0, num_hidden_layers=2)
    return folder / "model.safetensors"


def with_config(**fields):
    """config.json with other fields; "absent" removes one."""
    def spoil(folder):
        tiny(folder)
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return spoil


def with_bytes(change):
    """model.safetensors with its bytes changed."""
    def spoil(folder):
        path = tiny(folder)
        path.write_bytes(change(path.read_bytes()))
    return spoil


def with_header(change):
    """model.safetensors with its JSON header changed in place."""
    def rewrite(data):
        (length,) = struct.unpack("<Q", data[:8])
        header = change(json.loads(data[8:8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length:]
    return with_bytes(rewrite)


def with_tensors(change):
    """model.safetensors with its tensors changed."""
    def spoil(folder):
        path = tiny(folder)
        tensors = safetensors_file.load(str(path))
        change(tensors)
        safetensors_file.save(str(path), tensors)
    return spoil


def with_file(name, data):
    """Another file beside a good checkpoint."""
    def spoil(folder):
        tiny(folder)
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
    return spoil


FP8 = PRESETS["v3_tiny_fp8"]["quantization_config"]
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def moved(header, begin, end):
    """The header with the offsets of one tensor replaced."""
    header[KV_A]["data_offsets"] = [begin, end]
    return header


def reshaped(tensors):
    """One tensor of another shape."""
    old = tensors[KV_A]
    tensors[KV_A] = safetensors_file.Stored(old.dtype, old.shape[::-1], old.data)


def retyped(tensors):
    """One tensor of a type nobody stores weights in."""
    old = tensors[KV_A]
    tensors[KV_A] = safetensors_file.Stored("I16", old.shape, old.data)


def spoiled(name, spoil, *patterns):
    """A model folder that must be refused with a message that matches each pattern."""
    return pytest.param(spoil, patterns, id=name)


BAD_MODELS = [
    spoiled("no folder", shutil.rmtree, r"model|folder|directory|config\.json"),
    spoiled("empty folder", lambda folder: None, r"config\.json"),
    spoiled("config is not json", with_file("config.json", b"{"), r"config\.json"),
    spoiled("config is a list", with_file("config.json", b"[]"), r"config\.json"),
    spoiled("other architecture", with_config(architectures=["LlamaForCausalLM"]),
            r"LlamaForCausalLM", r"DeepseekV3ForCausalLM"),
    spoiled("no architecture", with_config(architectures="absent"), r"architectures"),
    spoiled("missing field", with_config(kv_lora_rank="absent"), r"kv_lora_rank"),
    spoiled("wrong type", with_config(hidden_size="big"), r"hidden_size"),
    spoiled("negative size", with_config(num_hidden_layers=-1), r"num_hidden_layers"),
    spoiled("absurd size", with_config(hidden_size=2**40), r"hidden_size"),
    spoiled("groups that do not divide", with_config(n_group=5), r"n_group"),
    spoiled("more experts per token than there are", with_config(num_experts_per_tok=99),
            r"num_experts_per_tok"),
    spoiled("odd rope dimension", with_config(qk_rope_head_dim=15), r"qk_rope_head_dim"),
    spoiled("unknown scoring", with_config(scoring_func="tanh"), r"scoring_func", r"tanh"),
    spoiled("unknown rope scaling", with_config(rope_scaling=dict(type="dynamic", factor=2)),
            r"rope_scaling|dynamic"),
    spoiled("unknown activation", with_config(hidden_act="gelu"), r"hidden_act", r"gelu"),
    spoiled("attention bias", with_config(attention_bias=True), r"attention_bias"),
    spoiled("unknown quantisation", with_config(quantization_config=dict(quant_method="awq")),
            r"awq"),
    spoiled("other fp8 blocks", with_config(
        quantization_config=dict(FP8, weight_block_size=[64, 64])), r"weight_block_size"),
    spoiled("no weights", with_file("model.safetensors", None), r"safetensors"),
    spoiled("empty file", with_bytes(lambda data: b""), r"model\.safetensors"),
    spoiled("truncated header", with_bytes(lambda data: data[:100]), r"model\.safetensors"),
    spoiled("truncated data", with_bytes(lambda data: data[:-7]), r"model\.safetensors"),
    spoiled("trailing bytes", with_bytes(lambda data: data + b"x" * 9), r"model\.safetensors"),
    spoiled("absurd header length", with_bytes(lambda data: b"\xff" * 8 + data[8:]),
            r"model\.safetensors", r"header"),
    spoiled("header is not json", with_header(lambda header: b"{nope}"), r"model\.safetensors"),
    spoiled("offsets out of range", with_header(lambda header: moved(header, 2**40, 2**40 + 8)),
            r"kv_a_proj_with_mqa"),
    spoiled("offsets backwards", with_header(lambda header: moved(header, 900, 100)),
            r"kv_a_proj_with_mqa"),
    spoiled("offsets overlap", with_header(
        lambda header: moved(header, 0, 128 * 80 * 2)), r"model\.safetensors", r"overlap|offset"),
    spoiled("missing tensor", with_tensors(lambda tensors: tensors.pop(KV_A)),
            r"kv_a_proj_with_mqa", r"missing|not in|no tensor"),
    spoiled("wrong shape", with_tensors(reshaped), r"kv_a_proj_with_mqa", r"128"),
    spoiled("wrong type of tensor", with_tensors(retyped), r"kv_a_proj_with_mqa", r"I16"),
    spoiled("index names a missing file", with_file(
        "model.safetensors.index.json",
        json.dumps(dict(weight_map={KV_A: "gone.safetensors"})).encode()), r"gone\.safetensors"),
    spoiled("index leaves the folder", with_file(
        "model.safetensors.index.json",
        json.dumps(dict(weight_map={KV_A: "../../etc/passwd"})).encode()), r"\.\./|path|name"),
    spoiled("index is not json", with_file("model.safetensors.index.json", b"]"),
            r"model\.safetensors\.index\.json"),
]


@pytest.mark.parametrize("spoil,patterns", BAD_MODELS)
def test_a_bad_checkpoint_is_refused_before_anything_starts(tmp_path, spoil, patterns):
    """Exit code 78; the last line names the file and what is wrong in it."""
    folder = tmp_path / "model"
    folder.mkdir()
    spoil(folder)
    returncode, log = run_to_exit(folder, tensor_parallel_size=2)
    assert returncode == EX_CONFIG, (returncode, log)
    for pattern in patterns:
        assert re.search(pattern, log), log


def test_a_bad_tokenizer_is_refused_at_start(model, tmp_path):
    """A tokenizer.json that is there must be one."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    returncode, log = run_to_exit(folder)
    assert returncode == EX_CONFIG, (returncode, log)
    assert "tokenizer.json" in log


# Command lines.

def flags(pattern, *words, code=EX_USAGE, world_size=1):
    """Flags that must be refused."""
    return pytest.param(words, world_size, code, pattern, id=" ".join(words) or f"tp{world_size}")


BAD_FLAGS = [
    flags(r"no-such-flag", "--no-such-flag"),
    flags(r"block-size.*\b1, 16, 32, 64,? (or |and )?128|block-size", "--block-size", "17"),
    flags(r"dtype", "--dtype", "float16"),
    flags(r"kv-cache-dtype", "--kv-cache-dtype", "fp8_e5m2"),
    flags(r"quantization", "--quantization", "awq"),
    flags(r"device", "--device", "tpu"),
    flags(r"max-num-seqs", "--max-num-seqs", "0"),
    flags(r"max-num-batched-tokens", "--max-num-batched-tokens", "-4"),
    flags(r"gpu-memory-utilization", "--gpu-memory-utilization", "1.5"),
    flags(r"kv-cache-memory-bytes", "--kv-cache-memory-bytes", "plenty"),
    flags(r"port", "--port", "70000"),
    flags(r"seed", "--seed", "x"),
    flags(r"tensor-parallel-size", world_size=0),
    flags(r"3.*num_attention_heads|num_attention_heads.*3|divide", code=EX_CONFIG, world_size=3),
    flags(r"16", code=EX_CONFIG, world_size=16),
    flags(r"max-model-len|max_model_len|max_position_embeddings", "--max-model-len", "999999",
          code=EX_CONFIG),
    flags(r"KV|kv", "--kv-cache-memory-bytes", "1000", code=EX_CONFIG),
]


@pytest.mark.parametrize("words,world_size,code,pattern", BAD_FLAGS)
def test_a_bad_command_line_is_refused_before_anything_starts(
        model, words, world_size, code, pattern):
    """64 for flags nobody could mean, 78 for flags this model cannot have; the reason is said."""
    returncode, log = run_to_exit(model, *words, tensor_parallel_size=world_size)
    assert returncode == code, (returncode, log)
    assert re.search(pattern, log), log


def test_no_device_cuda_is_refused_saying_so(model):
    """This build has no CUDA."""
    returncode, log = run_to_exit(model, "--device", "cuda")
    assert returncode in (EX_USAGE, EX_CONFIG) and re.search("CUDA|cuda", log), (returncode, log)


def test_a_port_in_use_is_refused(model):
    """It names the port, exits and leaves nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        returncode, log = run_to_exit(model, port=port)
    assert returncode == 1, (returncode, log)
    assert str(port) in log.splitlines()[-1] and "in use" in log


@pytest.mark.parametrize("program,arguments,pattern", [
    ("fathom", ["fly"], r"fly"),
    ("fathom", ["serve"], r"MODEL"),
    ("fathom-worker", ["--listen", "unix:/tmp/x"], r"--model"),
    ("fathom-worker", ["--model", "/nowhere", "--listen", "nonsense"], r"address|nonsense|config"),
    ("fathom-coordinator", ["--listen", "127.0.0.1:0"], r"--workers"),
    ("fathom-coordinator", ["--listen", "127.0.0.1:0", "--workers", ""], r"address"),
    ("fathom-gateway", ["--model", "/nowhere"], r"/nowhere"),
    ("fathom-gateway", ["--model", "/"], r"--coordinator"),
])
def test_each_program_refuses_a_bad_command_line(program, arguments, pattern):
    """A non-zero exit code at once, and the reason on stderr."""
    returncode, _, stderr = run_program(program, *arguments)
    assert returncode in (EX_USAGE, EX_CONFIG), (returncode, stderr)
    assert re.search(pattern, stderr), stderr


def test_an_open_tcp_port_needs_tls_or_a_word(model):
    """A coordinator on all interfaces without TLS says which flags would do."""
    port = free_port()
    returncode, _, stderr = run_program(
        "fathom-coordinator", "--listen", f"0.0.0.0:{port}", "--workers", "unix:/tmp/none")
    assert returncode in (1, EX_USAGE), stderr
    assert "--tls-certificate" in stderr or "--insecure" in stderr
