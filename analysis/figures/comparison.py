"""The figures of two studies side by side: both fronts, and a metric at the positions they share."""

import math
from typing import Any

import plotly.graph_objects as go

from analysis.stats.comparison import Comparison, Measured
from analysis.figures.front import front_step
from analysis.page.gallery import Plot, page_plot
from analysis.figures.style import ACCENT, BLUE, INK, TITLES, hover_text, styled_figure
from analysis.stats.pareto import comparable, pareto_front
from analysis.stats.table import by_setting
from analysis.figures.thinning import thinned
from analysis.stats.wording import escaped, plural

MAX_MARKS = 400
"""Settings of a study in the figure of both fronts at most."""
LOOKS = ((BLUE, "circle"), (ACCENT, "diamond"))
"""Colour and symbol here and there."""


def comparison_plots(found: Comparison) -> list[Plot]:
    """Those that the two studies can fill."""
    y = _second(found)
    plots = []
    if any(len(comparable(by_setting(study.results), ("reliability", y))) for study in (found.here, found.there)):
        plots.append(
            page_plot(
                "compared-fronts", "Both fronts", fronts_figure(found, y),
                "Full marks are on their study's front, the ring is its pick. Up and to the right is better."
                + _left_out(found, y),
                f"Scatter of reliability and {TITLES[y]} of both studies with their fronts.",
            )
        )  # fmt: skip
    metric = "drift_kl" if "drift_kl" in found.metrics else "generalization"
    if len(found.shared) > 1 and metric in found.metrics:
        plots.append(
            page_plot(
                "compared-positions", f"{TITLES[metric].capitalize()} at the shared positions",
                shared_figure(found, metric),
                "Each mark is a position, at its best setting in each study. On the dashed line the two agree.",
                f"{TITLES[metric].capitalize()} of {plural(len(found.shared), 'position')} in both studies; the table"
                " holds the values.",
            )
        )  # fmt: skip
    return plots


def _left_out(found: Comparison, y: str) -> str:
    """What the caption says of marks that are not drawn."""
    counts = [len(comparable(by_setting(study.results), ("reliability", y))) for study in (found.here, found.there)]
    said = [f"{MAX_MARKS} of {count:,} settings of {name}" for name, count in zip(found.names, counts, strict=True) if count > MAX_MARKS]
    return f" Drawn are about {' and '.join(said)}, picked at random beside front and pick." if said else ""


def _second(found: Comparison) -> str:
    """What reliability is shown against: the change of capability where the items are the same."""
    return "capability_change" if "capability_change" in found.metrics else "generalization"


def fronts_figure(found: Comparison, y: str) -> go.Figure:
    """Reliability against another metric, a colour and a symbol per study, the fronts as steps."""
    form = ".1%" if y == "capability_change" else ".0%"
    figure = styled_figure(
        height=480,
        xaxis={"title": {"text": TITLES["reliability"]}, "tickformat": ".0%"},
        yaxis={"title": {"text": TITLES[y]}, "tickformat": form},
    )
    sides: tuple[tuple[str, Measured], ...] = tuple(zip(found.names, (found.here, found.there), strict=True))
    for (name, study), (colour, symbol), pick in zip(sides, LOOKS, found.picks, strict=True):
        settings = comparable(by_setting(study.results), ("reliability", y))
        front = pareto_front(settings, ("reliability", y))
        drawn = thinned(list(settings["trial_id"]), {*front.trial_ids, *((pick.trial_id,) if pick else ())}, MAX_MARKS)
        points = settings[settings["trial_id"].isin(drawn)].to_dict("records")
        on = [row["trial_id"] in front.trial_ids for row in points]
        corners = front_step(front, [(row["reliability"], row[y]) for row in points])
        figure.add_scatter(
            x=[a for a, _ in corners], y=[b for _, b in corners], mode="lines", hoverinfo="skip", showlegend=False,
            line={"color": colour, "width": 1.8, "dash": "dot"},
        )  # fmt: skip
        figure.add_scatter(
            x=[round(row["reliability"], 5) for row in points], y=[round(row[y], 5) for row in points],
            mode="markers", name=escaped(name),
            text=[f"{escaped(name)}<br>{hover_text(row)}" for row in points], hovertemplate="%{text}<extra></extra>",
            marker={
                "color": colour, "symbol": symbol, "size": [12 if known else 8 for known in on],
                "opacity": [1.0 if known else 0.35 for known in on], "line": {"width": 0.8, "color": INK},
            },
        )  # fmt: skip
        for row in points:
            if pick is not None and row["trial_id"] == pick.trial_id:
                figure.add_scatter(
                    x=[row["reliability"]], y=[row[y]], mode="markers", hoverinfo="skip", showlegend=False,
                    marker={"symbol": "circle-open", "size": 24, "color": colour, "line": {"width": 3}},
                )  # fmt: skip
    return figure


def shared_figure(found: Comparison, metric: str) -> go.Figure:
    """A metric here (x) and there (y), logarithmic for drift."""
    pairs = [(a, b) for a, b in found.shared if math.isfinite(a[metric]) and math.isfinite(b[metric])]
    drift = metric == "drift_kl"
    pairs = [(a, b) for a, b in pairs if not drift or min(a[metric], b[metric]) > 0]
    values = [row[metric] for pair in pairs for row in pair] or [0.1, 1.0]
    low, high = min(values), max(values)
    pad = 1.15 if drift else 0.03
    ends = [low / pad, high * pad] if drift else [low - pad, high + pad]
    axis: dict[str, Any] = {"type": "log", "dtick": "D2", "tickformat": "~g"} if drift else {"tickformat": ".0%"}
    unit = ", nats" if drift else ""
    figure = styled_figure(
        height=440,
        xaxis=axis | {"title": {"text": f"{TITLES[metric]}{unit}: {escaped(found.names[0])}"}},
        yaxis=axis | {"title": {"text": escaped(found.names[1])}},
    )
    figure.add_scatter(
        x=ends, y=ends, mode="lines", hoverinfo="skip", showlegend=False,
        line={"color": "#8a94a3", "width": 1.2, "dash": "dash"},
    )  # fmt: skip
    picks = [pick.position if pick else None for pick in found.picks]
    names = [f"{a['layer']}.{escaped(a['module'])}" for a, _ in pairs]
    named = [
        f"<b>{name}</b>" if f"{a['layer']}.{a['module']}" == picks[0] or f"{b['layer']}.{b['module']}" == picks[1] else ""
        for name, (a, b) in zip(names, pairs, strict=True)
    ]
    below = [f"{b['layer']}.{b['module']}" == picks[1] for _, b in pairs]  # picks are often close to each other
    form = ".3g" if drift else ".1%"
    figure.add_scatter(
        x=[a[metric] for a, _ in pairs], y=[b[metric] for _, b in pairs], mode="markers+text", showlegend=False,
        customdata=[a["trial_id"] for a, _ in pairs], text=named,
        textposition=["bottom center" if known else "top center" for known in below], hovertext=names,
        hovertemplate=f"<b>%{{hovertext}}</b><br>%{{x:{form}}} and %{{y:{form}}}<extra></extra>",
        marker={
            "size": 10, "color": [float(a["depth"]) for a, _ in pairs], "colorscale": "Cividis", "cmin": 0, "cmax": 1,
            "line": {"width": 0.8, "color": INK},
        },
    )  # fmt: skip
    return figure
