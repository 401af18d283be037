"""Selection policies replayed against the exhaustive table: what each finds at a share of the grid's cost, and how far off.

    python tests/benchmarks/replay.py [--seeds 24] [--figure replay.html]
    python tests/benchmarks/replay.py --every 2 --modules mlp_down,mlp,attn --equal-costs     a small grid, no cheap positions

One replay takes the scores of one draw of edits at each lower level, one seed of the policy and one share of the cost;
full runs are the rows of the table. Costs are those of the table, smoothed over depth, so that a busy minute does not
decide. The learning rates are the table's (one a module, tuned), for all policies alike; another rate is not tried.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from analysis.figures.front import SYMBOLS
from analysis.figures.style import ACCENT, styled_figure
from analysis.stats.pick import ranked
from analysis.stats.table import by_setting, results_frame
from sweeps.select.policy import Candidate, Run, Score, leading

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, this file does not find its neighbours by itself

from tests.benchmarks.exhaustive_table import LAYERS, MODULES  # noqa: E402
from tests.benchmarks.policies import POLICIES, replayed  # noqa: E402
from tests.benchmarks.race import ReplayTask, Scout, in_full, race  # noqa: E402

LEVELS = {"level0": 10, "level1": 30, "full": 100}
"""Part of the table -> number of edits; the race's scouts run on the parts before `full`."""
SHARES = (0.05, 0.1, 0.2)
REGRETS = ("drift", "capability", "capability lost", "drift against the rule's", "generalization against the rule's")
OURS = "survey"
UNPROBED = "survey without the probe"
COLOURS = qualitative.Safe
"""Of the other policies, by their place."""
SEEDS = 24
"""Of each policy; each has a draw of the edits that the probe looked at. A race also has every pair of draws of scouts."""


class Table:
    """The exhaustive table as a world in which policies run."""

    def __init__(self, table: pd.DataFrame, probe: pd.DataFrame):
        full = table[table.part == "full"]
        self.rates = full.groupby("module").learning_rate.first().to_dict()
        self.layers = LAYERS
        twice = [min(2 * self.rates.get(module, 0.0), table.learning_rate.max()) for module in table.module]
        wanted = np.where(table.part == "level0", twice, [self.rates.get(module, 0.0) for module in table.module])
        rows = table[table.learning_rate == wanted]
        rows = pd.concat([rows[rows.part != "seeds"], rows[rows.part == "seeds"].assign(part="full")])
        rows = rows.assign(status="done", layers=self.layers, n_edits=rows.part.map(LEVELS).fillna(40))
        rows["seconds_per_edit"] = rows.train_seconds / rows.n_edits
        rows["trial_id"] = [f"{r.part} {r.sample} {r.layer}.{r.module} seed {r.seed}" for r in rows.itertuples()]
        self.rows = {
            (row["part"], row["sample"], row["layer"], row["module"], row["seed"]): row
            for row in rows.to_dict("records")
        }
        self.costs = {part: self._costs(rows[rows.part == part]) for part in LEVELS}
        if not self.costs["level1"]:  # not run yet: by the share of the edits
            share = LEVELS["level1"] / LEVELS["full"]
            self.costs["level1"] = {module: share * line for module, line in self.costs["full"].items()}
        known = {(layer, module) for part, _, layer, module, _ in self.rows if part == "full"}
        self.probes = [
            tuple(
                Candidate(r.layer, r.module, r.disturbance, r.gain)
                for r in rows.itertuples()
                if (r.layer, r.module) in known
            )
            for _, rows in probe.groupby("sample")
        ]
        """Candidates by the draw of edits that the probe looked at."""
        full_rows = [row for (part, *_), row in self.rows.items() if part == "full"]
        self.truth = {
            (row["layer"], row["module"]): row
            for row in ranked(by_setting(results_frame(full_rows))).to_dict("records")
        }
        """By layer and module the means over the seeds, the setting to use first in the first place."""
        self.grid = sum(self.seconds(Run(c.layer, c.module, 0.0)) for c in self.probes[0])

    def _costs(self, rows: pd.DataFrame) -> dict[str, np.ndarray]:
        """Module -> coefficients of a line over the layers above; robust against minutes in which the machine was busy."""
        seconds = rows.train_seconds + rows.evaluate_seconds + rows.capability_seconds
        fits = {}
        for module, mine in rows.groupby("module"):
            above, cost = self.layers - mine.layer, seconds[mine.index]
            keep = np.ones(len(mine), dtype=bool)
            for _ in range(5):
                line = np.polyfit(above[keep], cost[keep], 1)
                off = cost - np.polyval(line, above)
                keep = (off.abs() <= 2.5 * off[keep].abs().median() + 1e-9).to_numpy()
            fits[module] = line
        return fits

    def seconds(self, run: Run) -> float:
        fits = self.costs[part_of(run)]
        line = fits.get(run.module, next(iter(fits.values())))
        return float(max(0.5, np.polyval(line, self.layers - run.layer)))

    def score(self, run: Run, samples: tuple[int, int]) -> Score:
        part = part_of(run)
        sample = samples[run.level] if isinstance(run, Scout) else 0
        found = self.rows.get((part, sample, run.layer, run.module, run.seed))
        if found is None:  # a seed that the table lacks: the first one again
            found = self.rows[part, sample, run.layer, run.module, 0]
        return Score(found, self.seconds(run))

    def task(self, share: float, seed: int, probe: bool = True) -> ReplayTask:
        candidates = self.probes[seed % len(self.probes)]
        if not probe:
            order = np.random.default_rng(seed).permutation(len(candidates))
            candidates = tuple(replace(c, disturbance=float(place)) for c, place in zip(candidates, order, strict=True))
        return ReplayTask(
            candidates,
            self.layers,
            self.seconds,
            lambda candidate: self.rates[candidate.module],
            share * self.grid,
            concurrent=2,
            other_rate=False,
            seed=seed,
            levels=tuple(LEVELS.values())[:-1],
        )

    def draws(self, seeds: int) -> list[tuple[int, int]]:
        """The pairs of draws at the lower levels that every race with these seeds can be replayed on."""
        first = [
            sample for sample in (1, 2, 3) if all(("level0", sample, *place, 0) in self.rows for place in self.truth)
        ]
        asked = {sample: semifinalists(self, sample, seeds) for sample in first}
        return [
            (sample, second)
            for sample, second in itertools.product(first, (1, 2))
            if all(("level1", second, *place, 0) in self.rows for place in asked[sample])
        ]

    def best(self) -> dict[str, Any]:
        """What the rule picks of the whole table, as a row of `by_setting`."""
        return next(iter(self.truth.values()))


