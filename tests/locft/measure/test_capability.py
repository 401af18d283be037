"""Scores, drift and the paired change against loops that compute the same from the definition, one token at a time."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from locft.data.capability_item import CapabilityItem
from locft.data.suites import CapabilityTask, Suite
from locft.errors import InputError
from locft.measure import capability
from locft.measure.capability import (
    SuiteScores,
    capability_change,
    encode_suite,
    measure_drift,
    measure_perplexity,
    score_rows,
    score_suite,
)
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests.tiny import SENTENCES, tiny_model, tiny_tokenizer

PROSE = " ".join(SENTENCES) * 3


def item(task, number, context, choices, answer, rule):
    return CapabilityItem(task, f"{task}-{number}", context, tuple(choices), answer, rule)


@pytest.fixture(scope="module")
def suite():
    words = ["Paris", "the Seine", "Portuguese", "Alexander Graham Bell", "trumpet", "yen", "1876", "Miles Davis"]
    contexts = ["The capital of France is", "He played the", "Which instrument did", "What currency?\nAnswer:"]

    def choices(start, count):
        return [" " + words[(start + step) % len(words)] for step in range(count)]

    facts = [item("facts", i, contexts[i % 4], choices(i, 2 + i % 3), i % 2, "sum") for i in range(12)]
    means = [item("means", i, contexts[i % 4], choices(i + 3, 3), i % 3, "mean") for i in range(9)]
    pairs = [item("pairs", i, "", [SENTENCES[i], SENTENCES[i][::-1]], 0, "sum") for i in range(5)]
    words = [item("words", i, contexts[i % 4], [" " + words[i]], 0, "exact") for i in range(8)]
    tasks = (("facts", facts), ("means", means), ("pairs", pairs), ("words", words))
    return Suite(tuple(CapabilityTask(name, tuple(items)) for name, items in tasks), (PROSE,), "0123456789abcdef")


@pytest.fixture(scope="module")
def models():
    return full_forward(tiny_model(seed=0)), full_forward(tiny_model(seed=1))


def plain_log_probs(model, token_ids):
    """log p(token | those before) of every token after the first: the whole definition, one row, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids])).logits[0].double()
    return [
        (logits[at - 1, token_ids[at]] - torch.logsumexp(logits[at - 1], -1)).item() for at in range(1, len(token_ids))
    ], [logits[at - 1].argmax().item() == token_ids[at] for at in range(1, len(token_ids))]


def test_every_item_agrees_with_a_plain_loop(suite, models):
    tokenizer, model = tiny_tokenizer(), tiny_model(seed=0)
    scores = score_suite(models[0], encode_suite(tokenizer, suite))
    for task in suite.tasks:
        for one, correct in zip(task.items, scores.correct[task.name], strict=True):
            context = tokenizer(one.context)["input_ids"] or [tokenizer.eos_token_id]
            totals, exact = [], []
            for choice in one.choices:
                choice_ids = tokenizer(choice)["input_ids"]
                log_probs, tops = plain_log_probs(model, context + choice_ids)
                totals.append(sum(log_probs[-len(choice_ids) :]))
                exact.append(all(tops[-len(choice_ids) :]))
            if one.rule == "mean":
                totals = [total / len(choice.strip()) for total, choice in zip(totals, one.choices)]
            expected = exact[0] if one.rule == "exact" else max(totals) == totals[one.answer]
            assert correct == expected, one
    by_hand = [sum(correct) / len(correct) for correct in scores.correct.values()]
    assert list(scores.accuracy.values()) == by_hand
    assert scores.capability == pytest.approx(sum(by_hand) / 4)


def test_log_likelihood_and_greedy_of_rows(models):
    model, tokenizer = tiny_model(seed=0), tiny_tokenizer()
    ids = tuple(tokenizer(SENTENCES[0])["input_ids"])
    with torch.no_grad():
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    rows = [TokenRow(ids, 1), TokenRow(ids, 7), TokenRow((*ids, best), len(ids))]
    log_likelihoods, leads = score_rows(models[0], rows)
    for row, got in zip(rows, log_likelihoods):
        assert got == pytest.approx(sum(plain_log_probs(model, list(row.token_ids))[0][row.start - 1 :]), abs=1e-4)
    assert (leads > 0).tolist() == [False, False, True]
    logits = models[0](rows[1:2])
    others = [values[torch.arange(400) != token].max() for values, token in zip(logits, rows[1].target_ids)]
    own = [values[token] for values, token in zip(logits, rows[1].target_ids)]
    assert leads[1] == pytest.approx(min(a.item() - b.item() for a, b in zip(own, others)), abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 40, 300, 10_000])
