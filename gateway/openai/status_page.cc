#include "gateway/openai/status_page.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/human_bytes.h"

namespace fathom {
namespace {

constexpr char kStyle[] = R"(
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1a202c;--dim:#68748a;--line:#e3e7ee;
--one:#2f6fdb;--two:#12a37a;--three:#d98a1f;--bad:#cf3a3a}
@media(prefers-color-scheme:dark){:root{--bg:#11151c;--card:#1a202b;--ink:#e8ecf3;--dim:#93a0b5;
--line:#2a3342;--one:#6ea2ff;--two:#3fd0a2;--three:#f0b050;--bad:#ff7a7a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,-apple-system,"Segoe UI",
Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 40px}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:6px 14px;margin-bottom:18px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}
h2{font-size:13px;margin:0 0 10px;color:var(--dim);font-weight:600;text-transform:uppercase;
letter-spacing:.05em}
.pill{padding:2px 11px;border-radius:99px;font-size:13px;font-weight:600;color:#fff}
.good{background:#12875f}.wait{background:#b9761a}.down{background:#c43535}
.dim{color:var(--dim)}.right{margin-left:auto}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));margin-bottom:14px}
.wide{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));margin-bottom:14px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;
min-width:0}
.big{font-size:26px;font-weight:650;line-height:1.15;font-variant-numeric:tabular-nums}
.unit{font-size:14px;font-weight:400;color:var(--dim)}
h2 span{float:right;text-transform:none;letter-spacing:0;font-weight:400}
.small{font-size:13px;color:var(--dim);font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:96px}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;vector-effect:non-scaling-stroke}
polygon{opacity:.13}
.axis{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
.ends{display:flex;justify-content:space-between;gap:12px;margin-top:5px;font-size:13px;
color:var(--dim)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:5px 0;border-top:1px solid var(--line);text-align:left;font-weight:400;
overflow-wrap:anywhere}
tr:first-child td,tr:first-child th{border-top:0}
td:last-child{text-align:right}th{color:var(--dim);padding-right:14px;white-space:nowrap}
.bar{display:flex;height:10px;border-radius:5px;overflow:hidden;background:var(--line);margin-top:8px}
.key{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:5px}
footer{color:var(--dim);font-size:13px;margin-top:22px}
)";

