"""A survey as tables in Markdown and as a picture."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import is_disturbed
from benchmarks.peers import PEERS
from benchmarks.report import COLORS, Report, left_out_table, machine_lines
from benchmarks.survey.bounds import Ratios, known, own, ratio, ratio_of, rival, share_ahead
from benchmarks.survey.points import FLOAT32, GROUPS, OPTIONS, SURVEY_MODES

WORST = 20
MODE_COLORS = dict(zip(SURVEY_MODES, COLORS.values(), strict=False))


def tables(report: Report) -> str:
    """The machine, the classes, the worst points, who is left out, and the bounds, in Markdown."""
    tables = (group_table, peer_table, worst_table, left_out_table, bounds_table)
    parts = (_head(report), *(table(report) for table in tables))
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def _head(report: Report) -> Iterator[str]:
    yield from machine_lines(report)
    threads = report["asked_threads"]
    limit = "as many threads as each takes by default" if threads is None else f"threads: {threads} for everybody"
    yield f"Seed {report['seed']}, {report['points']} points, {limit}."
    yield f"Ratios: the fastest peer's time over nbbn's; for {OPTIONS}, that of nbbn's plain layer over nbbn's."


def group_table(report: Report) -> Iterator[str]:
    """One row per class and mode. The ratios of options are those of nbbn's plain layer."""
    yield "| class | mode | measurements | ahead | geometric mean | worst |"
    yield "|---|---|---|---|---|---|"
    for group in GROUPS:
        for mode in SURVEY_MODES:
            if ratios := _ratios(report, group, mode, ratio):
                yield f"| {group} | {mode} | {_summary(ratios)} |"


def peer_table(report: Report) -> Iterator[str]:
    """One row per peer and mode, of float32."""
    found = [(p, mode, _ratios(report, FLOAT32, mode, partial(ratio_of, p))) for p in PEERS for mode in SURVEY_MODES]
    if not any(ratios for _, _, ratios in found):
        return
    yield "| float32, against | mode | measurements | ahead | geometric mean | worst |"
    yield "|---|---|---|---|---|---|"
    for peer, mode, ratios in found:
        if ratios:
            yield f"| {peer} | {mode} | {_summary(ratios)} |"


def _ratios(report: Report, group: str, mode: str, of: Callable[[dict[str, Any]], float | None]) -> Ratios:
    return known(of(r) for r in report["results"] if (r["group"], r["mode"]) == (group, mode))


def _summary(ratios: Ratios) -> str:
    mean = statistics.geometric_mean(ratios)
    return f"{len(ratios)} | {share_ahead(ratios):.0%} | {mean:.2f} | {min(ratios):.2f}"


def worst_table(report: Report) -> Iterator[str]:
    """The measurements in which nbbn compares worst with a peer."""
    found = [(value, r) for r in report["results"] if r["group"] != OPTIONS and (value := ratio(r)) is not None]
    if found:
        yield "| shape | layout | dtype | mode | nbbn, ms | peer, ms | its form | ratio |"
        yield "|---|---|---|---|---|---|---|---|"
    for value, r in sorted(found, key=lambda pair: pair[0])[:WORST]:
        peer, form = rival(r) or (0.0, "")
        shape = " x ".join(map(str, r["shape"])) + "*" * is_disturbed(r)
        dtype = ", ".join(filter(None, (r["dtype"], r["fused"])))
        times = f"{1e3 * own(r):.3g} | {1e3 * peer:.3g}"
        yield f"| {shape} | {r['layout']} | {dtype} | {r['mode']} | {times} | {form.replace('/', ', ')} | {value:.2f} |"


def bounds_table(report: Report) -> Iterator[str]:
    yield "| bound | limit | measurements | value | met |"
    yield "|---|---|---|---|---|"
    for row in report["bounds"]:
        value, met = ("-", "-") if row["value"] is None else (f"{row['value']:.3g}", "yes" if row["met"] else "no")
        yield f"| {row['bound']} | ≥ {row['limit']:g} | {row['measurements']} | {value} | {met} |"


def draw(report: Report, output: Path) -> None:
    """Save ratios over the size of the input as a PNG, one panel per class and one colour per mode."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    for panel, group in zip(panels, GROUPS, strict=True):
        for r in report["results"]:
            if r["group"] == group and (value := ratio(r)) is not None:
                panel.plot(r["bytes"], value, **_style(r["mode"]))
        panel.axhline(1, color="0.3", linewidth=1, zorder=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(color="0.9", zorder=0)
        panel.set_axisbelow(True)
        panel.set_title(group)
    panels[0].set_ylabel("fastest peer / nbbn")
    panels[3].set_ylabel("fastest peer / nbbn")
    panels[-1].set_ylabel("plain / with the option")
    for panel in panels[3:]:
        panel.set_xlabel("bytes of the input")
    m = report["machine"]
    figure.suptitle(f"{m['cpu']}, {m['threads']} threads: seed {report['seed']}, {report['points']} points")
    handles = [Line2D([], [], label=mode, **_style(mode)) for mode in SURVEY_MODES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(output, format="png")


def _style(mode: str) -> dict[str, Any]:
    return {"marker": "o", "linestyle": "", "color": MODE_COLORS[mode], "markersize": 5, "alpha": 0.8, "zorder": 3}
