"""Plans: every trial once, in an order that covers the space early, with ids that stay."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.stats.axes import AXES
from locft.errors import InputError
from sweeps.study.plan import (
    MAX_TRIALS,
    POINT,
    make_plan,
    optuna_space,
    point_of,
    study_id,
    trial_config,
    van_der_corput_order,
)
from sweeps.study.reader import load_study, ready_studies
from sweeps.study.schema import Study
from sweeps.study.trial_types import METHOD_VERSION, METHOD_VERSIONS, StudyFacts

MODULES = ("mlp_down", "mlp_up", "mlp", "attn", "layer")


def make_facts(n_layers=30, modules_by_layer=None, **changes):
    sizes = dict(parameters=134_515_008, layer_parameters=3_540_096, head_parameters=28_311_552, vocabulary=49_152)
    n_edits = changes.pop("n_edits", 100)
    return StudyFacts(
        precision="float32",
        **{
            "model_fingerprint": "model",
            "data_fingerprint": "data",
            "n_layers": n_layers,
            "modules_by_layer": modules_by_layer or {layer: MODULES for layer in range(n_layers)},
            "n_edits": n_edits,
            "n_asked": n_edits,
            "trained_parameters": {},
            "factor_bytes": {},
            "edit_tokens": 16 * n_edits,
            "evaluation_tokens": 3 * 32 * n_edits,
            **sizes,
            **changes,
        },
    )


FACTS = make_facts()
HYBRID = make_facts(8, {layer: ("attn", "mlp") if layer % 4 == 3 else ("mixer", "mlp") for layer in range(8)})


def make_study(space=None, **changes):
    return Study.model_validate({"name": "mine", "space": space or {}, **changes})


def random_study(trials, search_seed=0, **space):
    return make_study(space, search={"method": "random", "trials": trials, "seed": search_seed})


def subset(values):
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


SPACES = st.fixed_dictionaries(
    {
        "layer": subset(range(30)) | st.just("all") | st.builds(dict, every=st.integers(1, 29)),
        "module": subset(MODULES),
        "pipeline": subset(["breadth_first", "depth_first"]),
        "batch_size": subset([1, 8, 32]),
        "learning_rate": subset([1e-4, 1e-3, 0.004]),
        "loss_average": subset(["edit", "token"]),
        "method": subset(["full", "low_curvature", "lora"]),
        "curvature_strength": subset([3.0, 10.0, 30.0]),
        "rank": subset([4, 8]),
        "guard": subset(["none", "prose"]),
        "guard_weight": subset([0.5, 1.0]),
        "seed": subset([0, 1, 2]),
    }
).filter(lambda space: 30 * math.prod(len(values) for axis, values in space.items() if axis != "layer") <= MAX_TRIALS)


def told_apart(point):
    """The point without what changes nothing there."""
    known = dict(point)
    if known["method"] != "low_curvature":
        known["curvature_strength"] = 10.0
    if known["method"] != "lora":
        known["rank"] = 8
    if known["guard"] == "none":
        known["guard_weight"] = 1.0
    return tuple(known.values())


@settings(max_examples=30, deadline=None)
@given(space=SPACES)
def test_a_grid_is_the_product_of_its_axes_without_what_changes_nothing(space):
    study = make_study(space)
    plan = make_plan(study, FACTS)
    layers, axes = optuna_space(study, FACTS)["layer"], [axis for axis in POINT if axis in space]
    points = itertools.product(layers, *(space[axis] for axis in axes[1:]))
    expected = {told_apart(zip(axes, point)) for point in points}
    got = [tuple(getattr(trial, axis) for axis in axes) for trial in plan.trials]
    assert set(got) == expected and len(got) == len(expected) == plan.count
    assert len({trial.id for trial in plan.trials}) == plan.count
    assert plan.sample == plan.trials


@given(n=st.integers(1, 300), part=st.integers(1, 300))
def test_van_der_corput_order_is_even_at_every_beginning(n, part):
    order = van_der_corput_order(n)
    assert sorted(order) == list(range(n))
    part = min(part, n)
    seen = sorted(order[:part])
    gaps = [b - a for a, b in zip(seen, [*seen[1:], n], strict=True)]
    assert max(gaps) <= 4 * math.ceil(n / part)


def test_half_a_grid_has_seen_the_whole_depth_with_every_setting():
    trials = make_plan(load_study("layer-sweep"), FACTS).trials
    first = trials[: len(trials) // 2]
    layers = sorted({trial.layer for trial in first})
    assert layers[0] == 0 and layers[-1] >= 28 and max(b - a for a, b in itertools.pairwise(layers)) <= 2
    assert [trial.layer for trial in trials[::10]][:4] == [0, 16, 8, 24]
    assert len({(trial.module, trial.learning_rate) for trial in trials[:10]}) == 10


def test_seeds_repeat_the_whole_grid():
    trials = make_plan(make_study({"layer": [1, 2, 3], "seed": [7, 5]}), FACTS).trials
    assert [trial.seed for trial in trials] == [7, 7, 7, 5, 5, 5]
    assert [trial.layer for trial in trials[:3]] == [trial.layer for trial in trials[3:]]


@settings(max_examples=30, deadline=None)
@given(space=SPACES, trials=st.integers(1, 60), more=st.integers(0, 60), seed=st.integers(0, 9))
def test_a_random_plan_is_distinct_repeatable_and_goes_on_from_its_beginning(space, trials, more, seed):
    plan = make_plan(random_study(trials, seed, **space), FACTS)
    longer = make_plan(random_study(trials + more, seed, **space), FACTS)
    grid = {trial.id for trial in make_plan(make_study(space), FACTS).trials}
    ids = [trial.id for trial in plan.trials]
    assert len(set(ids)) == len(ids) == plan.count == min(trials, len(grid))
    assert set(ids) <= grid
    assert longer.trials[: plan.count] == plan.trials


def test_a_small_random_plan_is_spread_over_every_axis():
    space = {"layer": {"every": 5}, "module": ["mlp", "attn"], "learning_rate": {"log_uniform": [1e-4, 1e-1]}}
    trials = make_plan(random_study(6, **space), FACTS).trials
    assert sorted(trial.layer for trial in trials) == [0, 5, 10, 15, 20, 25]
    assert sorted(trial.module for trial in trials) == ["attn"] * 3 + ["mlp"] * 3
    thirds = {min(2, int(math.log10(trial.learning_rate) + 4)) for trial in trials}
    assert thirds == {0, 1, 2}
    assert make_plan(random_study(6, 1, **space), FACTS).trials != trials


def test_log_uniform_rates_have_three_digits_and_keep_the_bounds():
    low, high = 0.0012345, 0.0098765
    study = random_study(200, learning_rate={"log_uniform": [low, high]})
    rates = [trial.learning_rate for trial in make_plan(study, FACTS).trials]
    assert all(low <= rate <= high for rate in rates)
    assert all(rate in (low, high) or rate == float(f"{rate:.3g}") for rate in rates)
    point = {"layer": 1, "module": "mlp", "batch_size": 8}
    assert trial_config(study, FACTS, {**point, "learning_rate": 0.004321}).learning_rate == 0.00432
    listed = make_study({"learning_rate": 0.004321})
    assert trial_config(listed, FACTS, {**point, "learning_rate": 0.004321}).learning_rate == 0.004321


def test_a_narrow_continuous_axis_ends_instead_of_searching_for_ever():
    plan = make_plan(random_study(50, layer=3, learning_rate={"log_uniform": [0.001, 0.00101]}), FACTS)
    assert 1 <= plan.count <= 3


def test_a_trial_carries_everything_that_decides_its_result():
    study = make_study({"layer": 22, "batch_size": 8}, epochs=3, skip_below=0.1, stop_below=0.2, dtype="bfloat16")
    (trial,) = make_plan(study, FACTS).trials
    newer = {axis.name: axis.default for axis in AXES if not axis.in_first_ids}
    assert trial.to_dict() == newer | {
        "model_fingerprint": "model",
        "data_fingerprint": "data",
        "layers": 30,
        "layer": 22,
        "module": "mlp_down",
        "pipeline": "breadth_first",
        "batch_size": 8,
        "learning_rate": 0.004,
        "seed": 0,
        "loss_average": "edit",
        "epochs": 3,
        "skip_below": 0.1,
        "stop_below": 0.2,
        "dtype": "bfloat16",
        "precision": "float32",
        "method_version": METHOD_VERSION,
    }


def test_a_method_with_other_results_than_before_has_trials_of_its_own():
    plan = make_plan(make_study({"method": ["full", "natural_gradient"]}), FACTS)
    assert {trial.method: trial.method_version for trial in plan.trials} == {
        "full": METHOD_VERSION,
        "natural_gradient": METHOD_VERSIONS["natural_gradient"],
    }
    space = {"method": ["full", "natural_gradient"], "prefix_share": [0, 0.5], "guard": ["none", "prose"]}
    trials = make_plan(make_study(space), FACTS).trials
    assert {trial.method_version for trial in trials if trial.method == "natural_gradient"} == {6}
    plain = {(trial.prefix_share, trial.guard): trial.method_version for trial in trials if trial.method == "full"}
    assert plain == {(0, "none"): 1, (0, "prose"): 3, (0.5, "none"): 3, (0.5, "prose"): 3}


@pytest.mark.parametrize(
    "axes, version",
    [
        ({"guard": "same_relation"}, 2),
        ({"guard": "locality_like", "prefix_share": 0.5}, 4),
        ({"further_steps": 10}, 3),
        ({"shrink": "yes", "method": "natural_gradient"}, 7),
        ({"method": "adalora", "pipeline": "stream"}, 3),
        ({"method": "adalora", "pipeline": "breadth_first"}, 1),
        ({"method": "full", "pipeline": "stream"}, 2),
        ({"method": "full", "pipeline": "stream", "replay": 0}, 1),
    ],
)
def test_trials_that_gave_other_results_before_have_another_version(axes, version):
    assert {trial.method_version for trial in make_plan(make_study(axes), FACTS).trials} == {version}


def test_the_study_id_stays_when_the_space_is_widened_and_changes_with_what_is_compared():
    same = study_id(make_study(), FACTS)
    assert len(same) == 12 and int(same, 16) >= 0
    wider = make_study(
        {"layer": [1], "seed": [0, 1]}, epochs=3, resources={"cpus": 2}, search={"method": "optuna", "trials": 3}
    )
    assert study_id(wider, FACTS) == same
    others = {
        study_id(make_study(name="other"), FACTS),
        study_id(make_study(dtype="bfloat16"), FACTS),
        study_id(make_study(), make_facts(model_fingerprint="x")),
        study_id(make_study(), make_facts(data_fingerprint="x")),
    }
    assert len(others | {same}) == 5


def test_positions_that_a_hybrid_model_lacks_are_skipped():
    space = {"module": ["attn", "mlp"]}
    grid = make_plan(make_study(space), HYBRID)
    expected = {f"{layer}.mlp" for layer in range(8)} | {"3.attn", "7.attn"}
    assert {trial.position for trial in grid.trials} == expected and grid.count == 10
    sampled = make_plan(random_study(99, **space), HYBRID)
    assert {trial.id for trial in sampled.trials} == {trial.id for trial in grid.trials}
    axes = optuna_space(make_study(space), HYBRID)
    assert set(axes["position"]) == expected and "layer" not in axes and "module" not in axes


@pytest.mark.parametrize("facts", [FACTS, HYBRID])
def test_every_point_of_an_optuna_space_is_a_trial_and_is_found_again(facts):
    space = {"module": ["attn", "mlp"], "learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    study = make_study(space, search={"method": "optuna", "trials": 7})
    plan = make_plan(study, facts)
    assert plan.trials == () and plan.count == 7 and len(plan.sample) == 7
    axes = optuna_space(study, facts)
    assert axes["learning_rate"] == ("log_uniform", 1e-4, 1e-2) and axes["batch_size"] == [32]
    point = {axis: values[-1] for axis, values in axes.items()}
    config = trial_config(study, facts, point)
    assert point_of(study, facts, config) == point
    without_rate = study.model_copy(update={"space": study.space.model_copy(update={"method": ("natural_gradient",)})})
    idle = trial_config(without_rate, facts, point | {"method": "natural_gradient"})
    assert point_of(without_rate, facts, idle) == point | {"method": "natural_gradient", "learning_rate": 1e-4}
    narrower = make_study(space | {"module": ["mlp"], "layer": [0]}, search={"method": "optuna", "trials": 7})
    assert point_of(narrower, facts, config) is None
    assert point_of(study.model_copy(update={"epochs": 3}), facts, config) is None


def test_an_optuna_plan_has_no_more_trials_than_its_space():
    space = {"layer": [1, 2], "method": ["full", "lora"], "rank": [4, 16]}
    for trials, count in ((4, 4), (99, 6)):
        plan = make_plan(make_study(space, search={"method": "optuna", "trials": trials}), FACTS)
        assert plan.count == count == len(plan.sample)
    endless = make_study(
        space | {"learning_rate": {"log_uniform": [1e-4, 1e-2]}}, search={"method": "optuna", "trials": 99}
    )
    assert make_plan(endless, FACTS).count == 99


def test_a_grid_has_no_doubles_where_an_axis_changes_nothing():
    space = {"layer": 3, "method": ["full", "lora", "low_curvature"], "rank": [4, 16], "curvature_strength": [3, 30]}
    trials = make_plan(make_study(space), FACTS).trials
    assert [(t.method, t.rank, t.curvature_strength) for t in trials] == [
        ("full", 8, 10.0), ("lora", 4, 10.0), ("lora", 16, 10.0), ("low_curvature", 8, 3.0), ("low_curvature", 8, 30.0),
    ]  # fmt: skip
    sampled = make_plan(random_study(99, **space), FACTS)
    assert {trial.id for trial in sampled.trials} == {trial.id for trial in trials}
    plain = make_plan(make_study({"layer": 3}), FACTS).trials
    assert make_plan(make_study({"layer": 3, "rank": [4, 16], "guard_weight": 3}), FACTS).trials == plain


def test_the_limit_counts_what_the_grid_holds():
    many = {"layer": list(range(30)), "rank": list(range(1, 60)), "alpha": list(range(1, 61)), "seed": [0]}
    assert make_plan(make_study(many), FACTS).count == 30
    with pytest.raises(InputError, match="the grid has more than 100,000 trials"):
        make_plan(make_study(many | {"method": ["lora"]}), FACTS)
    with pytest.raises(InputError, match="the grid has more than 100,000 trials"):
        make_plan(make_study(many | {"method": ["full", "lora", "adalora", "low_curvature"]}), FACTS)


def test_a_trial_is_found_again_in_an_optuna_space_whatever_was_proposed_beside_it():
    space = {"layer": [3], "method": ["full", "lora"], "rank": [4, 16]}
    study = make_study(space, search={"method": "optuna", "trials": 9})
    axes = optuna_space(study, FACTS)
    for method, rank in itertools.product(axes["method"], axes["rank"]):
        point = {axis: values[0] for axis, values in axes.items()} | {"method": method, "rank": rank}
        config = trial_config(study, FACTS, point)
        assert point_of(study, FACTS, config) == point | ({"rank": 4} if method == "full" else {})


def test_a_plan_refuses_what_the_model_lacks_and_a_grid_without_end():
    with pytest.raises(InputError, match="layer 99: smollm2-135m has layers 0 to 29"):
        make_plan(make_study({"layer": 99}), FACTS)
    with pytest.raises(InputError, match="the grid has more than 100,000 trials"):
        make_plan(make_study({"seed": list(range(1000)), "module": list(MODULES)}), FACTS)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quickstart", 6),
        ("pipeline-check", 4),
        ("layer-sweep", 300),
        ("batch-ablation", 18),
        ("method-comparison", 48),
        ("recipe", 192),
        ("generalization", 64),
    ],
)
def test_ready_studies_have_the_trials_their_comments_say(name, count):
    assert make_plan(load_study(name), FACTS).count == count
    assert name in ready_studies()


def test_the_quickstart_sets_the_pipelines_side_by_side_over_the_depth():
    trials = make_plan(load_study("quickstart"), FACTS).trials
    for part in (range(10), range(10, 20), range(20, 30)):
        assert {trial.pipeline for trial in trials if trial.layer in part} == {"depth_first", "breadth_first"}