std::string Escaped(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '&':
        escaped += "&amp;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

// 1,234,567
std::string WithCommas(int64_t number) {
  const std::string digits = absl::StrCat(number);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string Rate(double per_second) {
  return per_second < 100 && per_second != std::floor(per_second)
             ? absl::StrFormat("%.1f", per_second)
             : WithCommas(static_cast<int64_t>(per_second + 0.5));
}

struct Duration {
  std::string value;
  std::string_view unit;
};

Duration DurationOf(double seconds) {
  const double ms = seconds * 1e3;
  if (ms >= 10'000) return {absl::StrFormat("%.1f", seconds), "s"};
  return {absl::StrFormat(ms < 10 ? "%.1f" : "%.0f", ms), "ms"};
}

std::string Text(const Duration& duration) {
  return absl::StrCat(duration.value, "&nbsp;", std::string(duration.unit));
}

std::string Card(std::string_view title, std::string_view value, std::string_view unit,
                 std::string_view below) {
  return absl::StrCat("<section><h2>", std::string(title), "</h2><div class=\"big\">",
                      std::string(value), " <span class=\"unit\">", std::string(unit),
                      "</span></div><div class=\"small\">", std::string(below), "</div></section>");
}

std::string Row(std::string_view name, std::string_view value) {
  return absl::StrCat("<tr><th>", std::string(name), "</th><td>", Escaped(value), "</td></tr>");
}

std::string LatencyCard(std::string_view title, const RecentValues::Quantiles& quantiles) {
  if (quantiles.count == 0) return Card(title, "&ndash;", "", "nothing in the last minute");
  const Duration median = DurationOf(quantiles.p50);
  return Card(title, median.value, median.unit,
              absl::StrCat("p90&nbsp;", Text(DurationOf(quantiles.p90)), "<br>p99&nbsp;",
                           Text(DurationOf(quantiles.p99))));
}

struct Curve {
  std::string_view name;    // "": the title says it
  std::string_view colour;  // a variable of the style
  std::function<double(const LoadHistory::Sample&)> value;
};

// Ten minutes, the newest at the right.
std::string Chart(std::string_view title, const std::deque<LoadHistory::Sample>& history,
                  const std::vector<Curve>& curves) {
  constexpr int kWidth = LoadHistory::kMaxSamples - 1;
  double highest = 0;
  for (const Curve& curve : curves) {
    for (const LoadHistory::Sample& sample : history) {
      highest = std::max(highest, curve.value(sample));
    }
  }
  std::string lines, names;
  for (const int y : {6, 50, 95}) {
    absl::StrAppend(&lines, "<line class=\"axis\" x1=\"0\" y1=\"", y, "\" x2=\"", kWidth,
                    "\" y2=\"", y, "\"/>");
  }
  for (const Curve& curve : curves) {
    const size_t first = LoadHistory::kMaxSamples - history.size();
    std::string points;
    size_t x = first;
    for (const LoadHistory::Sample& sample : history) {
      const double share = highest > 0 ? curve.value(sample) / highest : 0;
      absl::StrAppend(&points, x++, ",", absl::StrFormat("%.1f ", 94 - share * 88));
    }
    const std::string colour = absl::StrCat("\"var(", std::string(curve.colour), ")\"");
    absl::StrAppend(&lines, "<polygon fill=", colour, " points=\"", first, ",94 ", points, kWidth,
                    ",94\"/><polyline stroke=", colour, " points=\"", points, "\"/>");
    if (curve.name.empty()) continue;
    absl::StrAppend(&names, "<span><span class=\"key\" style=\"background:var(",
                    std::string(curve.colour), ")\"></span>", std::string(curve.name), "</span>");
  }
  return absl::StrCat("<section><h2>", std::string(title), "<span>peak ", Rate(highest),
                      "</span></h2><svg viewBox=\"0 0 ", kWidth,
                      " 96\" preserveAspectRatio=\"none\" role=\"img\">", lines,
                      "</svg><div class=\"ends\"><span>10 minutes ago</span>", names,
                      "<span>now</span></div></section>");
}

std::string Header(const StatusPageData& data) {
  std::string_view style = "down", state = "unreachable";
  std::string detail = "the coordinator does not answer";
  if (data.server) {
    detail = data.server->state_detail();
    switch (data.server->state()) {
      case v1::ServerInfo::STATE_SERVING:
        style = "good", state = "serving";
        break;
      case v1::ServerInfo::STATE_DRAINING:
        style = "wait", state = "draining";
        break;
      default:
        style = "wait", state = data.server->epoch() == 0 ? "starting" : "interrupted";
    }
  }
  return absl::StrCat(
      "<header><h1>", Escaped(data.model_names.empty() ? "Fathom" : data.model_names.front()),
      "</h1><span class=\"pill ", std::string(style), "\">", std::string(state),
      "</span><span class=\"dim\">", Escaped(detail), "</span><span class=\"dim right\">Fathom ",
      Escaped(data.version), "</span></header>");
}

std::string Cards(const StatusPageData& data) {
  const LoadHistory::Sample now =
      data.history.empty() ? LoadHistory::Sample() : data.history.back();
  const int64_t running = data.server ? data.server->num_running() : 0;
  const int64_t waiting = data.server ? data.server->num_waiting() : 0;
  const double blocks = data.server ? data.server->num_kv_blocks() : 0;
  const double free = data.server ? data.server->num_free_kv_blocks() : 0;
  const double usage = blocks > 0 ? 100 * (1 - free / blocks) : 0;
  return absl::StrCat(
      "<div class=\"grid\">",
      Card("Generated", Rate(now.generated_tokens_per_second), "", "tokens/s now"),
      Card("Prompts", Rate(now.prompt_tokens_per_second), "", "tokens/s now"),
      Card("Requests", WithCommas(running), "",
           absl::StrCat("running, ", WithCommas(waiting), " waiting")),
      LatencyCard("First token", data.first_tokens), LatencyCard("Next tokens", data.inter_tokens),
      Card("KV cache", absl::StrFormat("%.1f", usage), "% used",
           absl::StrFormat("<div class=\"bar\"><div style=\"width:%.1f%%;background:var(--one)\">"
                           "</div></div>",
                           usage)),
      "</div>");
}

std::string ModelTable(const StatusPageData& data) {
  std::string rows = Row("names", absl::StrJoin(data.model_names, ", "));
  if (data.model) {
    const v1::ModelInfo& model = *data.model;
    rows += Row("architecture", model.architecture());
    rows += Row("context", absl::StrCat(WithCommas(model.max_model_len()), " tokens"));
    rows += Row("vocabulary", absl::StrCat(WithCommas(model.vocab_size()), " tokens"));
    rows += Row("activations", model.dtype());
    rows += Row("quantization", model.quantization());
    rows += Row("KV cache", model.kv_cache_dtype());
  }
  return absl::StrCat("<section><h2>Model</h2><table>", rows, "</table></section>");
}

std::string ServerTable(const StatusPageData& data) {
  std::string rows;
  if (data.server) {
    const v1::ServerInfo& server = *data.server;
    rows += Row("workers", WithCommas(server.num_workers()));
    rows += Row("incarnation of the group", WithCommas(static_cast<int64_t>(server.epoch())));
    rows += Row("steps made", WithCommas(static_cast<int64_t>(server.steps())));
  }
  const auto count = [&data](std::string_view name) {
    return WithCommas(static_cast<int64_t>(MetricValue(data.metrics_text, name)));
  };
  if (!data.metrics_text.empty()) {
    rows += Row("preemptions", count("vllm:num_preemptions_total"));
    rows += Row("times a worker was lost", count("fathom:group_failures_total"));
    const double queried = MetricValue(data.metrics_text, "vllm:prefix_cache_queries_total");
    const double found = MetricValue(data.metrics_text, "vllm:prefix_cache_hits_total");
    if (queried > 0) {
      rows += Row("prompt tokens found in the cache",
                  absl::StrFormat("%.1f %%", 100 * found / queried));
    }
  }
  rows += Row("requests in this gateway", WithCommas(data.num_in_flight));
  return absl::StrCat("<section><h2>Server</h2><table>", rows, "</table></section>");
}

// How much fits into the KV cache.
std::string CacheRow(const StatusPageData& data) {
  if (!data.server || data.server->num_kv_blocks() == 0) return "";
  const v1::ServerInfo& server = *data.server;
  const int64_t tokens = int64_t{server.num_kv_blocks()} * server.block_size();
  std::string text =
      absl::StrCat("KV cache of ", WithCommas(tokens), " tokens, ",
                   WithCommas(server.num_kv_blocks()), " blocks of ", server.block_size());
  if (data.model && data.model->max_model_len() > 0) {
    absl::StrAppend(&text,
                    absl::StrFormat(" &middot; %.1f requests of full length fit at a time",
                                    static_cast<double>(tokens) / data.model->max_model_len()));
  }
  return absl::StrCat("<tr><td style=\"text-align:left\">", text, "</td></tr>");
}

// Bar and numbers of what a worker has planned its memory for; "" when it does not say.
std::string MemoryOf(uint32_t worker, const StatusPageData& data) {
  struct Kind {
    std::string_view label;
    std::string_view name;
    std::string_view colour;
  };
  constexpr Kind kKinds[] = {{"weights", "weights", "--one"},
                             {"activations", "activations", "--three"},
                             {"kv_cache", "KV cache", "--two"}};
  const auto bytes_of = [&](std::string_view kind) {
    return MetricValue(data.metrics_text, "fathom:worker_memory_bytes",
                       {absl::StrCat("kind=\"", std::string(kind), "\""),
                        absl::StrCat("worker=\"", worker, "\"")});
  };
  const double budget = bytes_of("budget");
  if (budget <= 0) return "";
  std::string bar, texts;
  for (const Kind& kind : kKinds) {
    const double bytes = bytes_of(kind.label);
    absl::StrAppend(&bar, absl::StrFormat("<div style=\"width:%.2f%%;background:var(%s)\"></div>",
                                          100 * bytes / budget, std::string(kind.colour)));
    absl::StrAppend(&texts, "<span class=\"key\" style=\"background:var(", std::string(kind.colour),
                    ")\"></span>", std::string(kind.name), " ",
                    HumanBytes(static_cast<uint64_t>(bytes)), " &nbsp; ");
  }
  return absl::StrCat(" <span class=\"dim\">&middot; ", texts, "of ",
                      HumanBytes(static_cast<uint64_t>(budget)), "</span><div class=\"bar\">", bar,
                      "</div>");
}

// Neighbours with the same plan share a row.
std::string MemoryTable(const StatusPageData& data) {
  const uint32_t num_workers = data.server ? data.server->num_workers() : 0;
  std::string rows = CacheRow(data);
  for (uint32_t first = 0, end = 1; first < num_workers; first = end++) {
    const std::string plan = MemoryOf(first, data);
    while (end < num_workers && MemoryOf(end, data) == plan) ++end;
    if (plan.empty()) continue;
    absl::StrAppend(&rows, "<tr><td style=\"text-align:left\">",
                    end == first + 1 ? absl::StrCat("worker ", first)
                                     : absl::StrCat("workers ", first, " to ", end - 1),
                    plan, "</td></tr>");
  }
  if (rows.empty()) return "";
  return absl::StrCat("<section><h2>Memory plan</h2><table>", rows, "</table></section>");
}

}  // namespace

std::string StatusPage(const StatusPageData& data) {
  const std::string generated =
      Chart("Generated tokens/s", data.history,
            {{"", "--one", [](const auto& s) { return s.generated_tokens_per_second; }}});
  const std::string prompts =
      Chart("Prompt tokens/s", data.history,
            {{"", "--two", [](const auto& s) { return s.prompt_tokens_per_second; }}});
  const std::string load =
      Chart("Requests", data.history,
            {{"running", "--one", [](const auto& s) { return s.num_running; }},
             {"waiting", "--three", [](const auto& s) { return s.num_waiting; }}});
  return absl::StrCat(
      "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width\">"
      "<meta http-equiv=\"refresh\" content=\"5\"><title>",
      Escaped(data.model_names.empty() ? "" : data.model_names.front()),
      " &middot; Fathom</title><style>", kStyle, "</style></head><body><main>", Header(data),
      Cards(data), "<div class=\"wide\">", generated, prompts, load, "</div><div class=\"wide\">",
      ModelTable(data), ServerTable(data), "</div>", MemoryTable(data),
      "<footer>Metrics for Prometheus are at /metrics, the API at /v1. This page loads itself anew "
      "every 5 seconds.</footer></main></body></html>\n");
}

Task<> StatusPageHandler::Handle(const HttpRequest&, ResponseWriter& writer) {
  StatusPageData data;
  data.version = api_.version;
  data.model_names = api_.model.names();
  const absl::StatusOr<v1::ServerInfo> server = co_await api_.coordinator.GetServerInfo();
  if (server.ok()) data.server = *server;
  const absl::StatusOr<v1::ModelInfo> model = co_await api_.model.Info();
  if (model.ok()) data.model = *model;
  absl::StatusOr<std::string> metrics = co_await api_.coordinator.GetMetrics();
  if (metrics.ok()) data.metrics_text = *std::move(metrics);
  data.history = api_.load_history.samples();
  const auto a_minute_ago = std::chrono::steady_clock::now() - std::chrono::minutes(1);
  data.first_tokens = api_.metrics.recent_first_tokens().Since(a_minute_ago);
  data.inter_tokens = api_.metrics.recent_inter_tokens().Since(a_minute_ago);
  data.num_in_flight = api_.metrics.num_in_flight();
  Response response;
  response.content_type = "text/html; charset=utf-8";
  response.headers = {{"Cache-Control", "no-store"},
                      {"X-Frame-Options", "DENY"},
                      {"Content-Security-Policy",
                       "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}};
  response.body = StatusPage(data);
  co_await writer.Send(std::move(response));
}

}  // namespace fathom
