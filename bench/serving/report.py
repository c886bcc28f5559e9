"""Runs as one HTML page without external assets: a table and curves, drawn as SVG.

Beside them stand the figures that Vultr published for vLLM 0.16 on eight B200 with
DeepSeek-V3-0324, 2,048 tokens in and 512 out ("NVIDIA HGX B200 vLLM Optimization Cookbook", March 2026): only those
that are known here.
"""

import html
import math
from dataclasses import dataclass, field

PUBLISHED = "vLLM 0.16, 8×B200 (published)"
PUBLISHED_TOKENS_PER_S = {1: 106, 8: 503, 64: 2281, 256: 4010, 1024: 4370}
PUBLISHED_TPOT_MS = {1: 9.28}
PUBLISHED_TTFT_MS = {1: 92, 1024: 58000}
# p99 ITL as soon as prompts are read while others decode.
PUBLISHED_MIXED_P99_ITL_MS = (144, 243)

WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
COLOURS = ("#1769aa", "#c0521f", "#2e7d32", "#7b3fa0", "#a8780a", "#0b7f8a")
PUBLISHED_COLOUR = "#8a8a8a"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fdfdfc; --faint: #d9d9d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --paper: #181a1b;
                                             --faint: #3a3d3f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .title { font-size: 14px; font-weight: 600; } svg .grid { stroke: var(--faint); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--faint); }
