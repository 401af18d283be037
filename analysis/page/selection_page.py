"""The page of a selection: the position to use, what to expect there, what else was close, and how it was found."""

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from analysis.stats.choice import Outcome, intervals
from analysis.figures.front import SYMBOLS
from analysis.page.gallery import Plot, packed_plotly, page_plot, page_template
from analysis.figures.style import ACCENT, INK, styled_figure
from analysis.stats.pick import RULE
from analysis.stats.table import Z95
from analysis.stats.wording import (
    ABSENT,
    change_with_interval,
    escaped,
    number,
    percent,
    plural,
    points,
    points_interval,
    share_interval,
)


COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8a94a3")
"""Of modules; told apart by colour-blind readers, and none is that of the pick."""


@dataclass(frozen=True)
class Ranked:
    """A setting measured at the highest level."""

    position: str
    layer: int
    module: str
    learning_rate: float
    seeds: int
    outcome: Outcome
    chance: float
    """That it is the one to use."""


@dataclass(frozen=True)
class RungRun:
    """A run as its rung shows it."""

    position: str
    learning_rate: float
    seed: int
    in_full: bool
    """On all edits."""
    outcome: Outcome | None
    """None for a run that did not finish."""
    fate: str
    """What became of the position."""
    kept: bool


def expectations(outcome: Outcome, edits: int) -> list[tuple[str, str]]:
    """(name, value with its 95% interval) of what an edit there does."""
    found = intervals(outcome, edits)

    def share(name: str, of: str) -> str:
        value, low, high = found[name]
        return f"{percent(value)} of the {of} [{100 * low:.0f}%, {100 * high:.0f}%]"

    drift = [number(value) for value in found["drift_kl"]]
    return [
        ("Reliability", share("reliability", "edits")),
        ("Generalization", share("generalization", "rephrased")),
        ("Capability change", change_with_interval(*found["capability_change"])),
        ("Drift", f"{drift[0]} nats per token [{drift[1]}, {drift[2]}]"),
    ]


def render_selection(
    about: Mapping[str, Any],
    ranking: Sequence[Ranked],
    rungs: Sequence[tuple[str, str, Sequence[RungRun]]],
    probe: Sequence[tuple[int, str, float]],
    *,
    plotly_js: bool = True,
) -> str:
    """The page as HTML.

    about: model, pick (position and rate, or None), lead, command, settings, level_edits (int), how, facts (pairs),
    settings_yaml, caveat.
    ranking: the one to use first. rungs: (name, why, runs). probe: (layer, module, disturbance) of every position.
    """
    plots = _plots(ranking, rungs, probe)
    best = ranking[0] if ranking else None
    return page_template("selection.html").render(
        model=about["model"],
        lead=about["lead"],
        pick=about["pick"],
        settings=about["settings"],
        rule=RULE if best else None,
        command=about["command"],
        caveat=about.get("caveat"),
        expected=expectations(best.outcome, about["level_edits"]) if best else [],
        level_edits=plural(about["level_edits"], "edit"),
        ranking=[_row(setting, about["level_edits"]) for setting in ranking],
        plots=plots,
        how=about["how"],
        rungs=[{"name": name, "why": why, "runs": [_run_row(run) for run in runs]} for name, why, runs in rungs],
        facts=about["facts"],
        settings_yaml=about.get("settings_yaml"),
        plotly_js=packed_plotly() if plotly_js and plots else None,
    )


def _row(setting: Ranked, edits: int) -> dict[str, Any]:
    outcome, known = setting.outcome, intervals(setting.outcome, edits)
    values = {
        "reliability": (percent(outcome.reliability), share_interval(*known["reliability"][1:])),
        "generalization": (percent(outcome.generalization), share_interval(*known["generalization"][1:])),
        "change": (points(outcome.capability_change), points_interval(*known["capability_change"][1:])),
        "drift": (number(outcome.drift), ""),
    }
    if not math.isfinite(outcome.drift):
        values = dict.fromkeys(values, (ABSENT, "")) | {"drift": ("diverged", "")}
    return {
        "position": setting.position,
        "rate": number(setting.learning_rate),
        "chance": percent(round(setting.chance, 3)),
        "values": list(values.values()),
        "seeds": str(setting.seeds),
    }


def _run_row(run: RungRun) -> dict[str, Any]:
    outcome = run.outcome
    absent = {"reliability": "not finished", "generalization": "", "drift": ""}
    measured = outcome and {
        "reliability": percent(outcome.reliability),
        "generalization": percent(outcome.generalization),
        "drift": number(outcome.drift) if math.isfinite(outcome.drift) else "diverged",
    }
    return {
        "position": run.position,
        "rate": number(run.learning_rate),
        "seed": str(run.seed),
        "fate": run.fate,
        "kept": run.kept,
        **(measured or absent),
    }


