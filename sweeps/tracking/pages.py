"""What users see of a study in MLflow: names, descriptions, links, and a prepared view of the experiment.

Nothing here makes a request.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from analysis.stats.axes import AXIS, named_axes
from analysis.stats.wording import number
from sweeps.study.trial_types import TrialConfig, TrialResult

VIEW = "locft"
"""Key of the prepared view; part of the links."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Experiment tag from which MLflow's pages take a shared view (columns, order, charts)."""
MAX_COMPARED = 100
"""Most runs in one comparison: with more, the page gets slow and the address too long."""

_PIPELINES = {"breadth_first": "bf", "depth_first": "df", "stream": "st"}
SHOWN_METRICS = ("reliability", "generalization", "locality", "capability", "capability_change", "drift_kl")
"""The metrics that say what an edit is worth: columns of the prepared view, and of a pick."""
_COLUMNS = [
    *("params.`layer`", "params.`module`"),
    *(f"metrics.`{key}`" for key in (*SHOWN_METRICS, "seconds_per_edit")),
    *(f"params.`{key}`" for key in ("learning_rate", "batch_size", "pipeline", "method", "train_formats", "seed")),
    "tags.`locft.pick`",
]


def run_name(config: TrialConfig) -> str:
    """The name of a trial's run, such as "22.mlp_down bf b10 lr0.004 s0 low_curvature"."""
    values, pipeline = config.to_dict(), _PIPELINES.get(config.pipeline, config.pipeline)
    newer = (AXIS[name] for name in named_axes([values]) if not AXIS[name].in_first_ids)
    away = "".join(f" {axis.short}{number(values[axis.name])}" for axis in newer)
    rate = f" lr{config.learning_rate:g}" if AXIS["learning_rate"].counts(values) else ""
    return f"{config.position} {pipeline} b{config.batch_size}{rate} s{config.seed}{away}"


def trial_note(result: TrialResult, run_id: str) -> str:
    """The description on a trial's page, in markdown: what its parameters and metrics do not say."""
    again = f"Retried after: {'; '.join(result.retried)}.\n\n" if result.retried else ""
    if result.status == "failed":
        return f"{again}Failed: {result.error}"
    return f"{again}Repeat it: `locft edit MODEL --from-run {run_id} --out edited`"


def experiment_note(name: str, experiment_id: str, study_run: str) -> str:
    """The description on the experiment's page, in markdown; the links come first because only one line of it is shown."""
    return (
        f"{_link_line(experiment_id, study_run)}\n\n"
        f"Study **{name}**: at which position does localized fine-tuning edit this model best, and what does it cost"
        f" in general capability? Each trial is one run; the run {name} holds the dashboard, the table and the answer."
    )


def study_note(text: str, experiment_id: str, study_run: str) -> str:
    """The description on the page of the study's run, in markdown: `text` and the links."""
    return f"{text}\n\n{_link_line(experiment_id, study_run)}"


def _link_line(experiment_id: str, study_run: str) -> str:
    titles = {"dashboard": "Dashboard", "table": "Table of the trials", "charts": "Charts of the trials"}
    addresses = links(experiment_id, study_run)
    return " · ".join(f"[{title}]({addresses[key]})" for key, title in titles.items())


def links(experiment_id: str, study_run: str, trial_runs: Sequence[str] = (), base: str = "") -> dict[str, str]:
    """Addresses of the pages that matter, as fragments ("#/experiments/...") or, with `base`, complete.

    table and charts: the trials in the prepared view. compare: up to 100 of `trial_runs` side by side, with parallel
    coordinates. study and dashboard: the study's run and the HTML report in it.
    """
    base, experiment = base.rstrip("/") + "/" if base else "", f"#/experiments/{experiment_id}"
    training = "workflowType=machine_learning"  # else a fresh browser shows the menu for agents
    prepared = f"{experiment}/runs?viewStateShareKey={VIEW}&{training}"
    found = {"table": f"{prepared}&compareRunsMode=TABLE", "charts": f"{prepared}&compareRunsMode=CHART"}
    found["study"] = f"{experiment}/runs/{study_run}?{training}"
    found["dashboard"] = f"{experiment}/runs/{study_run}/artifacts/dashboard.html?{training}"
    if trial_runs:
        runs = quote(json.dumps(list(trial_runs[:MAX_COMPARED]), separators=(",", ":")))
        found["compare"] = f"#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment_id]))}&{training}"
    return {key: base + address for key, address in found.items()}


def view_state() -> str:
    """The prepared view as JSON: the trials only, best first, the columns that matter, and charts of the trade-off."""
    reliability = {"key": "reliability", "type": "METRIC"}
    charts: list[dict[str, Any]] = [
        {"type": "SCATTER", "xaxis": {"key": "capability", "type": "METRIC"}, "yaxis": reliability},
        {"type": "SCATTER", "xaxis": {"key": "layer", "type": "PARAM"}, "yaxis": reliability},
        {
            "type": "PARALLEL",
            "selectedParams": ["layer", "module", "batch_size", "learning_rate"],
            "selectedMetrics": ["capability", "reliability"],  # the last one gives the colour
            "showAllRuns": True,
        },
        {"type": "LINE", "metricKey": "epoch_loss", "xAxisKey": "step"},
    ]
    section = "locft-trade-off"
    common = {"deleted": False, "isGenerated": False, "runsCountToCompare": MAX_COMPARED, "metricSectionId": section}
    state = {
        "searchFilter": "tags.`locft.kind` = 'trial'",
        "orderByKey": "metrics.`reliability`",
        "orderByAsc": False,
        "selectedColumns": _COLUMNS,
        "columnOrder": _COLUMNS,
        "columnWidths": {column: 100 for column in _COLUMNS},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [{**common, "uuid": f"{section}-{i}", **chart} for i, chart in enumerate(charts)],
        "compareRunSections": [
            {"uuid": section, "name": "Trade-off", "display": True, "isReordered": False, "columns": 2}
        ],
    }
    return json.dumps(state)
