"""What a run amounts to, with the names, definitions and report lines of `vllm bench serve`.

    TTFT   from sending to the first event with a choice
    ITL    between two events with a choice, of all requests together
    TPOT   (latency - TTFT) / (output tokens - 1), per request with two tokens or more
    E2EL   from sending to the last event with a choice

Percentiles are interpolated linearly and deviations are of the population, as numpy has them.
Requests that failed count as failed and nowhere else. Source: vLLM 0.16, vllm/benchmarks/serve.py.
"""

import math
from statistics import fmean, pstdev

METRICS = {"ttft": ("TTFT", "Time to First Token"),
           "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
           "itl": ("ITL", "Inter-token Latency"),
           "e2el": ("E2EL", "End-to-end Latency")}
DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")


def percentile(ascending, percent):
    """Of values in ascending order; 0 of none."""
    if not ascending:
        return 0.0
    place = (len(ascending) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


def percent_word(percent):
    """99.0 -> "99", 99.9 -> "99.9"."""
    return str(int(percent)) if int(percent) == percent else str(percent)


def peaks(outputs):
    """(most tokens, most requests) in any second since the first request was sent."""
    if not outputs:
        return 0.0, 0
    origin = min(output.start_time for output in outputs)
    seconds = math.ceil(max(o.start_time + o.latency for o in outputs) - origin) + 1
    tokens, requests = [0] * seconds, [0] * seconds
    for output in outputs:
        time = output.start_time - origin
        for second in range(int(time), int(time + output.latency) + 1):
            requests[second] += 1
        time += output.ttft
        tokens[int(time)] += 1
        for gap in output.itl:
            time += gap
            tokens[min(int(time), seconds - 1)] += 1
    return float(max(tokens)), max(requests)


def summarise(outputs, duration, percents=(99,)):
    """The result object of one run: vLLM's keys, times in milliseconds."""
    good = [output for output in outputs if output.success]
    total_input = sum(output.prompt_len for output in good)
    total_output = sum(output.output_tokens for output in good)
    most_tokens, most_requests = peaks(good)
    result = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outputs) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "input_lens": [output.prompt_len for output in outputs],
        "output_lens": [output.output_tokens if output.success else 0 for output in outputs],
        "ttfts": [output.ttft for output in outputs],
        "itls": [output.itl for output in outputs],
        "generated_texts": [output.generated_text for output in outputs],
        "errors": [output.error for output in outputs],
        "max_output_tokens_per_s": most_tokens,
        "max_concurrent_requests": most_requests,
    }
    values = {
        "ttft": [output.ttft for output in good],
        "tpot": [(output.latency - output.ttft) / (output.output_tokens - 1)
                 for output in good if output.output_tokens > 1],
        "itl": [gap for output in good for gap in output.itl],
        "e2el": [output.latency for output in good],
    }
    for name, seconds in values.items():
        ascending = sorted(1e3 * value for value in seconds)
        result[f"mean_{name}_ms"] = fmean(ascending) if ascending else 0.0
        result[f"median_{name}_ms"] = percentile(ascending, 50)
        result[f"std_{name}_ms"] = pstdev(ascending) if ascending else 0.0
        for percent in percents:
            result[f"p{percent_word(percent)}_{name}_ms"] = percentile(ascending, percent)
    return result


def report_lines(result, percents=(99,)):
    """What `vllm bench serve` prints of a run."""
    def line(what, value, decimals=2):
        number = f"{value:.{decimals}f}" if decimals else str(value)
        return f"{what:<40} {number:<10}"

    lines = [f"{' Serving Benchmark Result ':=^50}",
             line("Successful requests:", result["completed"], 0),
             line("Failed requests:", result["failed"], 0),
             line("Maximum request concurrency:", result["max_concurrency"], 0),
             line("Benchmark duration (s):", result["duration"]),
             line("Total input tokens:", result["total_input_tokens"], 0),
             line("Total generated tokens:", result["total_output_tokens"], 0),
             line("Request throughput (req/s):", result["request_throughput"]),
             line("Output token throughput (tok/s):", result["output_throughput"]),
             line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
             line("Peak concurrent requests:", result["max_concurrent_requests"]),
             line("Total token throughput (tok/s):", result["total_token_throughput"])]
    for name, (short, long) in METRICS.items():
        lines += [f"{long:-^50}",
                  line(f"Mean {short} (ms):", result[f"mean_{name}_ms"]),
                  line(f"Median {short} (ms):", result[f"median_{name}_ms"])]
        for percent in percents:
            word = percent_word(percent)
            lines.append(line(f"P{word} {short} (ms):", result[f"p{word}_{name}_ms"]))
    return [*lines, "=" * 50]