def test_batches_and_order_change_nothing(suite, models, batch_tokens, monkeypatch):
    encoded = encode_suite(tiny_tokenizer(), suite)
    rows = [row for task in encoded.tasks.values() for one in task for row in one.rows]
    expected, expected_leads = score_rows(models[0], rows)
    expected_scores, expected_kl = score_suite(models[0], encoded), measure_drift(*models, encoded).kl
    order = np.random.default_rng(0).permutation(len(rows))
    monkeypatch.setattr(capability, "BATCH_TOKENS", batch_tokens)
    got, leads = score_rows(models[0], [rows[index] for index in order])
    assert got == pytest.approx(expected[order], abs=1e-4)
    assert leads == pytest.approx(expected_leads[order], abs=1e-4)
    assert score_suite(models[0], encoded) == expected_scores
    assert measure_drift(*models, encoded).kl == pytest.approx(expected_kl, rel=1e-5)


def test_batches_keep_to_their_size(suite, models, monkeypatch):
    monkeypatch.setattr(capability, "BATCH_TOKENS", 60)
    seen = []

    def watching(rows):
        seen.append([len(row.token_ids) for row in rows])
        return models[0](rows)

    encoded = encode_suite(tiny_tokenizer(), suite)
    score_suite(watching, encoded)
    assert sum(map(len, seen)) == sum(len(one.rows) for task in encoded.tasks.values() for one in task)
    assert all(len(batch) * max(batch) <= 60 or len(batch) == 1 for batch in seen)
    assert any(len(batch) > 1 for batch in seen)


def test_ties_and_broken_logits_are_wrong_wherever_the_answer_stands(suite):
    encoded = encode_suite(tiny_tokenizer(), suite)

    def constant(value):
        return lambda rows: torch.full((sum(len(row.target_ids) for row in rows), 400), value)

    same = item("pairs", 0, "A", [" b", " b"], 0, "sum")
    tied = Suite((CapabilityTask("pairs", (same,)),), (PROSE,), "tied")
    assert score_suite(constant(0.0), encode_suite(tiny_tokenizer(), tied)).correct == {"pairs": (False,)}
    assert not any(any(correct) for correct in score_suite(constant(math.nan), encoded).correct.values())
    drift = measure_drift(constant(math.nan), constant(0.0), encoded)
    assert math.isnan(drift.kl) and math.isnan(drift.perplexity)


def test_drift_of_a_model_from_itself_is_exactly_zero(suite, models):
    assert measure_drift(models[0], models[0], encode_suite(tiny_tokenizer(), suite)).kl == 0.0


def test_drift_and_perplexity_agree_with_a_plain_loop(suite, models):
    before, after = tiny_model(seed=0), tiny_model(seed=1)
    encoded = encode_suite(tiny_tokenizer(), suite)
    divergence, log_likelihood, count = 0.0, 0.0, 0
    for row in encoded.prose:
        with torch.no_grad():
            ids = torch.tensor([row.token_ids])
            p = before(input_ids=ids).logits[0, :-1].double().softmax(-1).numpy()
            q = after(input_ids=ids).logits[0, :-1].double().softmax(-1).numpy()
        divergence += float(np.sum(p * np.log(p / q)))
        log_likelihood += float(np.log(q[range(len(q)), row.token_ids[1:]]).sum())
        count += len(q)
    drift = measure_drift(models[1], models[0], encoded)
    assert drift.kl == pytest.approx(divergence / count, rel=1e-5)
    assert drift.perplexity == pytest.approx(math.exp(-log_likelihood / count), rel=1e-4)
    assert drift.perplexity == pytest.approx(measure_perplexity(models[1], encoded), rel=1e-5)