def _plots(
    ranking: Sequence[Ranked],
    rungs: Sequence[tuple[str, str, Sequence[RungRun]]],
    probe: Sequence[tuple[int, str, float]],
) -> list[Plot]:
    plots = []
    tried = {run.position for _, _, runs in rungs for run in runs}
    in_full = {run.position for _, _, runs in rungs for run in runs if run.in_full}
    if probe:
        plots.append(
            page_plot(
                "probe", "What the probe sees: disturbance by layer and module",
                probe_figure(probe, tried, in_full, ranking[0].position if ranking else None),
                "What learning the edits there would disturb, from gradients of the unedited model; dark is gentle. Dots:"
                " raced; large dots: run on all edits; ring: the pick.",
                f"Heat map of the probe's disturbance over {plural(len(probe), 'position')}.",
            )
        )  # fmt: skip
    if len(ranking) > 1:
        plots.append(
            page_plot(
                "trade", "Generalization against drift of the finalists", trade_figure(ranking),
                "Up and to the left is better; bars are 95% intervals.",
                f"Scatter of {plural(len(ranking), 'setting')}; the table above holds the values.",
            )
        )  # fmt: skip
    return plots


def probe_figure(
    probe: Sequence[tuple[int, str, float]], tried: AbstractSet[str], in_full: AbstractSet[str], pick: str | None
) -> go.Figure:
    """Heat map of log disturbance, with dots on the positions that were run, larger ones where it was on all edits."""
    layers, modules = sorted({layer for layer, _, _ in probe}), list(dict.fromkeys(module for _, module, _ in probe))
    found = {(layer, module): value for layer, module, value in probe if 0 < value < math.inf}
    figure = styled_figure(
        height=134 + 34 * max(2, len(modules)),
        xaxis={
            "title": {"text": "layer"}, "showgrid": False, "dtick": max(1, math.ceil(len(layers) / 16)),
            "range": [min(layers) - 0.5, max(layers) + 0.5],
        },
        yaxis={"showgrid": False, "autorange": "reversed", "ticklabelstandoff": 6, "type": "category"},
        margin={"l": 10, "r": 10, "t": 34, "b": 44},  # room for the buttons
        showlegend=False,
    )  # fmt: skip
    figure.add_heatmap(
        x=layers,
        y=[escaped(module) for module in modules],
        z=[[math.log10(found[layer, m]) if (layer, m) in found else None for layer in layers] for m in modules],
        text=[[f"{layer}.{escaped(m)}: {number(found.get((layer, m), math.nan))}" for layer in layers] for m in modules],
        hovertemplate="%{text}<extra></extra>",
        colorscale="Cividis",
        xgap=1,
        ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0, "nticks": 4, "tickprefix": "10<sup>", "ticksuffix": "</sup>"},
    )
    for size, chosen in ((5, tried - in_full), (10, in_full)):
        figure.add_scatter(
            x=[int(p.partition(".")[0]) for p in sorted(chosen)],
            y=[escaped(p.partition(".")[2]) for p in sorted(chosen)],
            mode="markers",
            marker={"size": size, "color": "white", "line": {"color": INK, "width": 1}},
            hoverinfo="skip",
        )
    if pick:
        layer, _, module = pick.partition(".")
        figure.add_scatter(
            x=[int(layer)],
            y=[escaped(module)],
            mode="markers",
            marker={"size": 18, "symbol": "circle-open", "color": ACCENT, "line": {"width": 3}},
            hoverinfo="skip",
        )
    return figure


def trade_figure(ranking: Sequence[Ranked]) -> go.Figure:
    """Drift to the right, generalization upwards."""
    figure = styled_figure(
        height=420,
        xaxis={"title": {"text": "drift, nats per token"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "generalization"}, "tickformat": ".0%"},
    )
    modules = list(dict.fromkeys(setting.module for setting in ranking))
    shown = [setting for setting in ranking if math.isfinite(setting.outcome.drift)]
    for place, module in enumerate(modules):
        mine = [setting for setting in shown if setting.module == module]
        figure.add_scatter(
            x=[s.outcome.drift for s in mine],
            y=[s.outcome.generalization for s in mine],
            error_x={"array": [Z95 * s.outcome.drift_se for s in mine], "thickness": 1, "width": 0},
            error_y={"array": [Z95 * s.outcome.generalization_se for s in mine], "thickness": 1, "width": 0},
            mode="markers+text",
            text=[str(s.layer) for s in mine],
            textposition="top right",
            name=escaped(module),
            marker={"size": 11, "symbol": SYMBOLS[place % len(SYMBOLS)], "color": COLOURS[place % len(COLOURS)]},
            hovertext=[
                f"<b>{escaped(s.position)}</b> rate {number(s.learning_rate)}<br>reliability"
                f" {percent(s.outcome.reliability)}, drift {number(s.outcome.drift)}"
                for s in mine
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    if ranking and shown and ranking[0] is shown[0]:
        figure.add_scatter(
            x=[shown[0].outcome.drift],
            y=[shown[0].outcome.generalization],
            mode="markers",
            name="pick",
            marker={"size": 20, "symbol": "circle-open", "color": ACCENT, "line": {"width": 3}},
            hoverinfo="skip",
        )
    return figure
