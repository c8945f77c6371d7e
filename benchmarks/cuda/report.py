"""A report of a GPU as tables in Markdown and as a picture."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from benchmarks.cuda.bounds import COPY
from benchmarks.peers import OWN
from benchmarks.report import COLORS, Report, draw_panels, join

# name in the report, heading of its column, marker in the picture; Okabe and Ito's colours are the libraries'.
FORMS = {
    COPY: ("copy", "|"),
    f"{OWN}/preallocated": ("nbbn, `out=`", "D"),
    f"{OWN}/ordinary": ("nbbn", "d"),
    "torch/eager": ("PyTorch, eager", "o"),
    "torch/native": ("without cuDNN", "s"),
    "torch/compile": ("compiled", "^"),
    "torch/module": ("module", "v"),
    "jax/ordinary": ("JAX, host's clock", "P"),
}


def tables(report: Report) -> str:
    """The machine, the bounds, and every case, in Markdown."""
    times = (_times(report, kind, mode) for kind in ("contenders", "calls") for mode in MODES)
    return join(report, machine_lines(report), times)


def machine_lines(report: Report) -> Iterator[str]:
    m = report["machine"]
    g = m["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    yield (
        f"{g['name']} (compute capability {g['compute_capability']}, {g['multiprocessors']} multiprocessors, "
        f"{g['memory'] / 2**30:.0f} GiB, L2 {g['l2_cache'] / 2**20:.0f} MiB), driver {g['driver']}, CUDA {g['cuda']}, "
        f"cuDNN {g['cudnn']}; {m['cpu']}, {m['cores']} cores; {m['system']}."
    )
    yield f"nbbn {m['nbbn']} ({m['commit']}), Python {m['python']}, {versions}."
    yield f"{m['date']}. Copies of 256 MiB and more: {_bandwidth(report)}."


def _bandwidth(report: Report) -> str:
    """Of the copies of large arrays, whose bytes are read and written."""
    found = [
        2 * r["bytes"] / r["contenders"][COPY]["median"] / 1e9 for r in report["results"] if r["bytes"] >= 256 << 20
    ]
    return f"{min(found):.0f} to {max(found):.0f} GB/s" if found else "none"


def _times(report: Report, kind: str, mode: str) -> Iterator[str]:
    """Microseconds per case; kind: "contenders" or "calls"."""
    results = [r for r in report["results"] if r["mode"] == mode and r[kind]]
    if not results:
        return
    columns, model = [name for name in FORMS if any(name in r[kind] for r in results)], _model(report)
    what = "by the GPU's events, L2 cache cold" if kind == "contenders" else "by the host's clock, many calls in a row"
    yield f"{mode.capitalize()}, microseconds ({what}; medians):"
    yield ""
    yield f"| case | limit | model | {' | '.join(FORMS[c][0] for c in columns)} | nbbn / PyTorch |"
    yield "|---" * (len(columns) + 4) + "|"
    for r in results:
        times = {name: s["median"] for name, s in r[kind].items()}
        best = {
            lib: min((t for n, t in times.items() if n.startswith(f"{lib}/")), default=0.0) for lib in (OWN, "torch")
        }
        ratio = f"{best[OWN] / best['torch']:.2f}" if best["torch"] else "-"
        should = (r["limit"], model(r)) if kind == "contenders" else (None, None)
        cells = " | ".join(map(_us, (*should, *map(times.get, columns))))
        yield f"| {r['case']} | {cells} | {ratio} |"


def _model(report: Report) -> Callable[[dict[str, Any]], float | None]:
    """What nbbn's kernels should take: the fewest bytes at the speed of the largest copy, and for each launch the time
    of the shortest one. A kernel that takes longer does something that the model does not know of."""
    copies = [(r["bytes"], r["contenders"][COPY]["median"]) for r in report["results"] if COPY in r["contenders"]]
    if not copies:
        return lambda result: None
    (size, seconds), start = max(copies), min(s for _, s in copies)
    return lambda result: result["least_bytes"] * seconds / (2 * size) + result["launches"] * start


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.4g}"


def draw(report: Report, output: Path) -> None:
    """Save every contender's time over the limit as a PNG: see benchmarks.report.draw_panels."""
    seen = {name for r in report["results"] for name in r["contenders"]}
    points = {name: _style(name) for name in FORMS if name in seen}
    legend = {FORMS[name][0].replace("`", ""): point for name, point in points.items()}
    draw_panels(report, report["machine"]["gpu"]["name"], points.get, legend, output)


def _style(name: str) -> dict[str, Any]:
    color = COLORS.get(name.partition("/")[0], "0.3")
    filled = {"markerfacecolor": "white"} if name == f"{OWN}/ordinary" else {}
    return {"linestyle": "", "marker": FORMS[name][1], "color": color, **filled}
