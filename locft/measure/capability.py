"""What a model can do, and what an edit costs it: accuracies, their paired change, drift and perplexity on prose.

Legend: K supervised tokens of a batch, V vocabulary.

A model is given as `SupervisedLogits` (rows in, logits out), so that the full forward pass and anything faster are measured
by the same code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from locft.data.capability_item import CapabilityItem, Generation, spread
from locft.data.suites import Suite, harness_tasks
from locft.errors import InputError
from locft.measure.generation import OpenAnswer
from locft.measure.token_scores import divergence, retake, scores_by_row, slices, targets
from locft.train.encoding import encode_continuation, encode_prompt, text_windows
from locft.train.token_rows import SupervisedLogits, TokenRow, batches

PROSE_WINDOW = 128
"""Tokens per row of prose."""
PROSE_TOKENS = 2000
"""Approximate number of tokens of prose that are measured."""
BATCH_TOKENS = 2048
"""Tokens per batch, padding included. On a CPU, 1024 and 4096 take the same time, but the logits of a full forward pass
grow."""


@dataclass(frozen=True)
class EncodedItem:
    """An item as one row per choice, whose tokens are supervised, or as an answer to generate."""

    item: CapabilityItem
    rows: tuple[TokenRow, ...]
    begun: OpenAnswer | None = None


@dataclass(frozen=True)
class EncodedSuite:
    """A suite in the tokens of one model."""

    fingerprint: str
    """Fingerprint of the suite."""
    tasks: dict[str, tuple[EncodedItem, ...]]
    prose: tuple[TokenRow, ...]
    """Windows of running text; every token but the first is supervised."""
    spare: tuple[TokenRow, ...] = ()
    """Windows of the same text that nothing is measured on."""


@dataclass(frozen=True)
class SuiteScores:
    """Which items a model answers right."""

    fingerprint: str
    """Fingerprint of the suite: scores of different suites are not compared."""
    correct: dict[str, tuple[float, ...]]
    """Task -> one entry per item, in the suite's order: 1 (True) if it is right, less where an answer is partly right,
    such as a translation scored by BLEU."""

    @property
    def accuracy(self) -> dict[str, float]:
        return {task: sum(correct) / len(correct) for task, correct in self.correct.items()}

    @property
    def capability(self) -> float:
        """Mean of the tasks' accuracies: every task counts the same, however many items it has."""
        return float(np.mean(list(self.accuracy.values())))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: outcomes as a string of 0 and 1 per task, or as numbers where some are neither."""

        def short(correct: tuple[float, ...]) -> str | list[float]:
            return "".join(str(int(right)) for right in correct) if {*correct} <= {0, 1} else list(correct)

        return {"fingerprint": self.fingerprint, "correct": {task: short(one) for task, one in self.correct.items()}}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "SuiteScores":
        correct = {task: tuple(map(float, outcomes)) for task, outcomes in value["correct"].items()}
        return cls(value["fingerprint"], correct)


@dataclass(frozen=True)
class Drift:
    """How far an edited model has moved on prose. Infinite or NaN if its logits are not finite."""

    kl: float
    """Mean KL(unedited || edited) per supervised token, in nats."""
    perplexity: float
    """Perplexity of the edited model."""


@dataclass(frozen=True)
class Change:
    """Capability of the edited model minus that of the unedited one on the same items, with a 95% interval."""

    mean: float
    low: float
    high: float


def encode_suite(tokenizer: PreTrainedTokenizerBase, suite: Suite, prose_tokens: int = PROSE_TOKENS) -> EncodedSuite:
    """Rows of all choices, and windows of prose of `PROSE_WINDOW` tokens.

    Prose of more than `prose_tokens` tokens gives `prose_tokens // PROSE_WINDOW` whole windows, evenly spaced over it.
    Rows longer than the tokenizer's `model_max_length` lose tokens at their beginning; generated answers get at most half of
    that length.
    """

    def encoded(item: CapabilityItem) -> EncodedItem:
        if item.generation:
            return EncodedItem(item, (), _begun(tokenizer, item.context, item.generation))
        return EncodedItem(item, tuple(_row(tokenizer, *texts) for texts in item.texts))

    tasks = {task.name: tuple(map(encoded, task.items)) for task in suite.tasks}
    return EncodedSuite(suite.fingerprint, tasks, *_prose_rows(tokenizer, suite.prose, prose_tokens))


def suite_rows(suite: EncodedSuite) -> list[TokenRow]:
    """Every row that the suite needs: all choices, then the prose."""
    return [*(row for task in suite.tasks.values() for encoded in task for row in encoded.rows), *suite.prose]


def open_answers(suite: EncodedSuite) -> list[OpenAnswer]:
    """Every answer of the suite that is generated."""
    return [encoded.begun for task in suite.tasks.values() for encoded in task if encoded.begun]


def score_suite(
    logits: SupervisedLogits,
    suite: EncodedSuite,
    coarse: SupervisedLogits | None = None,
    complete: Callable[[Sequence[OpenAnswer]], list[str]] = lambda answers: [],
) -> SuiteScores:
    """Right or wrong for every item.

    An item is right if the right choice scores above every other one. A tie is wrong, wherever the right choice is listed,
    and so is a score that is not a number. coarse: the same model computed coarsely, which decides the items that are
    not close (`retake`). complete: generates the same model's answers, for suites that ask for some.
    """
    every = [encoded for task in suite.tasks.values() for encoded in task]
    items = [encoded for encoded in every if encoded.rows]
    margins = item_margins(coarse or logits, items)
    if coarse:

        def exactly(indices: list[int]) -> np.ndarray:
            before = margins[indices]
            margins[indices] = item_margins(logits, [items[index] for index in indices])
            with np.errstate(invalid="ignore"):  # two infinite margins
                return np.abs(margins[indices] - before)

        retake(np.abs(np.nan_to_num(margins, nan=0.0)), exactly)
    said = zip([one.item for one in every if one.begun], complete(open_answers(suite)), strict=True)
    right = iter((margins > 0).tolist())
    scored = (harness_tasks().score_answer(item, text) for item, text in said)
    correct = {name: tuple(next(right if one.rows else scored) for one in task) for name, task in suite.tasks.items()}
    return SuiteScores(suite.fingerprint, correct)


def item_margins(logits: SupervisedLogits, items: Sequence[EncodedItem]) -> np.ndarray:
    """By how many nats each item is right (above 0) or wrong, float64 (items,)."""
    log_likelihoods, leads = score_rows(logits, [row for encoded in items for row in encoded.rows])
    margins, at = np.zeros(len(items)), 0
    for index, encoded in enumerate(items):
        here = slice(at, at := at + len(encoded.rows))
        margins[index] = _margin(encoded.item, log_likelihoods[here], leads[here])
    return margins


def score_rows(logits: SupervisedLogits, rows: Sequence[TokenRow]) -> tuple[np.ndarray, np.ndarray]:
    """Two values per row, float64 (rows,), in nats: the summed log-likelihood of its supervised tokens, and the
    smallest lead of one of them over every other token at its place (below 0: another token is likelier)."""
    scores = scores_by_row(logits, rows, _longest_context_first, padded_tokens=BATCH_TOKENS)
    log_likelihoods = np.array([float(row.log_likelihood.sum()) for row in scores])
    return log_likelihoods, np.array([float(row.lead.min()) for row in scores])


def measure_perplexity(logits: SupervisedLogits, suite: EncodedSuite) -> float:
    """exp of the mean negative log-likelihood per supervised token of the prose."""
    return _perplexity(score_rows(logits, suite.prose)[0].sum(), suite.prose)


@torch.no_grad()
def measure_drift(edited: SupervisedLogits, unedited: SupervisedLogits, suite: EncodedSuite) -> Drift:
    """Distance of the edited model from the unedited one on the prose, and its perplexity there."""
    kl = log_likelihood = 0.0
    prose = sorted(suite.prose, key=_longest_context_first)
    for part in batches(prose, padded_tokens=BATCH_TOKENS):
        chosen = prose[part]
        for before, after, wanted in slices(unedited(chosen), edited(chosen), targets(chosen)):
            kl += float(divergence(before, after).sum())
            own = after.gather(-1, wanted[:, None])[:, 0]
            log_likelihood += float((own.double() - after.logsumexp(-1).double()).sum())
    kl /= sum(len(row.target_ids) for row in suite.prose)
    return Drift(0.0 if -1e-9 < kl < 0 else kl, _perplexity(log_likelihood, suite.prose))


def capability_change(unedited: SuiteScores, edited: SuiteScores, *, resamples: int = 2000, seed: int = 0) -> Change:
    """Paired change with the percentile interval of a bootstrap over items, stratified by task.

    An item's change is mostly -1, 0 or 1, so a resample of a task's items is a draw from the multinomial of the counts of
    these and any other changes: exactly the bootstrap, without drawing items. If no item changed, the interval is a point,
    and says nothing about changes too rare to show on this many items.

    Raises ValueError if the scores are of different suites.
    """
    sizes = [{task: len(correct) for task, correct in scores.correct.items()} for scores in (unedited, edited)]
    if unedited.fingerprint != edited.fingerprint or sizes[0] != sizes[1]:
        raise ValueError(
            f"scores of different suites: {unedited.fingerprint} with items {sizes[0]}, "
            f"{edited.fingerprint} with items {sizes[1]}"
        )
    generator = np.random.default_rng(seed)
    drawn = np.zeros(resamples)
    for task, size in sizes[0].items():
        difference = np.array(edited.correct[task], dtype=float) - np.array(unedited.correct[task], dtype=float)
        changes = np.array([-1.0, 1.0, *sorted({*difference.tolist()} - {-1.0, 0.0, 1.0}), 0.0])
        shares = [float((difference == change).mean()) for change in changes[:-1]]
        counts = generator.multinomial(size, [*shares, max(0.0, 1 - sum(shares))], resamples)  # (resamples, changes)
        drawn += counts @ changes / size
    low, high = np.percentile(drawn / len(sizes[0]), [2.5, 97.5])
    return Change(edited.capability - unedited.capability, float(low), float(high))


def _margin(item: CapabilityItem, log_likelihoods: np.ndarray, leads: np.ndarray) -> float:
    if item.rule == "exact":
        return float(leads[item.answer]) if np.isfinite(log_likelihoods[item.answer]) else -math.inf
    scores = log_likelihoods
    if item.rule == "mean":
        scores = log_likelihoods / [len(choice.lstrip()) for choice in item.choices]
    return float(scores[item.answer] - np.delete(scores, item.answer).max())


def _begun(tokenizer: PreTrainedTokenizerBase, context: str, generation: Generation) -> OpenAnswer:
    tokens = min(generation.tokens, tokenizer.model_max_length // 2)
    ids = encode_prompt(tokenizer, context)
    excess = max(0, len(ids) + tokens - tokenizer.model_max_length)
    return OpenAnswer(ids[excess:], limit=tokens, until=generation.until)


def _row(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> TokenRow:
    row = encode_continuation(tokenizer, context, choice)
    excess = max(0, min(len(row.token_ids) - tokenizer.model_max_length, row.start - 1))
    return TokenRow(row.token_ids[excess:], row.start - excess)


def _prose_rows(
    tokenizer: PreTrainedTokenizerBase, prose: Sequence[str], prose_tokens: int
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Windows that are measured, and the others."""
    every = text_windows(tokenizer, prose, PROSE_WINDOW)
    if not every:
        raise InputError("prose: fewer than two tokens; drift and perplexity need some running text")
    wanted, whole = max(1, prose_tokens // PROSE_WINDOW), [row for row in every if len(row.token_ids) == PROSE_WINDOW]
    rows = tuple(every) if len(every) <= wanted else spread(whole or every, wanted)
    measured = set(rows)
    return rows, tuple(row for row in every if row not in measured)


def _longest_context_first(row: TokenRow) -> tuple:
    """Sort key for rows: those of a batch have similar lengths, memory runs out at the start if at all, and the choices of
    one question, which can share its states, stay together."""
    return -row.start, row.token_ids[: row.start], -len(row.token_ids), row.token_ids


def _perplexity(log_likelihood: float, rows: Sequence[TokenRow]) -> float:
    mean = -log_likelihood / sum(len(row.target_ids) for row in rows)
    return math.inf if mean > 700 else math.exp(mean)