def part_of(run: Run) -> str:
    """The part of the table that has the run."""
    return list(LEVELS)[run.level] if isinstance(run, Scout) else "full"


def semifinalists(table: Table, sample: int, seeds: int = SEEDS) -> set[tuple[int, str]]:
    """Layer and module of all positions that a race on this draw of scouts can ask for at the middle level."""
    found = set()
    for share, seed in itertools.product(SHARES, range(seeds)):
        policy = race(table.task(share, seed))
        scouts = next(policy)
        following = policy.send({run: table.score(run, (sample, 1)) for run in scouts.runs})
        found |= {(run.layer, run.module) for run in following.runs if part_of(run) == "level1"}
    return found


def volume(rows: Iterable[Mapping[str, Any]]) -> float:
    """Of reliability, generalization and what is left of the predictions, exp(-drift), from the origin."""
    points = np.array([[row["reliability"], row["generalization"], math.exp(-row["drift_kl"])] for row in rows])
    return float(moocore.hypervolume(points, ref=(0, 0, 0), maximise=True))


def regrets(table: Table, pick: Mapping[str, Any]) -> dict[str, float]:
    """Against the best of the table at the pick's reliability or more, up to a standard error."""
    least = pick["reliability"] - pick["reliability_se"]
    equal = [row for row in table.truth.values() if row["reliability"] >= least]
    ruled, change = table.best(), pick["capability_change"]
    return {
        "drift": pick["drift_kl"] - min(row["drift_kl"] for row in equal),
        "capability": max(row["capability_change"] for row in equal) - change,
        "capability lost": max(0.0, -change) - min(max(0.0, -row["capability_change"]) for row in equal),
        "drift against the rule's": pick["drift_kl"] - ruled["drift_kl"],
        "generalization against the rule's": ruled["generalization"] - pick["generalization"],
    }


def replays(table: Table, seeds: int) -> pd.DataFrame:
    everything = volume(table.truth.values())
    rows = []
    draws = table.draws(seeds)
    for name, share, seed, samples in itertools.product([*POLICIES, UNPROBED], SHARES, range(seeds), draws):
        policy = POLICIES[OURS if name == UNPROBED else name]
        if name != "race" and samples != draws[0]:
            continue  # they run nothing at the lower levels
        _rungs, scores = replayed(
            policy, table.task(share, seed, name != UNPROBED), lambda run, samples=samples: table.score(run, samples)
        )
        full = in_full(scores)
        run = leading(full)[0]
        pick = table.truth[run.layer, run.module]
        cost = sum(score.seconds for score in scores.values()) / table.grid
        rows.append(
            {"policy": name, "share": share, "seed": seed, "draw": str(samples), "position": run.position, "cost": cost,
             "volume": volume(table.truth[r.layer, r.module] for r in full) / everything, **regrets(table, pick)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    groups = found.groupby(["share", "policy"], sort=False)
    return groups[["cost", *REGRETS, "volume"]].mean().assign(replays=groups.size(), worst_drift=groups["drift"].max())


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
    drawn.update_yaxes(rangemode="tozero", gridcolor="#e6e9ee")
    drawn.update_yaxes(tickformat=".0%", col=2)
    return drawn


def _chosen(rows: pd.DataFrame, options: argparse.Namespace) -> pd.DataFrame:
    """The rows of the small grid that the options name."""
    modules = options.modules.split(",") if options.modules else MODULES
    return rows[(rows.layer % options.every == 0) & rows.module.isin(modules)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--figure", type=Path, help="HTML file of the comparison's figure")
    parser.add_argument("--every", type=int, default=1, help="take every nth layer only")
    parser.add_argument("--modules", help="take these only, separated by commas")
    parser.add_argument("--equal-costs", action="store_true", help="as if a run cost the same at every position")
    options = parser.parse_args()
    table = Table(*(_chosen(pd.read_csv(HERE / name), options) for name in ("table.csv", "probe.csv")))
    if options.equal_costs:
        table.costs = {part: dict.fromkeys(lines, np.array([0.0, 60.0])) for part, lines in table.costs.items()}
        table.grid = sum(table.seconds(Run(c.layer, c.module, 0.0)) for c in table.probes[0])
    best = table.best()
    said = ", ".join(
        f"{name} {best[name]:.3f}" for name in ("reliability", "generalization", "capability_change", "drift_kl")
    )
    print(f"{len(table.truth)} positions, grid {table.grid / 3600:.1f} worker hours")
    print(f"the rule picks {best['layer']}.{best['module']}: {said}")
    with pd.option_context("display.width", 250, "display.max_columns", 20, "display.float_format", "{:.3f}".format):
        found = replays(table, options.seeds)
        print(summary(found))
    if options.figure:
        figure(found).write_html(options.figure, include_plotlyjs=True)


if __name__ == "__main__":
    main()
