"""A report as tables in Markdown and as a picture."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from benchmarks.machine import QUIET, is_disturbed
from benchmarks.peers import OWN, PEERS

Report = dict[str, Any]
BEGIN, END = "<!-- measured: python -m benchmarks report -->", "<!-- end -->"
# Okabe and Ito's colours, which stay apart for the colour-blind.
COLORS = {"nbbn": "#D55E00", "torch": "#0072B2", "jax": "#009E73", "onnxruntime": "#CC79A7", "tensorflow": "#E69F00"}
MARKERS = {"nbbn": "D", "torch": "o", "jax": "s", "onnxruntime": "^", "tensorflow": "v"}


def tables(report: Report) -> str:
    """The machine, the bounds, and every case, in Markdown."""
    return join(report, machine_lines(report), (mode_table(report, mode) for mode in MODES))


def join(report: Report, head: Iterator[str], times: Iterable[Iterator[str]]) -> str:
    """The lines of a whole report, with the tables that every report has."""
    parts = map(list, [head, bounds_table(report), *times, left_out_table(report)])
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def machine_lines(report: Report) -> Iterator[str]:
    m = report["machine"]
    caches = ", ".join(f"{level} {size >> 10} KiB" for level, size in m["caches"].items())
    memory = "" if m["memory"] is None else f", {m['memory'] / 2**30:.0f} GiB of memory"
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield f"{m['cpu']}, {m['cores']} cores ({m['threads']} used), {caches}{memory}; {m['system']}."
    yield f"nbbn {m['nbbn']} ({m['commit']}, threading layer {m['threading_layer']}), Python {m['python']}, {versions}."
    yield f"{m['date']}; freed memory: {report['memory']}."
    shares = [r["others"] for r in report["results"] if r["others"] is not None]
    if shares:
        noisy = sum(share > QUIET for share in shares)
        yield (
            f"Other processes used {statistics.median(shares):.0%} of the CPU (median), at most {max(shares):.0%}; "
            f"more than {QUIET:.0%} in {noisy} of {len(shares)} measurements, marked *."
        )


def bounds_table(report: Report) -> Iterator[str]:
    """One row per bound: the worst case, and how many meet it."""
    yield "| bound | limit | met by | worst | where |"
    yield "|---|---|---|---|---|"
    for bound, group in itertools.groupby(report["bounds"], key=lambda row: row["bound"]):
        rows = list(group)
        sign, pick = ("≥", min) if rows[0]["at_least"] else ("≤", max)
        worst = pick(rows, key=lambda row: row["ratio"])
        met = sum(row["met"] for row in rows)
        yield (
            f"| {bound} | {sign} {worst['limit']:g} | {met} of {len(rows)} | {worst['ratio']:.3g} | "
            f"{worst['case']} {worst['mode']} |"
        )


def mode_table(report: Report, mode: str) -> Iterator[str]:
    """Milliseconds per case."""
    results = [r for r in report["results"] if r["mode"] == mode]
    if not results:
        return
    yield f"{mode.capitalize()}, milliseconds per call (medians):"
    yield ""
    yield "| case | limit | copyto | nbbn, `out=` | nbbn | fastest peer | its form | nbbn / peer |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in results:
        times = {name: s["median"] for name, s in r["contenders"].items()}
        own = [times.get(f"{OWN}/{form}") for form in ("preallocated", "ordinary")]
        peers = {name: t for name, t in times.items() if name.partition("/")[0] in PEERS}
        best = min(peers, key=lambda name: peers[name], default=None)
        known = [t for t in own if t is not None]
        ratio = f"{min(known) / peers[best]:.2f}" if best and known else "-"
        cells = [_ms(r["limit"]), _ms(times.get("yardstick/copyto")), *map(_ms, own)]
        cells += [_ms(peers[best]), best.replace("/", ", ")] if best else ["-", "-"]
        mark = "*" * is_disturbed(r)
        yield f"| {r['case']}{mark} | {' | '.join(cells)} | {ratio} |"


def left_out_table(report: Report) -> Iterator[str]:
    """Who could not do what, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in report["results"]:
        for name, reason in r["left_out"].items():
            cases = reasons.setdefault((name, reason), [])
            if r["case"] not in cases:
                cases.append(r["case"])
    if reasons:
        yield "| left out | because | cases |"
        yield "|---|---|---|"
    for (name, reason), cases in reasons.items():
        yield f"| {name} | {reason} | {', '.join(cases) if len(cases) < 6 else f'{len(cases)} cases'} |"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def update(document: Path, report: Report, write: Callable[[Report], str] = tables) -> None:
    """Replace what stands between the two markers of a Markdown file. Raises: ValueError if it has no markers."""
    text = document.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"{document} has no lines {BEGIN!r} and {END!r}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n\n{write(report)}\n{END}{after}", encoding="utf-8")


def draw(report: Report, output: Path) -> None:
    """Save every contender's time over the limit as a PNG: see draw_panels."""
    seen = {name.partition("/")[0] for r in report["results"] for name in r["contenders"]}
    points = {library: _style(library, True) for library in COLORS if library in seen}
    points["results allocated"] = _style("torch", False) | {"color": "0.3"}
    points["numpy.copyto"] = {"color": "0.3", "linestyle": "", "marker": "|", "markersize": 11}
    of = f"{report['machine']['cpu']}, {report['machine']['threads']} threads"
    draw_panels(report, of, _point, points, output)


def draw_panels(
    report: Report,
    of: str,
    style: Callable[[str], dict[str, Any] | None],
    legend: Mapping[str, dict[str, Any]],
    output: Path,
) -> None:
    """Save times over the limit, one row per case and one panel per mode, as a PNG.

    of: the machine. style: matplotlib's arguments for a contender's points, None to draw none. legend: those by label.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cases = list(dict.fromkeys(r["case"] for r in report["results"]))
    modes = [m for m in MODES if any(r["mode"] == m for r in report["results"])]
    if not modes:
        raise ValueError("the report has no results to draw")
    figure = Figure(figsize=(16, 2.2 + 0.24 * len(cases)), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for r in (r for r in report["results"] if r["mode"] == mode):
            for name, sample in r["contenders"].items():
                if (look := style(name)) is not None:
                    panel.plot(sample["median"] / r["limit"], cases.index(r["case"]), **look)
        panel.axvline(1, color="0.3", linewidth=1, zorder=1)
        panel.set_xscale("log")
        panel.set_xlabel("time / limit")
        panel.grid(color="0.9", zorder=0)
        panel.set_axisbelow(True)
        panel.set_title(mode)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.suptitle(f"Time over the memory limit: {of}")
    handles = [Line2D([], [], label=label, **look) for label, look in legend.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(output, format="png")


def _point(name: str) -> dict[str, Any] | None:
    library, _, form = name.partition("/")
    if name == "yardstick/copyto":
        return {"marker": "|", "color": "0.3", "markersize": 11, "markeredgewidth": 2, "zorder": 2}
    if library not in COLORS or form == "plain" or "one thread" in form:
        return None
    return _style(library, form.startswith("preallocated"))


def _style(library: str, given: bool) -> dict[str, Any]:
    color = COLORS[library]
    fill = color if given else "white"
    size = 8 if library == OWN else 6
    return {
        "marker": MARKERS[library],
        "linestyle": "",
        "color": color,
        "markerfacecolor": fill,
        "markersize": size,
        "zorder": 4 if library == OWN else 3,
    }
