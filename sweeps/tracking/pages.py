"""What people see of a study in MLflow: names, descriptions, links, and a prepared view of the experiment.

Pure functions: nothing here talks to MLflow.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from sweeps.study.trial_types import TrialConfig, TrialResult

VIEW = "locft"
"""Key of the prepared view, part of the links."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
"""Experiment tag from which MLflow's pages take a shared view (columns, order, charts)."""
COMPARED = 100
"""Most runs in one comparison: beyond, the page gets slow and the address too long."""

_PIPELINES = {"breadth_first": "bf", "depth_first": "df"}
_COLUMNS = [
    *("params.`layer`", "params.`module`"),
    *(f"metrics.`{key}`" for key in ("reliability", "generalization", "locality", "capability", "capability_change")),
    *(f"metrics.`{key}`" for key in ("drift_kl", "seconds_per_edit")),
    *(f"params.`{key}`" for key in ("learning_rate", "batch_size", "pipeline", "seed")),
    "tags.`locft.pick`",
]


def run_name(config: TrialConfig) -> str:
    """Short and readable, such as "22.mlp_down bf b10 lr0.004 s0"."""
    pipeline = _PIPELINES.get(config.pipeline, config.pipeline)
    return f"{config.position} {pipeline} b{config.batch_size} lr{config.learning_rate:g} s{config.seed}"


def trial_note(result: TrialResult, run_id: str) -> str:
    """The description on a trial's page, in markdown."""
    config, metrics = result.config, result.metrics
    setting = (
        f"**{config.position}** (layer {config.layer} of {config.layers}), {config.pipeline.replace('_', '-')}, "
        f"{config.batch_size} edits a step, learning rate {config.learning_rate:g}, seed {config.seed}"
    )
    if result.retried:
        setting += f". Tried again after: {'; '.join(result.retried)}"
    if result.status == "failed":
        return f"{setting}.\n\nFailed: {result.error}"
    figures = [f"{key} {metrics[key]:.3f}" for key in ("reliability", "generalization", "locality") if key in metrics]
    if "capability" in metrics:
        change = f" ({metrics['capability_change']:+.3f})" if "capability_change" in metrics else ""
        figures.append(f"capability {metrics['capability']:.3f}{change}")
    if "drift_kl" in metrics:
        figures.append(f"drift {metrics['drift_kl']:.3f} nats per token")
    found = ", ".join(figures) or "no metrics"
    return f"{setting}.\n\nFound: {found}.\n\nRepeat it: `locft edit MODEL --from-run {run_id} --out edited`"


def experiment_note(name: str, experiment_id: str, study_run: str | None = None) -> str:
    """The description on top of the experiment's page, in markdown: the links first, as the page shows one line of it."""
    return (
        f"{_linked(links(experiment_id, study_run))}\n\n"
        f"Study **{name}**: at which position does localized fine-tuning edit this model best, and what does it cost in"
        f" general capability? One run is one trial; the run named {name} holds the dashboard, the table and the answer."
    )


def study_note(text: str, experiment_id: str, study_run: str) -> str:
    """The description on the page of the study's run: what it says, and the links."""
    return f"{text}\n\n{_linked(links(experiment_id, study_run))}"


def _linked(found: Mapping[str, str]) -> str:
    titles = {"dashboard": "Dashboard", "table": "Table of the trials", "charts": "Charts of the trials"}
    return " · ".join(f"[{title}]({found[key]})" for key, title in titles.items() if key in found)


def links(
    experiment_id: str, study_run: str | None = None, trial_runs: Sequence[str] = (), base: str = ""
) -> dict[str, str]:
    """Addresses of the pages that matter, as fragments ("#/experiments/...") or, with `base`, complete.

    table and charts: the trials in the prepared view. compare: up to 100 of `trial_runs` side by side, with parallel
    coordinates. study and dashboard: the study's run and the HTML report in it.
    """
    base, experiment = base.rstrip("/") + "/" if base else "", f"#/experiments/{experiment_id}"
    training = "workflowType=machine_learning"  # else a fresh browser shows the menu for agents
    prepared = f"{experiment}/runs?viewStateShareKey={VIEW}&{training}"
    found = {"table": f"{prepared}&compareRunsMode=TABLE", "charts": f"{prepared}&compareRunsMode=CHART"}
    if study_run:
        found["study"] = f"{experiment}/runs/{study_run}?{training}"
        found["dashboard"] = f"{experiment}/runs/{study_run}/artifacts/dashboard.html?{training}"
    if trial_runs:
        runs = quote(json.dumps(list(trial_runs[:COMPARED]), separators=(",", ":")))
        found["compare"] = f"#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment_id]))}&{training}"
    return {key: base + address for key, address in found.items()}


def view_state() -> str:
    """The prepared view: the trials only, best first, the columns that matter, and charts of the trade-off."""
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
    common = {"deleted": False, "isGenerated": False, "runsCountToCompare": COMPARED, "metricSectionId": section}
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
