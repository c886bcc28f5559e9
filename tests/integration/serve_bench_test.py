"""bench/serve_bench and a real server: counts add up, keys are vLLM's, the page stands alone."""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from checkpoints import ROOT
from fathom_server import FathomServer

sys.path.insert(0, str(ROOT / "bench"))

from serving import metrics, report  # noqa: E402
from serving.load import EventStream, Output  # noqa: E402

PROMPT_LEN, OUTPUT_LEN, VOCAB_SIZE = 24, 6, 512
CONCURRENCY = (1, 3)
# Of `vllm bench serve --save-result` (0.16), with E2EL among the percentile metrics.
VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{statistic}_{metric}_ms" for statistic in ("mean", "median", "std", "p99")
      for metric in ("ttft", "tpot", "itl", "e2el"))}
VLLM_DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}


def run_bench(*arguments):
    """Runs the program to its end, with the standard library alone."""
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.run([sys.executable, "-S", str(ROOT / "bench/serve_bench"),
                           *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          env=environment)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """(what it printed, its results by concurrency, its page, the server's counter of tokens)."""
    folder = tmp_path_factory.mktemp("results")
    with FathomServer(model, "--served-model-name", "tiny", "--max-model-len", 1024) as server:
        done = run_bench("--base-url", f"http://127.0.0.1:{server.port}", "--max-concurrency",
                         ",".join(map(str, CONCURRENCY)), "--random-input-len", PROMPT_LEN,
                         "--random-output-len", OUTPUT_LEN, "--vocab-size", VOCAB_SIZE,
                         "--save-detailed", "--result-dir", folder, "--label", "a<b",
                         "--report", folder / "report.html")
        assert done.returncode == 0, done.stderr
        counted = server.client.metric("vllm:generation_tokens_total")
        server.wait_until_idle()
        assert server.is_healthy()
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return (done.stdout, {result["max_concurrency"]: result for result in results},
            (folder / "report.html").read_text(), counted)


def test_every_request_is_counted_once(run):
    """As many as asked for, each with all its tokens, and the server counts the same."""
    _, results, _, counted = run
    assert set(results) == set(CONCURRENCY)
    for concurrency, result in results.items():
        count = 4 * concurrency
        assert (result["completed"], result["failed"]) == (count, 0)
        assert result["total_input_tokens"] == count * PROMPT_LEN
        assert result["total_output_tokens"] == count * OUTPUT_LEN
        assert result["output_lens"] == [OUTPUT_LEN] * count
        # The steps of a tiny model take less than a message: an event may carry several tokens.
        assert all(1 <= len(gaps) <= OUTPUT_LEN - 1 for gaps in result["itls"])
    tries = OUTPUT_LEN  # one request that tells a wrong flag from a slow server
    assert counted == sum(r["total_output_tokens"] for r in results.values()) + tries


def test_the_keys_are_those_of_vllm(run):
    """With details and, after dropping them, without."""
    _, results, _, _ = run
    for result in results.values():
        assert set(result) == VLLM_KEYS | VLLM_DETAILS
        assert result["backend"] == "openai" and result["model_id"] == "tiny"


def test_the_sums_agree_with_each_other(run):
    """Rates are totals by duration; TPOT is what TTFT and ITL leave for it."""
    _, results, _, _ = run
    for result in results.values():
        assert math.isclose(result["output_throughput"] * result["duration"],
                            result["total_output_tokens"])
        assert math.isclose(result["total_token_throughput"] * result["duration"],
                            result["total_output_tokens"] + result["total_input_tokens"])
        latencies = [1e3 * (ttft + sum(gaps))
                     for ttft, gaps in zip(result["ttfts"], result["itls"])]
        assert math.isclose(np.mean(latencies), result["mean_e2el_ms"])
        assert math.isclose(np.percentile(latencies, 99), result["p99_e2el_ms"])
        tpots = [1e3 * sum(gaps) / (OUTPUT_LEN - 1) for gaps in result["itls"]]
        assert math.isclose(np.mean(tpots), result["mean_tpot_ms"])
        gaps = 1e3 * np.concatenate(result["itls"])
        assert math.isclose(np.median(gaps), result["median_itl_ms"])
        assert math.isclose(np.std(gaps), result["std_itl_ms"])
        # A closed loop: so many clients cannot have waited longer than the run took.
        assert sum(latencies) <= 1e3 * result["duration"] * result["max_concurrency"]


def test_it_prints_the_report_of_vllm_and_a_table(run):
    """A block for each run, its lines in vLLM's words."""
    printed, results, _, _ = run
    assert printed.count(" Serving Benchmark Result ") == len(CONCURRENCY)
    for concurrency, result in results.items():
        assert re.search(rf"^Maximum request concurrency: +{concurrency} *$", printed, re.M)
        for line in metrics.report_lines(result):
            assert line in printed
    assert re.search(r"^ *clients +failed +tok/s", printed, re.M)


def test_the_page_stands_alone(run):
    """Well-formed drawings, names escaped, and nothing that a browser would have to fetch."""
    _, _, page, _ = run
    drawings = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(drawings) == 6
    for drawing in drawings:
        xml.etree.ElementTree.fromstring(drawing)
    assert "a&lt;b" in page and "a<b" not in page and report.PUBLISHED in page
    fetched = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attrs):
            fetched.extend((tag, name) for name, _ in attrs if name in ("src", "href", "data"))

    Finder().feed(page)
    assert not fetched and "url(" not in page and "@import" not in page


