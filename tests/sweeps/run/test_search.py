"""The multi-objective search on its own, without workers: what it proposes and what it makes of results."""

import math

from sweeps.run.search import OBJECTIVES, OptunaSearch, objectives
from sweeps.study.trial_types import TrialResult
from tests.mlflow_store import config as trial_config

SPACE = {"layer": list(range(6)), "module": ["attn", "mlp"], "learning_rate": ("log_uniform", 1e-4, 1e-1)}


def to_config(point):
    return trial_config(point["layer"], point["module"], learning_rate=float(f"{point['learning_rate']:.3g}"))


def done(trial, reliability=0.5, capability=0.5):
    return TrialResult(trial, "done", None, {"reliability": reliability, "capability": capability})


def search(space=SPACE, trials=20, seed=0, earlier=None):
    return OptunaSearch(space, to_config, trials, seed, earlier or {})


def propose_all(found, count, measure=done):
    configs = []
    for number in range(count):
        config = found.propose(str(number))
        if config is None:
            break
        configs.append(config)
        found.learn(str(number), measure(config))
    return configs


def test_no_configuration_comes_twice_and_a_small_space_is_used_up():
    space = {"layer": [0, 1, 2], "module": ["attn", "mlp"], "learning_rate": [0.1, 0.2]}
    configs = propose_all(search(space), 50)
    assert len({config.id for config in configs}) == len(configs) == 12


def test_a_space_that_is_used_up_is_searched_no_more(monkeypatch):
    """The driver asks again and again while the last trials run."""
    found, asked = search({"layer": [0], "module": ["attn"], "learning_rate": [0.1, 0.2]}), []
    monkeypatch.setattr(found._study, "ask", lambda space, real=found._study.ask: asked.append(space) or real(space))
    assert [found.propose(key) is None for key in "abc"] == [False, False, True]
    before = len(asked)
    assert found.propose("d") is None and len(asked) == before > 2


def test_none_comes_twice_while_several_are_running():
    found = search({"layer": [0, 1, 2], "module": ["attn"], "learning_rate": [0.1, 0.2]})
    running = [found.propose(str(number)) for number in range(6)]
    assert len({trial.id for trial in running}) == 6
    assert found.propose("7") is None
    for number, config in enumerate(running):
        found.learn(str(number), done(config) if number % 2 else TrialResult(config, "failed", "no memory"))
    assert found.propose("8") is None, "neither the finished nor the failed ones come again in the same run"


def test_a_trial_of_which_nothing_came_is_given_up():
    found = search()
    for number in range(4):
        found.propose(str(number))
        found.learn(str(number), None)
    assert found.propose("4") is not None


def test_the_same_seed_proposes_the_same_and_another_one_others():
    def made(seed):
        return [config.id for config in propose_all(search(seed=seed), 8)]

    assert made(1) == made(1) != made(2)


def test_values_stay_in_the_space():
    for config in propose_all(search(), 30):
        assert config.layer in SPACE["layer"] and config.module in SPACE["module"]
        assert 1e-4 <= config.learning_rate <= 1e-1


def test_earlier_results_are_not_repeated_and_guide_the_search():
    """Layer 5 was far better in an earlier run: a resumed search begins there, a new one everywhere."""
    earlier = {}
    for layer in SPACE["layer"]:
        for rate in (0.001, 0.003, 0.01, 0.03):
            point = {"layer": layer, "module": "mlp", "learning_rate": rate}
            earlier[to_config(point).id] = (point, (layer / 5, layer / 5))
    resumed = search(earlier=earlier)
    proposed = [resumed.propose(str(number)) for number in range(12)]
    assert not {config.id for config in proposed} & set(earlier)
    new = [config for number in range(12) for config in [search(seed=number).propose("0")]]
    assert sum(config.layer for config in proposed) / 12 > sum(config.layer for config in new) / 12 + 1


def test_a_search_hears_nothing_of_a_failure_but_that_it_failed():
    found = search()
    config = found.propose("0")
    found.learn("0", TrialResult(config, "failed", "why"))
    assert [(trial.state.name, trial.values) for trial in found._study.trials] == [("FAIL", None)]


def test_objectives():
    """Both; 0 for a capability that was not measured, which a row of the results table has as nan."""
    assert OBJECTIVES == ("reliability", "capability")
    assert objectives(done(trial_config(), 0.25, 0.75).metrics) == (0.25, 0.75)
    assert objectives({"reliability": 1.0}) == objectives({"reliability": 1.0, "capability": math.nan}) == (1.0, 0.0)


def test_no_more_than_asked_for():
    found = search(trials=2)
    assert [found.propose(key) is not None for key in "abc"] == [True, True, False]
