"""Did the edit take? Reliability, generalization and locality by greedy answers.

An answer is right if it equals the expected one after SQuAD-style normalisation. Teacher-forced exactness is reported
beside it, never instead: teacher forcing hides the errors that follow the first one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from locft.data.answers import normalise_answer
from locft.data.edit_request import EditRequest
from locft.measure.generation import (
    BATCH,
    NEW_TOKENS,
    GreedyDecoder,
    ModelAnswer,
    OpenAnswer,
)
from locft.measure.token_scores import scores_by_row
from locft.measure.two_stage_scoring import retake
from locft.model.models import LoadedModel
from locft.train.encoding import SupervisedLogits, TokenRow, encode_edit, encode_prompt

EditMetric = Literal["reliability", "generalization", "locality"]


@dataclass(frozen=True)
class EditQuestion:
    """A prompt and the answer that an edited model should give to it."""

    edit_id: str
    kind: EditMetric
    prompt: str
    expected: str
    row: TokenRow
    """Prompt and expected answer, with EOS or (locality) the unedited model's stopping token, for teacher forcing."""


@dataclass(frozen=True)
class EditOutcome:
    """What an edited model answered to one question."""

    edit_id: str
    kind: EditMetric
    prompt: str
    expected: str
    got: str
    correct: bool
    correct_tf: bool
    """Teacher-forced: every token of the expected answer is the most likely one after those before it."""


@dataclass(frozen=True)
class Following:
    """How far the most likely tokens follow the supervised tokens of a row."""

    matched: int
    """Supervised tokens from the first on that are the most likely ones at their places."""
    instead: int | None
    """The most likely token at the place of the next one; None if all are matched."""
    loss: float
    """Mean over the row's supervised tokens, in nats."""


def edit_questions(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], unedited: Sequence[ModelAnswer]
) -> tuple[EditQuestion, ...]:
    """All questions about the edits. unedited: the base model's answers to the `locality_prompts`, in order.

    Raises ValueError unless there is exactly one answer per prompt.
    """
    if len(unedited) != (prompts := len(locality_prompts(requests))):
        raise ValueError(
            f"{len(unedited)} answers of the unedited model to {prompts} unrelated prompts, expected one each"
        )
    questions = []
    answers = iter(unedited)
    for request in requests:
        row = encode_edit(tokenizer, request.prompt, request.target)
        questions.append(EditQuestion(request.id, "reliability", request.prompt, request.target, row))
        for prompt in request.rephrases:
            row = encode_edit(tokenizer, prompt, request.target)
            questions.append(EditQuestion(request.id, "generalization", prompt, request.target, row))
        for unrelated in request.locality:
            answer, prompt_ids = next(answers), encode_prompt(tokenizer, unrelated.prompt)
            row = TokenRow(prompt_ids + answer.token_ids, len(prompt_ids))
            questions.append(EditQuestion(request.id, "locality", unrelated.prompt, answer.text, row))
    return tuple(questions)


def locality_prompts(requests: Sequence[EditRequest]) -> list[str]:
    """The unrelated prompts of all edits, in order."""
    return [unrelated.prompt for request in requests for unrelated in request.locality]


def ask(
    edited: LoadedModel,
    logits: SupervisedLogits,
    questions: Sequence[EditQuestion],
    *,
    followed: Mapping[TokenRow, Following] = MappingProxyType({}),
    coarse: SupervisedLogits | None = None,
    generate_all: bool = False,
) -> tuple[EditOutcome, ...]:
    """Put the questions to the edited model, given as a model and as a function of rows (`logits`).

    One teacher-forced pass over the rows that are not in `followed` tells how far greedy generation follows the
    expected answer. If that is to its end, the stopping token included, the answer is right. Otherwise generation goes
    on from there, only until the answer is decided: a wrong answer is left unfinished ("Lisb…"). coarse: as for
    `follow`. generate_all: generate every answer in full instead.
    """
    rest = list(dict.fromkeys(question.row for question in questions if question.row not in followed))
    known = {**followed, **dict(zip(rest, follow(logits, rest, coarse), strict=True))}
    open_answers = {
        index: _begun(question, None if generate_all else known[question.row])
        for index, question in enumerate(questions)
        if generate_all or known[question.row].instead is not None
    }
    decoder = GreedyDecoder(edited)
    answers = dict(zip(open_answers, decoder.complete(list(open_answers.values())), strict=True))
    outcomes = []
    for index, question in enumerate(questions):
        got = decoder.text(answers[index]) if index in answers else question.expected
        right = normalise_answer(got) == normalise_answer(question.expected)
        right_tf = known[question.row].instead is None
        outcomes.append(
            EditOutcome(question.edit_id, question.kind, question.prompt, question.expected, got, right, right_tf)
        )
    return tuple(outcomes)