def test_a_page_can_be_made_of_saved_runs(run, tmp_path):
    """Two series of runs on one page, without a server."""
    _, results, _, _ = run
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(results[1], label=name)))
    done = run_bench("--load-result", tmp_path / "one.json", tmp_path / "two.json",
                     "--report", tmp_path / "both.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "both.html").read_text()
    assert "<h2>one</h2>" in page and "<h2>two</h2>" in page


def test_a_refused_request_is_told_at_once(model):
    """What the server said about it, and no table of failures."""
    with FathomServer(model) as server:
        done = run_bench("--base-url", f"http://127.0.0.1:{server.port}", "--max-concurrency", 1,
                         "--random-input-len", 4, "--vocab-size", 100_000)
    assert done.returncode == 1
    assert "a first request failed: HTTP 400" in done.stderr and "vocabulary" in done.stderr


def respond(*pieces):
    """The Output of a response that arrives in these pieces, and then the connection ends."""
    async def read():
        output = Output(prompt_len=1)
        stream = EventStream(output, keeps_text=True)
        for piece in pieces:
            stream.take_in(piece)
        stream.connection_lost(None)
        await stream.done
        return output

    return asyncio.run(read())


def chunked(*events):
    """A response with a chunk for each event, complete."""
    chunks = [f"{len(event):x}\r\n{event}\r\n" for event in (*events, "")]
    return ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + "".join(chunks)).encode()


TOKEN = 'data: {"choices": [{"text": "\\"choices\\":[{"}]}\n\n'
USAGE = 'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'


def test_a_response_is_understood_however_it_is_cut():
    """Whole, byte by byte, and with an event across chunks."""
    response = chunked(TOKEN, TOKEN[:9], TOKEN[9:], ": ping\n\n", USAGE, "data: [DONE]\n\n")
    for pieces in ([response], [response[i:i + 1] for i in range(len(response))]):
        output = respond(*pieces)
        assert output.success and output.output_tokens == 7 and len(output.itl) == 1
        assert output.generated_text == '"choices":[{' * 2


def test_a_response_that_breaks_off_or_reports_an_error_has_failed():
    """However many tokens came before."""
    assert "connection ended" in respond(chunked(TOKEN, TOKEN)[:-5]).error
    assert "full" in respond(chunked(TOKEN, 'data: {"error":{"message":"full"}}\n\n')).error
    assert "HTTP 503" in respond(b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno").error
    assert "without a token" in respond(chunked("data: [DONE]\n\n")).error


def test_percentiles_are_those_of_numpy():
    """On random samples of all small sizes."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for size in range(1, 30):
        values = np.sort(random.exponential(size=size))
        for percent in (0, 50, 90, 99, 99.9, 100):
            assert math.isclose(metrics.percentile(list(values), percent),
                                np.percentile(values, percent))
