"""Selection policies replayed against tables of full runs: what each finds at a share of the grid's cost, and how far off.

    python tests/benchmarks/replay.py [TABLE ...] [--seeds 24] [--figure replay.html] [--diagram chances.html]
        [--every 2] [--modules mlp_down,mlp] [--leave-out model|data]

A table is a model on a data set (`tables/NAME.csv`, and `NAME.probe.csv` with one or several draws of edits for the probe;
`full_table.py` makes both); without names, all there are. One replay takes a draw of the probe, and if there is only one, four
in five of the positions, drawn anew; one seed of the policy; one share of the cost. The learning rates are the table's for all
policies alike; another rate is not tried. Costs are those of the table, smoothed over depth, so that a busy minute does not
decide.

The survey expects of a new model what earlier ones showed: the effects in `sweeps.select.belief.SCALES`. With --leave-out they
are those of the tables of other models (or data sets) alone, so that it is judged on one that it knows nothing of. It is told
the probe's scores where training is with Adam, as in the product.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from analysis.figures.front import SYMBOLS
from analysis.figures.style import ACCENT, GRID, MUTED, styled_figure
from analysis.stats.pick import DRIFT_MARGIN, ranked
from analysis.stats.table import by_setting, results_frame, standard_error, wilson_interval
from sweeps.select.belief import GENERALIZATION_MARGIN, SCALES, Place, features
from sweeps.select.policy import Candidate, Run, Score, chance_elsewhere, leading

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, this file does not find its neighbours by itself

from tests.benchmarks.policies import POLICIES, ReplayTask, replayed  # noqa: E402

TABLES = HERE / "tables"
SHARES = (0.05, 0.1, 0.2)
REGRETS = ("drift", "capability", "capability lost", "drift against the rule's", "generalization against the rule's")
OURS = "survey"
COLOURS = qualitative.Safe
"""Of the other policies, by their place."""
SEEDS = 24
"""Replays of each policy."""
KEPT = 0.8
"""Share of the positions in a replay, where the probe has one draw only."""
PLAIN = {"displayModeBar": False}
"""Of plotly: figures for pictures."""
BINS = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
"""Edges of stated chances in the table of how often they came true."""


class World:
    """Some positions of a table, in which policies run."""

    def __init__(self, rows: pd.DataFrame, probe: pd.DataFrame, equal_costs: bool = False, method: str = ""):
        """rows: of full runs. probe: one draw. Only positions of both are there. method: of the runs, "" for those with Adam, whose
        learning rate needs the probe."""
        self.method = method
        rows = probe[["layer", "module", "disturbance", "gain"]].merge(rows, on=["layer", "module"])
        rows = rows.assign(status="done")
        rows["trial_id"] = [f"{r.layer}.{r.module} rate {r.learning_rate:g} seed {r.seed}" for r in rows.itertuples()]
        self.layers = int(rows.layers.iloc[0])
        self.rows = {(r["layer"], r["module"], r["seed"]): r for r in rows.to_dict("records")}
        first = rows[rows.seed == 0]
        self.rates = {(r.layer, r.module): float(r.learning_rate) for r in first.itertuples()}
        self.candidates = tuple(Candidate(r.layer, r.module, r.disturbance, r.gain) for r in first.itertuples())
        self._lines = {} if equal_costs else self._costs(rows)
        self.grid = sum(self.seconds(Run(c.layer, c.module, 0.0)) for c in self.candidates)

    @cached_property
    def truth(self) -> dict[tuple[int, str], dict[str, Any]]:
        """By layer and module the means over the seeds, the setting to use first in the first place."""
        settings = ranked(by_setting(results_frame(list(self.rows.values()))))
        return {(row["layer"], row["module"]): row for row in settings.to_dict("records")}

    def _costs(self, rows: pd.DataFrame) -> dict[str, np.ndarray]:
        """Module -> coefficients of a line over the layers above; robust against minutes in which the machine was busy."""
        seconds = rows.train_seconds + rows.evaluate_seconds + rows.capability_seconds
        lines = {}
        for module, mine in rows.groupby("module"):
            above, cost = self.layers - mine.layer, seconds[mine.index]
            keep = np.ones(len(mine), dtype=bool)
            for _ in range(5):
                line = np.polyfit(above[keep], cost[keep], 1 if keep.sum() > 2 else 0)
                off = cost - np.polyval(line, above)
                keep = (off.abs() <= 2.5 * off[keep].abs().median() + 1e-9).to_numpy()
            lines[str(module)] = line
        return lines

    def seconds(self, run: Run) -> float:
        if not self._lines:
            return 60.0
        return float(max(0.5, np.polyval(self._lines[run.module], self.layers - run.layer)))

    def score(self, run: Run) -> Score:
        """A seed that the table lacks is the first one again."""
        place = (run.layer, run.module)
        return Score(self.rows.get((*place, run.seed)) or self.rows[*place, 0], self.seconds(run))

    def task(self, share: float, seed: int) -> ReplayTask:
        return ReplayTask(
            tuple(Candidate(c.layer, c.module) for c in self.candidates) if self.method else self.candidates,
            self.layers,
            self.seconds,
            lambda candidate: self.rates[candidate.layer, candidate.module],
            share * self.grid,
            method=self.method,
            concurrent=2,
            other_rate=False,
            seed=seed,
            probed=self.candidates,
        )

    def best(self) -> dict[str, Any]:
        """What the rule picks of everything, as a row of `by_setting`."""
        return next(iter(self.truth.values()))


def method_of(name: str) -> str:
    """Of the runs of a table; "" for those with Adam."""
    return "natural_gradient" if name.endswith("-natural") else ""


def read_table(name: str) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The full runs of a table, and the draws of its probe."""
    rows, probe = (pd.read_csv(TABLES / f"{name}{end}.csv") for end in ("", ".probe"))
    return rows, [draw for _, draw in probe.groupby("sample")]