def test_tiny_drift_is_resolved():
    """KL is quadratic in a small change of the logits: half of it gives a quarter, even at 1e-9 nats."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)).mul(3).float()
    direction = torch.randn(500, generator=torch.Generator().manual_seed(1))
    suite = encode_suite(tiny_tokenizer(), Suite((), (PROSE,), "x"))

    def moved(step):
        one = logits.double() + step * direction.double()
        return lambda rows: one.expand(sum(len(row.target_ids) for row in rows), -1)

    small, half = (measure_drift(moved(step), moved(0.0), suite).kl for step in (1e-4, 5e-5))
    assert 1e-10 < small < 1e-7
    assert small / half == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize(("start", "jump"), [(0, 59), (0, 95), (0, 1000), (-120, 220), (0, -1000)])
def test_a_change_too_large_for_float32_is_measured(start, jump):
    """One token jumps in logit; at -120 its probability before is too small for float32."""
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)).mul(3)
    logits[7] += start
    after = logits.clone()
    after[7] += jump
    p, q = (one.double().log_softmax(-1) for one in (logits, after))
    suite = encode_suite(tiny_tokenizer(), Suite((), (PROSE,), "x"))

    def always(one):
        return lambda rows: one.expand(sum(len(row.target_ids) for row in rows), -1)

    expected = float((p.exp() * (p - q)).sum())
    assert measure_drift(always(after), always(logits), suite).kl == pytest.approx(expected, rel=1e-5)
    moved = measure_drift(always(logits + jump), always(logits), suite).kl
    assert moved == pytest.approx(0, abs=1e-7), "a constant changes no distribution"


def test_tokens_that_are_ruled_out_do_not_break_the_drift(suite):
    def ruled_out(rows):
        logits = torch.zeros(sum(len(row.target_ids) for row in rows), 400)
        logits[:, 399] = -math.inf
        return logits

    assert measure_drift(ruled_out, ruled_out, encode_suite(tiny_tokenizer(), suite)).kl == 0.0


def test_prose_windows_cover_a_short_text_and_sample_a_long_one(monkeypatch):
    monkeypatch.setattr(capability, "PROSE_WINDOW", 16)
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROSE)["input_ids"]
    rows = encode_suite(tokenizer, Suite((), (PROSE,), "x")).prose
    assert [token for row in rows for token in row.token_ids] == ids[: sum(len(row.token_ids) for row in rows)]
    assert sum(len(row.token_ids) for row in rows) >= len(ids) - 1
    assert all(row.start == 1 for row in rows)
    sampled = encode_suite(tokenizer, Suite((), (PROSE * 10,), "x"), prose_tokens=80).prose
    assert [len(row.token_ids) for row in sampled] == [16] * 5
    assert len(set(sampled)) > 1
    with pytest.raises(InputError, match="fewer than two tokens"):
        encode_suite(tokenizer, Suite((), ("a",), "x"))


def test_prose_of_a_tokenizer_with_a_start_token_begins_with_it(monkeypatch):
    monkeypatch.setattr(capability, "PROSE_WINDOW", 16)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    rows = encode_suite(tokenizer, Suite((), (PROSE,), "x")).prose
    assert all(row.token_ids[0] == 0 and 0 not in row.token_ids[1:] and len(row.token_ids) <= 16 for row in rows)
    assert sum(len(row.target_ids) for row in rows) == len(tokenizer(PROSE, add_special_tokens=False)["input_ids"])


def test_rows_longer_than_the_model_reads_lose_their_beginning():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10
    long = item("long", 0, PROSE, [" yen", " trumpet"], 0, "sum")
    (encoded,) = encode_suite(tokenizer, Suite((CapabilityTask("long", (long,)),), (PROSE,), "x")).tasks["long"]
    for row, choice in zip(encoded.rows, long.choices):
        assert len(row.token_ids) == 10
        assert list(row.target_ids) == tokenizer(choice)["input_ids"]


def scores(**correct):
    return SuiteScores("f", {task: tuple(values) for task, values in correct.items()})


def test_scores_survive_json():
    value = scores(a=[True, False, True], b=[False])
    assert SuiteScores.from_dict(json.loads(json.dumps(value.to_dict()))) == value


def test_change_is_the_difference_and_nothing_changed_is_a_point():
    before = scores(a=[True, True, False, False], b=[True, False])
    after = scores(a=[True, False, False, False], b=[True, True])
    change = capability_change(before, after)
    assert change.mean == pytest.approx((-0.25 + 0.5) / 2)
    assert change.low <= change.mean <= change.high
    assert capability_change(before, after, seed=0) == change
    same = capability_change(before, before)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_scores_of_different_suites_are_not_compared():
    with pytest.raises(ValueError, match="different suites"):
        capability_change(scores(a=[True]), scores(a=[True, False]))
    with pytest.raises(ValueError, match="different suites"):
        capability_change(scores(a=[True]), SuiteScores("g", {"a": (True,)}))


def test_interval_equals_a_bootstrap_that_draws_items():
    generator = np.random.default_rng(1)
    before = {task: generator.random(size) < 0.6 for task, size in (("a", 200), ("b", 50))}
    after = {task: np.where(generator.random(len(right)) < 0.2, ~right, right) for task, right in before.items()}
    change = capability_change(scores(**before), scores(**after), resamples=20_000)
    drawn = np.zeros(20_000)
    for task in before:
        difference = after[task].astype(int) - before[task].astype(int)
        drawn += difference[generator.integers(0, len(difference), (20_000, len(difference)))].mean(-1) / 2
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert change.low == pytest.approx(low, abs=0.006)
    assert change.high == pytest.approx(high, abs=0.006)


def test_interval_covers_the_truth_about_19_times_of_20():
    generator = np.random.default_rng(2)
    lost, won = 0.12, 0.05
    truth = won - lost
    covered = 0
    for trial in range(300):
        draws = generator.random((2, 150))
        before = {"a": draws[0] < 2, "b": draws[1] < 2}  # "was right" here, whether it then is lost
        after = {"a": draws[0] >= lost, "b": draws[1] >= lost}
        new = generator.random((2, 150)) < won  # and items that were wrong, of which some are won
        before = {task: np.concatenate([before[task], np.zeros(150, bool)]) for task in before}
        after = {task: np.concatenate([after[task], new[index]]) for index, task in enumerate(after)}
        change = capability_change(scores(**before), scores(**after), resamples=400, seed=trial)
        covered += change.low <= truth / 2 <= change.high
    assert 0.90 <= covered / 300 <= 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_is_ordered_bounded_and_antisymmetric_in_the_mean(pairs, seed):
    before, after = scores(a=[x for x, _ in pairs]), scores(a=[y for _, y in pairs])
    change = capability_change(before, after, resamples=200, seed=seed)
    assert -1 <= change.low <= change.high <= 1
    assert change.mean == pytest.approx(-capability_change(after, before, resamples=10).mean)
