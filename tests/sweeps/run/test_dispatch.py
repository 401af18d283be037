"""What is started next when workers die and memory runs out, without workers."""

from sweeps.run.dispatch import WORKER_RESTARTS, Dispatch, ListedTrials
from sweeps.study.trial_types import TrialResult
from tests.mlflow_store import config

TRIALS = [config(seed=seed) for seed in range(6)]


class Space:
    """Room for a number of trials."""

    def __init__(self, trials):
        self.most = trials

    def trials(self):
        return self.most

    def narrow(self, running):
        self.most = min(self.most, max(1, running // 2))


def dispatch(trials=TRIALS, room=4):
    found = Dispatch(ListedTrials(trials), Space(room))
    return found, {key: found.next(key) for key in "abcdef"[:room]}


def done(trial):
    return TrialResult(trial, "done")


def test_a_lost_worker_is_replaced_a_few_times_and_the_search_waits_for_it():
    found, running = dispatch(TRIALS[:2], room=2)
    found.finished("b", done(running["b"]))
    assert found.died("a", began=False) and found.next("a") == running["a"], "an idle one was gone: no try of the trial"
    for _ in range(WORKER_RESTARTS):
        assert found.next("x") == "wait", "the running one may have to be tried again"
        assert found.died("a")
        assert found.next("a") == running["a"]
    assert not found.died("a")
    assert found.next("c") is None


def test_what_ran_out_of_memory_waits_until_half_as_many_run():
    found, running = dispatch()
    assert found.died("a", out_of_memory=True)
    assert [found.next(key) for key in "wx"] == ["wait"] * 2, "three run, two may"
    for key in "bc":
        found.finished(key, done(running[key]))
    assert found.next("y") == running["a"], "it comes before new ones"
    assert found.died("y", out_of_memory=True) and found.next("z") == "wait", "one runs, one may"
    found.finished("d", done(running["d"]))
    assert found.next("z") == running["a"]
    assert not found.died("z", out_of_memory=True), "alone: another try would be the same"
    assert found.next("a") == TRIALS[4] and found.next("b") == "wait"


def test_workers_killed_together_are_all_tried_again():
    found, running = dispatch(TRIALS[:4])
    assert all(found.died(key, out_of_memory=True) for key in "abcd")
    assert found.next("a") == running["a"] and found.next("b") == "wait"


def test_a_search_hears_what_came_under_the_key_it_proposed():
    heard = []

    class Recording(ListedTrials):
        def learn(self, key, result):
            heard.append((key, result))

    found = Dispatch(Recording(TRIALS[:2]), Space(2))
    first, second = found.next("a"), found.next("b")
    assert found.died("a") and found.next("c") == first
    found.finished("c", done(first))
    found.given_up("b")
    assert heard == [("a", done(first)), ("b", None)] and not found.holds("b") and second == TRIALS[1]


def test_the_last_try_of_what_dies_without_a_cause_is_alone():
    found, running = dispatch(TRIALS[:5], room=3)
    assert found.died("a") and found.next("a") == running["a"], "the first time beside the others"
    assert found.died("a") and found.next("a") == "wait"
    found.finished("b", done(running["b"]))
    assert found.next("a") == "wait"
    found.finished("c", done(running["c"]))
    assert found.next("a") == running["a"] and found.next("b") == found.next("c") == "wait"
    assert not found.died("a")
    assert [found.next(key) for key in "ab"] == TRIALS[3:5]


def test_a_trial_is_not_blamed_for_the_loss_of_its_node():
    found, running = dispatch(TRIALS[:3], room=2)
    for _ in range(WORKER_RESTARTS):
        assert found.died("a", with_its_node=True) and found.next("a") == running["a"]
    assert not found.died("a", with_its_node=True) and found.next("a") == TRIALS[2]


def test_an_idle_worker_that_ran_out_of_memory_is_no_try_of_a_trial_that_runs_alone():
    found, running = dispatch(TRIALS[:1], room=1)
    assert found.died("a", began=False, out_of_memory=True) and found.next("a") == running["a"]
    assert not found.died("a", out_of_memory=True)