def worlds(
    name: str, seeds: int = SEEDS, every: int = 1, modules: Sequence[str] = (), equal_costs: bool = False
) -> list[World]:
    """One for each replay of a table. every, modules: take every nth layer only, and these modules; all without."""
    rows, draws = read_table(name)
    rows = rows[(rows.layer % every == 0) & rows.module.isin(modules or rows.module.unique())]
    method = method_of(name)
    if len(draws) > 1:
        made = [World(rows, draw, equal_costs, method) for draw in draws[:seeds]]
        return [made[seed % len(made)] for seed in range(seeds)]
    places = draws[0].merge(rows[["layer", "module"]].drop_duplicates())
    drawn = (places.sample(frac=KEPT, random_state=seed) for seed in range(seeds))
    return [World(rows, some, equal_costs, method) for some in drawn]


def effects(name: str) -> dict[str, np.ndarray]:
    """Metric -> (3,) effects on it over all positions of a table, in the order of `Scale.effects`, by least squares, slightly
    held to 0."""
    rows, draws = read_table(name)
    world = World(rows, draws[0])
    places = [Place(c.layer / (world.layers - 1), c.module, c.disturbance, 1.0) for c in world.candidates]
    known = features(places)
    first = [world.rows[c.layer, c.module, 0] for c in world.candidates]
    found = {}
    for metric in ("drift_kl", "generalization"):
        values = np.array([row[metric] for row in first])
        values = np.log(values) if metric == "drift_kl" else values
        centred = known - known.mean(0)
        held = centred.T @ centred + 0.5 * np.eye(known.shape[1])
        found[metric] = np.linalg.solve(held, centred.T @ (values - values.mean()))
    return found


PARTS = {"model": 0, "data": 1}
"""A table's name begins with its model and its data set."""


def others(name: str, names: Sequence[str], left_out: str) -> list[str]:
    """The tables of other models, or of other data sets, with the same method. left_out: a key of `PARTS`."""
    part = PARTS[left_out]
    return [
        other
        for other in names
        if other.split("-")[part] != name.split("-")[part] and method_of(other) == method_of(name)
    ]


@contextmanager
def knowing(tables: Iterable[str]) -> Iterator[None]:
    """The survey expects the mean effects in these tables."""
    before, seen = dict(SCALES), [effects(name) for name in tables]
    for metric in seen[0]:
        means = np.mean([one[metric] for one in seen], axis=0)
        spreads = [spread for _, spread in SCALES[metric].effects]
        SCALES[metric] = replace(SCALES[metric], effects=tuple(zip(map(float, means), spreads, strict=True)))
    try:
        yield
    finally:
        SCALES.update(before)


