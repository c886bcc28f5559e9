"""The Grafana dashboard asks only for what a server that has served requests exposes."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from checkpoints import ROOT
from fathom_server import FathomServer
from http_client import parse_metrics

DASHBOARD = json.loads((ROOT / "deploy/grafana/fathom.json").read_text())
# Names that vLLM's own dashboards and benchmark use, as far as they mean something here.
VLLM_NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
    "vllm:prompt_tokens_by_source_total", "vllm:prompt_tokens_cached_total",
    "vllm:request_success_total", "vllm:corrupted_requests_total", "vllm:cache_config_info",
    *(f"vllm:{name}_{part}" for part in ("bucket", "sum", "count") for name in (
        "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens",
        "request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens",
        "request_prefill_kv_computed_tokens", "time_to_first_token_seconds",
        "inter_token_latency_seconds", "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds"))}


@pytest.fixture(scope="module")
def samples(model):
    """What /metrics says after a few requests."""
    with FathomServer(model, "--served-model-name", "tiny", tensor_parallel_size=2) as server:
        for _ in range(2):
            server.client.complete(prompt=list(range(40)), max_tokens=8, ignore_eos=True)
        server.wait_until_idle()
        yield parse_metrics(server.client.get("/metrics").body.decode())


def expressions():
    """Every query of every panel, as (title, expression)."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def selectors(expression):
    """(name, label names) of every series that an expression asks for."""
    for name, labels in re.findall(r"([a-z]+[:_][a-z0-9_:]+)(?:\{([^}]*)\})?\s*[\[)}/{]?", expression):
        if name.startswith(("vllm:", "fathom:", "http_")):
            yield name, re.findall(r"(\w+)\s*=~?", labels or "")


def test_every_panel_finds_its_metrics(samples):
    """By name, with the labels that it selects and groups by."""
    known = {}
    for name, labels in samples:
        known.setdefault(name, set()).update(label for label, _ in labels)
    checked = set()
    for title, expression in expressions():
        found = list(selectors(expression))
        assert found, f"{title} asks for nothing we know: {expression}"
        for name, labels in found:
            assert name in known, f"{title} asks for {name}, which /metrics does not have"
            assert set(labels) <= known[name], (title, name, labels, known[name])
            checked.add(name)
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            wanted = {label.strip() for label in grouped.split(",")}
            assert any(wanted <= known[name] for name, _ in found), (title, wanted)
    assert len(checked) > 25


def test_panels_have_titles_and_places_of_their_own():
    """No two overlap, and each has an id."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y)
                 for x in range(place["w"]) for y in range(place["h"])}
        assert panel["title"] and not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells


def test_the_metrics_of_vllm_are_there(samples):
    """Under its names, with its labels."""
    for name in sorted(VLLM_NAMES):
        labels = [dict(labels) for sample, labels in samples if sample == name]
        assert labels, name
        for label in labels:
            assert label["model_name"] == "tiny" and label["engine"] == "0", (name, label)


def test_what_was_served_is_counted(samples):
    """Two requests of 40 and 8 tokens; the second finds most of its prompt."""
    def total(name, **labels):
        return sum(value for (sample, sample_labels), value in samples.items()
                   if sample == name and labels.items() <= dict(sample_labels).items())

    assert total("vllm:prompt_tokens_by_source_total") == total("vllm:prompt_tokens_total") == 80
    found = total("vllm:prompt_tokens_by_source_total", source="local_cache_hit")
    assert found == total("vllm:prompt_tokens_cached_total") > 0
    assert total("vllm:request_prefill_kv_computed_tokens_sum") == 80 - found
    for name in ("queue", "inference", "prefill", "decode"):
        assert total(f"vllm:request_{name}_time_seconds_count") == 2
    assert total("vllm:request_success_total", finished_reason="length") == 2
    for kind in ("budget", "weights", "activations", "kv_cache"):
        for worker in "01":
            assert total("fathom:worker_memory_bytes", kind=kind, worker=worker) > 0


class Prometheus(BaseHTTPRequestHandler):
    """Answers two points to every query but those for preemptions."""

    def do_GET(self):
        (query,) = parse_qs(urlsplit(self.path).query)["query"]
        assert "$" not in query, query
        series = {"metric": {"finished_reason": "length"}, "values": [[1, "2"], [2, "NaN"], [3, "4"]]}
        result = [] if "num_preemptions" in query else [series]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"result": result}}).encode())

    def log_message(self, *_):
        pass


def test_the_preview_draws_every_panel_and_says_which_has_no_answer(tmp_path):
    """Without Grafana, from what Prometheus answers."""
    with HTTPServer(("127.0.0.1", 0), Prometheus) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, ROOT / "bench/dashboard_preview", "--output", tmp_path / "page.html",
             "--prometheus", f"http://127.0.0.1:{server.server_port}"],
            capture_output=True, text=True, check=False)
        server.shutdown()
    page = (tmp_path / "page.html").read_text()
    assert all(panel["title"] in page for panel in DASHBOARD["panels"])
    assert page.count("<polyline") == sum(
        len(panel["targets"]) for panel in DASHBOARD["panels"]
        if panel["type"] == "timeseries" and panel["title"] != "Preemptions and failures")
    assert done.returncode == 1 and "1 without what they ask for" in done.stdout, done
    assert "Preemptions and failures: no answer to sum(rate(vllm:num_preemptions_total" in done.stdout
