"""What the demo shows at its end: a table and a picture."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbbn.demo.scenarios import Scenario
from nbbn.demo.training import Result

Results = Mapping[tuple[str, str], Sequence[Result]]  # by scenario and method, one per seed
# Okabe and Ito's colours, which stay apart for the colour-blind, and dashes for print.
LINES: dict[str, dict[str, Any]] = {
    "plain": {"color": "#D55E00", "linestyle": "-", "linewidth": 2},
    "renorm": {"color": "#0072B2", "linestyle": "--", "linewidth": 2},
    "ghost": {"color": "#009E73", "linestyle": "-.", "linewidth": 2},
}
DIAMOND: dict[str, Any] = {"linestyle": "", "marker": "D", "markerfacecolor": "white", "markeredgewidth": 2}


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation of accuracies; the deviation is that of a sample."""
    v = 100 * np.array(values)
    return f"{v.mean():5.1f} ± {v.std(ddof=min(1, v.size - 1)):4.1f}"


def final(runs: Sequence[Result]) -> list[float]:
    return [float(r.curve[-1]) for r in runs]


def table(scenarios: Sequence[Scenario], results: Results) -> Iterator[str]:
    """The lines of the table and of the notes."""
    yield f"{'scenario':20}{'method':9}{'inference':14}training mode"
    for s in scenarios:
        for m in s.methods:
            runs = results[s.name, m]
            name = s.name if m == s.methods[0] else ""
            yield f"{name:20}{m:9}{percent(final(runs)):14}{percent([r.training_mode for r in runs])}"
    for s in scenarios:
        ghost = f" Ghost batches of {s.ghost}." if s.ghost else ""
        yield ""
        yield from textwrap.wrap(f"{s.name}: {s.batches}.{ghost} {s.note}", 100, subsequent_indent="  ")


def summary(scenarios: Sequence[Scenario], results: Results) -> Iterator[str]:
    """One line per scenario: plain batch normalization and the remedy, in inference."""
    for s in scenarios:
        plain, remedy = (100 * np.mean(final(results[s.name, m])) for m in ("plain", s.remedy))
        yield f"{s.name:20}plain {plain:.1f} %, {s.remedy} {remedy:.1f} % ({remedy - plain:+.1f})"


def draw(scenarios: Sequence[Scenario], results: Results, output: Path) -> None:
    """Save the test accuracies against the steps, one panel per scenario, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 7.6), dpi=120, layout="constrained")
    spacing: Any = figure.get_layout_engine()
    spacing.set(hspace=0.06, wspace=0.04)
    panels = figure.subplots(2, 2, sharey=True)
    for panel, scenario in zip(panels.flat, scenarios, strict=True):
        _draw_panel(panel, scenario, results)
    panels[0, 0].set(ylabel="test accuracy in %", ylim=(None, 101))
    panels[1, 0].set(ylabel="test accuracy in %", xlabel="training step")
    panels[1, 1].set(xlabel="training step")
    handles: list[Any] = [Line2D([], [], label=m, **line) for m, line in LINES.items()]
    handles.append(Patch(color="0.85", label="± standard deviation"))
    handles.append(Line2D([], [], color="0.3", label="in training mode, at the end", **DIAMOND))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, handlelength=3)
    figure.savefig(output, format="png")


def _draw_panel(panel: Any, scenario: Scenario, results: Results) -> None:
    for i, m in enumerate(scenario.methods):
        runs, color = results[scenario.name, m], LINES[m]["color"]
        steps, curves = runs[0].steps, 100 * np.array([r.curve for r in runs])
        mean, std = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(runs) - 1))
        panel.plot(steps, mean, **LINES[m])
        panel.fill_between(steps, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
        as_trained = 100 * np.mean([r.training_mode for r in runs])
        panel.plot(steps[-1] * (1.05 + 0.05 * i), as_trained, color=color, **DIAMOND)
    panel.axvline(steps[-1] * 1.02, color="0.8", linewidth=1)
    panel.set(xlim=(0, steps[-1] * 1.18), xticks=np.linspace(0, steps[-1], 6).round())
    panel.set_title(f"{scenario.name}\n", loc="left", fontweight="bold")
    panel.text(0, 1.02, scenario.batches, transform=panel.transAxes, fontsize=9, color="0.35")
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