def volume(rows: Iterable[Mapping[str, Any]]) -> float:
    """Of reliability, generalization and what is left of the predictions, exp(-drift), from the origin."""
    points = np.array([[row["reliability"], row["generalization"], math.exp(-row["drift_kl"])] for row in rows])
    return float(moocore.hypervolume(points, ref=(0, 0, 0), maximise=True))


def regrets(world: World, pick: Mapping[str, Any]) -> dict[str, float]:
    """Against the best of the world at the pick's reliability or more, up to a standard error."""
    least = pick["reliability"] - standard_error(pick, "reliability")
    equal = [row for row in world.truth.values() if row["reliability"] >= least]
    ruled, change = world.best(), pick["capability_change"]
    return {
        "drift": pick["drift_kl"] - min(row["drift_kl"] for row in equal),
        "capability": max(row["capability_change"] for row in equal) - change,
        "capability lost": max(0.0, -change) - min(max(0.0, -row["capability_change"]) for row in equal),
        "drift against the rule's": pick["drift_kl"] - ruled["drift_kl"],
        "generalization against the rule's": ruled["generalization"] - pick["generalization"],
    }


def clearly_better(best: Mapping[str, Any], pick: Mapping[str, Any]) -> bool:
    """As `sweeps.select.belief.Chances.better` has it, of rows of `World.truth`."""
    more = best["generalization"] - pick["generalization"] > GENERALIZATION_MARGIN
    return not pick["able"] or pick["drift_kl"] - best["drift_kl"] > DRIFT_MARGIN or more


def replays(name: str, replayed_in: Sequence[World]) -> pd.DataFrame:
    rows = []
    for policy, share, (seed, world) in itertools.product(POLICIES, SHARES, enumerate(replayed_in)):
        task = world.task(share, seed)
        _rungs, scores = replayed(POLICIES[policy], task, world.score)
        place = leading(scores)[0]
        pick = world.truth[place.layer, place.module]
        found = {
            "cost": sum(score.seconds for score in scores.values()) / world.grid,
            "volume": volume(world.truth[r.layer, r.module] for r in scores) / volume(world.truth.values()),
            **regrets(world, pick),
        }
        if policy == OURS:
            best = world.best()
            run = {(r.layer, r.module) for r in scores}
            elsewhere = (best["layer"], best["module"]) not in run and clearly_better(best, pick)
            found |= {"stated": chance_elsewhere(task, scores), "elsewhere": elsewhere}
        about = {"table": name, "policy": policy, "share": share, "seed": seed, "position": place.position}
        rows.append(about | found)
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    groups = found.groupby(["share", "policy"], sort=False)
    return groups[["cost", *REGRETS, "volume"]].mean().assign(replays=groups.size(), worst_drift=groups["drift"].max())


def calibration(found: pd.DataFrame) -> tuple[pd.DataFrame, float, float]:
    """How often the rule's pick of everything was elsewhere and clearly better, by the chance that the survey stated; the Brier
    score of the stated chances, and that of the base rate, the mean over all."""
    ours = found[found.policy == OURS]
    stated, came = ours.stated.astype(float), ours.elsewhere.astype(float)
    bins = pd.cut(stated, BINS, include_lowest=True)
    table = pd.DataFrame({"stated": stated, "came true": came}).groupby(bins, observed=True).mean()
    table["replays"] = bins.value_counts()
    return table, float(((stated - came) ** 2).mean()), float(((came.mean() - came) ** 2).mean())