th { font-weight: 600; } .wide { overflow-x: auto; } .note { opacity: .75; }
"""


@dataclass
class Series:
    """A line of (x, y) points; without `joined` points alone."""

    name: str
    points: list
    colour: str
    dashed: bool = False
    joined: bool = True


@dataclass
class Chart:
    """Axes of which each may be logarithmic."""

    title: str
    x_title: str
    y_title: str
    series: list
    log_x: bool = True
    log_y: bool = False
    band: tuple = None  # (low, high, what it is)
    labels: dict = field(default_factory=dict)  # (x, y) -> text beside the point

    def svg(self):
        """The drawing."""
        points = [point for series in self.series for point in series.points]
        if not points:
            return ""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if self.band:
            ys += self.band[:2]
        x_axis = Axis(min(xs), max(xs), self.log_x, LEFT, WIDTH - RIGHT)
        lowest = min(ys) if self.log_y else 0
        y_axis = Axis(lowest, 1.05 * max(ys), self.log_y, HEIGHT - BOTTOM, TOP)
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
                 f'aria-label="{html.escape(self.title)}">',
                 text(LEFT, 18, self.title, "title")]
        for value in x_axis.ticks():
            x = x_axis.at(value)
            parts.append(line(x, TOP, x, HEIGHT - BOTTOM))
            parts.append(text(x, HEIGHT - BOTTOM + 16, short(value), anchor="middle"))
        for value in y_axis.ticks():
            y = y_axis.at(value)
            parts.append(line(LEFT, y, WIDTH - RIGHT, y))
            parts.append(text(LEFT - 6, y + 4, short(value), anchor="end"))
        parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x_title, anchor="middle"))
        parts.append(f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
                     f'text-anchor="middle">{html.escape(self.y_title)}</text>')
        if self.band:
            low, high, name = self.band
            top, bottom = y_axis.at(high), y_axis.at(low)
            parts.append(f'<rect x="{LEFT}" y="{top:.1f}" width="{WIDTH - RIGHT - LEFT}" '
                         f'height="{bottom - top:.1f}" fill="{PUBLISHED_COLOUR}" opacity=".22"/>')
            parts.append(text(WIDTH - RIGHT - 4, bottom - 4, name, anchor="end"))
        for series in self.series:
            parts += self._drawn(series, x_axis, y_axis)
        return "\n".join([*parts, "</svg>"])

    def _drawn(self, series, x_axis, y_axis):
        places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
        if series.joined and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dash = ' stroke-dasharray="5 4"' if series.dashed else ""
            yield (f'<polyline points="{path}" fill="none" stroke="{series.colour}" '
                   f'stroke-width="2"{dash}/>')
        for (x, y), point in zip(places, series.points):
            says = html.escape(f"{series.name}: {short(point[0])} → {short(point[1])}")
            yield (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{series.colour}">'
                   f"<title>{says}</title></circle>")
            if point in self.labels:
                is_right = x > WIDTH - RIGHT - 40
                yield text(x + (-6 if is_right else 6), y - 6, self.labels[point],
                           anchor="end" if is_right else "start")


class Axis:
    """Maps values to places and says where its ticks are."""

    def __init__(self, low, high, is_log, start, end):
        self.is_log = is_log
        if is_log:
            low, high = max(low, 1e-3), max(high, 2e-3)
            if high < 2 * low:
                low, high = low / 1.5, high * 1.5
        elif high <= low:
            high = low + 1
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value):
        """Where it lies in the drawing."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self):
        """Powers of two or ten of a logarithm, else round numbers."""
        if self.is_log:
            base = 2 if self.high / self.low <= 4096 else 10
            first = math.ceil(math.log(self.low, base) - 1e-9)
            last = math.floor(math.log(self.high, base) + 1e-9)
            every = max(1, math.ceil((last - first + 1) / 11))
            return [base ** power for power in range(first, last + 1, every)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next((m for m in (1, 2, 5) if (self.high - self.low) / (step * m) <= 6), 10)
        return [step * i for i in range(math.ceil(self.low / step), int(self.high / step) + 1)]


def short(number):
    """1234.5 -> "1,234"; 1.234 -> "1.23"."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def text(x, y, words, css_class="", anchor="start"):
    """A line of text in a drawing."""
    return (f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{html.escape(words)}</text>")


def line(x0, y0, x1, y1):
    """A line of the grid."""
    return f'<line class="grid" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def by_label(results):
    """{label: its results by concurrency}, in order of appearance."""
    groups = {}
    for result in results:
        groups.setdefault(result["label"] or result["model_id"], []).append(result)
    return {label: sorted(group, key=lambda result: result["max_concurrency"])
            for label, group in groups.items()}


def charts(results, with_published):
    """What is drawn of these results."""
    groups = list(zip(by_label(results).items(), COLOURS * len(results)))

    def curves(key):
        return [Series(label, [(r["max_concurrency"], r[key]) for r in group], colour)
                for (label, group), colour in groups]

    def published(points, joined=True):
        return [Series(PUBLISHED, points, PUBLISHED_COLOUR, True, joined)] if with_published else []

    def tails(name, high):
        return [Series(f"{label}, {high}", [(r["max_concurrency"], r[f"{high}_{name}_ms"])
                                            for r in group], colour, dashed=True)
                for (label, group), colour in groups]

    per_client = [Series(label, [(r["output_throughput"] / r["max_concurrency"],
                                  r["output_throughput"]) for r in group], colour)
                  for (label, group), colour in groups]
    published_per_client = [(rate / clients, rate)
                            for clients, rate in PUBLISHED_TOKENS_PER_S.items()]
    clients_at = {(r["output_throughput"] / r["max_concurrency"], r["output_throughput"]):
                  str(r["max_concurrency"]) for r in results}
    return [
        Chart("Throughput", "clients", "output tokens per second",
              curves("output_throughput") + published(list(PUBLISHED_TOKENS_PER_S.items()))),
        Chart("Throughput and pace (numbers: clients)", "output tokens per second and client",
              "output tokens per second", per_client + published(published_per_client),
              labels=clients_at),
        Chart("Inter-token latency: median, p99 dashed", "clients", "milliseconds",
              curves("median_itl_ms") + tails("itl", "p99"), log_y=True,
              band=(*PUBLISHED_MIXED_P99_ITL_MS, "B200 p99 while prompts are read")
              if with_published else None),
        Chart("Time per output token: mean", "clients", "milliseconds",
              curves("mean_tpot_ms") + published(list(PUBLISHED_TPOT_MS.items()))),
        Chart("Time to first token: median, p99 dashed", "clients", "milliseconds",
              curves("median_ttft_ms") + tails("ttft", "p99") +
              published(list(PUBLISHED_TTFT_MS.items()), joined=False), log_y=True),
        Chart("End-to-end latency: median, p99 dashed", "clients", "milliseconds",
              curves("median_e2el_ms") + tails("e2el", "p99"), log_y=True),
    ]


COLUMNS = (("clients", "max_concurrency", 0), ("failed", "failed", 0),
           ("tok/s", "output_throughput", 1), ("TTFT mean", "mean_ttft_ms", 1),
           ("p50", "median_ttft_ms", 1), ("p99", "p99_ttft_ms", 1),
           ("TPOT mean", "mean_tpot_ms", 2), ("p99", "p99_tpot_ms", 2),
           ("ITL p50", "median_itl_ms", 2), ("p99", "p99_itl_ms", 2),
           ("E2EL p50", "median_e2el_ms", 1), ("p99", "p99_e2el_ms", 1))


def table_rows(results):
    """[titles, row, …] as text: a row per run, then the published rate for as many clients."""
    rows = [[title for title, _, _ in COLUMNS] + ["ITL p99/p50", "B200 tok/s"]]
    for result in results:
        peer = PUBLISHED_TOKENS_PER_S.get(result["max_concurrency"])
        median, p99 = result["median_itl_ms"], result["p99_itl_ms"]
        rows.append([f"{result[key]:,.{decimals}f}" for _, key, decimals in COLUMNS] +
                    [f"{p99 / median:.2f}" if median else "", f"{peer:,}" if peer else ""])
    return rows


def page(results, heading, with_published=True):
    """The whole document."""
    legend = " ".join(
        f'<span style="color:{colour}">●</span> {html.escape(label)}'
        for label, colour in zip(by_label(results), COLOURS * len(results)))
    if with_published:
        legend += f' <span style="color:{PUBLISHED_COLOUR}">●</span> {PUBLISHED}'
    tables = []
    for label, group in by_label(results).items():
        titles, *rows = table_rows(group)
        cells = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
                       for row in rows)
        tables.append(f'<h2>{html.escape(label)}</h2><div class="wide"><table><thead><tr>{cells}'
                      f"</tr></thead><tbody>{body}</tbody></table></div>")
    figures = "".join(f"<figure>{chart.svg()}</figure>"
                      for chart in charts(results, with_published))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{html.escape(heading)}</h1>
<p class="note">Closed loop, different random prompts for each number of clients; times in
milliseconds, with the definitions of <code>vllm bench serve</code>.</p><p>{legend}</p>
<div class="charts">{figures}</div>{"".join(tables)}</body></html>
"""