def edit_metrics(outcomes: Sequence[EditOutcome]) -> dict[str, float]:
    """Reliability, generalization and locality (and their teacher-forced twins, `_tf`), each the mean over the edits.

    An edit with several rephrases or unrelated prompts counts once, with their mean. A kind without questions is
    absent.
    """
    metrics = {}
    for kind in ("reliability", "generalization", "locality"):
        for name, field in ((kind, "correct"), (f"{kind}_tf", "correct_tf")):
            by_edit: dict[str, list[bool]] = {}
            for outcome in outcomes:
                if outcome.kind == kind:
                    by_edit.setdefault(outcome.edit_id, []).append(getattr(outcome, field))
            if by_edit:
                metrics[name] = sum(sum(marks) / len(marks) for marks in by_edit.values()) / len(by_edit)
    return metrics


def follow(
    logits: SupervisedLogits, rows: Sequence[TokenRow], coarse: SupervisedLogits | None = None
) -> list[Following]:
    """How far greedy generation would follow each row's supervised tokens.

    coarse: the same model computed coarsely, which decides the rows that are not close
    (`locft.measure.two_stage_scoring`); their losses are coarse, too.
    """
    found, margins = _followings(coarse or logits, rows)
    if coarse:

        def exactly(indices: list[int]) -> np.ndarray:
            """A margin has shifted by its change or, where the row is followed otherwise, by both margins together."""
            again, exact = _followings(logits, [rows[index] for index in indices])
            shifts = np.abs(exact - margins[indices])
            for place, (index, following) in enumerate(zip(indices, again, strict=True)):
                before, found[index] = found[index], following
                if (before.matched, before.instead) != (following.matched, following.instead):
                    shifts[place] = exact[place] + margins[index]
            return shifts

        retake(np.nan_to_num(margins, nan=0.0), exactly)
    return found


def _followings(logits: SupervisedLogits, rows: Sequence[TokenRow]) -> tuple[list[Following], np.ndarray]:
    """The same without coarse scores, and how far each row is from being followed otherwise: the least gap up to its
    first miss, in nats, float64 (rows,)."""
    found, margins = [], []
    for row, scores in zip(rows, scores_by_row(logits, rows, lambda row: len(row.token_ids), most=BATCH), strict=True):
        best = scores.best.tolist()
        matched = next((at for at, token in enumerate(best) if token != row.target_ids[at]), len(best))
        instead = best[matched] if matched < len(best) else None
        found.append(Following(matched, instead, float(-scores.log_likelihood.mean())))
        margins.append(float(scores.gap[: matched + 1].min()))
    return found, np.array(margins)


def _begun(question: EditQuestion, following: Following | None) -> OpenAnswer:
    """The answer before generation: with the tokens that teacher forcing has shown (`following`), or without any."""
    row = question.row
    full_stops = 0 if question.kind == "locality" else question.expected.count(".")
    limit = max(NEW_TOKENS, len(row.target_ids))
    if following is None:
        return OpenAnswer(row.token_ids[: row.start], (), full_stops, limit)
    shown = row.target_ids[: following.matched]
    if following.instead is not None:
        shown += (following.instead,)
    return OpenAnswer(row.token_ids[: row.start], shown, full_stops, limit, question.expected)