def figure(found: pd.DataFrame) -> go.Figure:
    """Mean regret in drift and lost hypervolume by share of the cost, with 95% intervals over the replays."""
    drawn = make_subplots(1, 2, subplot_titles=("drift above the best at equal reliability, nats", "lost hypervolume"))
    for place, (name, mine) in enumerate(found.groupby("policy", sort=False)):
        colour = ACCENT if name == OURS else COLOURS[place % len(COLOURS)]
        for column, values in ((1, mine["drift"]), (2, 1 - mine["volume"])):
            groups = values.groupby(mine["share"])
            error = 1.96 * groups.std().fillna(0) / np.sqrt(groups.size())
            drawn.add_scatter(
                x=[f"{share:.0%}" for share in groups.groups],
                y=groups.mean(),
                error_y={"array": error, "thickness": 1, "width": 3},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"width": 4 if name == OURS else 1.5, "color": colour},
                marker={"size": 9, "symbol": SYMBOLS[place % len(SYMBOLS)], "color": colour},
                row=1,
                col=column,
            )
    drawn.update_layout(styled_figure(height=430).layout, margin={"l": 10, "r": 10, "t": 40, "b": 100}, width=1000)
    drawn.update_layout(legend={"orientation": "h", "y": -0.18, "yanchor": "top"})
    drawn.update_xaxes(title="share of the full grid's cost", type="category")
    drawn.update_yaxes(rangemode="tozero", gridcolor=GRID)
    drawn.update_yaxes(tickformat=".0%", col=2)
    return drawn


def diagram(found: pd.DataFrame) -> go.Figure:
    """How often what the survey stated came true, with 95% intervals and the number of replays."""
    table, brier, base = calibration(found)
    came = table["came true"]
    ends = np.array([wilson_interval(*pair) for pair in zip(came, table["replays"], strict=True)])
    drawn = styled_figure(height=430)
    drawn.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": MUTED}, name="as stated")
    drawn.add_scatter(
        x=table["stated"],
        y=came,
        error_y={"array": ends[:, 1] - came, "arrayminus": came - ends[:, 0], "thickness": 1.5},
        mode="lines+markers+text",
        text=[str(count) for count in table["replays"]],
        textposition="bottom right",
        marker={"size": 10, "color": ACCENT},
        name=f"came true (Brier score {brier:.3f}, of the base rate {base:.3f})",
    )
    drawn.update_layout(width=620, margin={"l": 10, "r": 10, "t": 40, "b": 60})
    shares = {"tickformat": ".0%", "range": [-0.02, 1.02]}
    drawn.update_xaxes(title="stated chance that a position not run is clearly better", **shares)
    drawn.update_yaxes(title="share of the replays, with their number", gridcolor=GRID, **shares)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", help="names of tables; all without")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--figure", type=Path, help="HTML file of the comparison's figure, over all tables")
    parser.add_argument("--diagram", type=Path, help="HTML file: how often stated chances came true")
    parser.add_argument("--every", type=int, default=1, help="take every nth layer only")
    parser.add_argument("--modules", type=lambda text: text.split(","), default=(), help="with commas; take these only")
    parser.add_argument("--equal-costs", action="store_true", help="as if a run cost the same at every position")
    parser.add_argument("--leave-out", choices=PARTS, help="the survey knows the tables of other models, or data, only")
    options = parser.parse_args()
    everything = []
    names = sorted(file.stem for file in TABLES.glob("*.csv") if file.suffixes == [".csv"])
    with pd.option_context("display.width", 250, "display.max_columns", 20, "display.float_format", "{:.3f}".format):
        print("effects of a standard deviation of the probe, of a late layer and of attention")
        for name in names:
            print(name, {metric: found.round(2).tolist() for metric, found in effects(name).items()})
        for name in options.tables or names:
            made = worlds(name, options.seeds, options.every, options.modules, options.equal_costs)
            best, shown = made[0].best(), ("reliability", "generalization", "capability_change", "drift_kl")
            print(f"\n{name}: {len(made[0].candidates)} positions, grid {made[0].grid / 3600:.1f} worker hours")
            said = ", ".join(f"{key} {best[key]:.3f}" for key in shown)
            print(f"the rule picks {best['layer']}.{best['module']}: {said}")
            known = others(name, names, options.leave_out) if options.leave_out else []
            with knowing(known) if known else nullcontext():
                everything.append(replays(name, made))
            print(summary(everything[-1]))
        found = pd.concat(everything)
        if len(everything) > 1:
            print("\nmean over the tables")
            print(summary(found))
        table, brier, base = calibration(found)
        print("\nstated chance that a position not run is clearly better:")
        print(f"Brier score {brier:.3f}, of the base rate {base:.3f}\n{table}")
    if options.figure:
        figure(found).write_html(options.figure, config=PLAIN)
    if options.diagram:
        diagram(found).write_html(options.diagram, config=PLAIN)


if __name__ == "__main__":
    main()
