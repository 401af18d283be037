"""Did the edit take, and what else did it change? Reliability, generalization, portability and locality.

An edit is asked about in every format, by greedy generation. An answer is right if it equals the expected one after
SQuAD-style normalisation. Teacher-forced exactness is reported alongside it, never in its place: teacher forcing hides
the errors that follow the first one. Locality works the other way round: whether a free-form answer is literally the same
says little, so it counts the tokens of a reference answer at which the most likely token is unchanged (as EasyEdit does).

Legend: K supervised tokens of a batch, V vocabulary.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from locft.data.answers import normalise_answer, sentence_ends
from locft.data.edit_request import EditRequest
from locft.measure.generation import BATCH, NEW_TOKENS, GreedyDecoder, ModelAnswer, OpenAnswer
from locft.measure.token_scores import divergence, retake, scores_by_row, slices
from locft.model.models import LoadedModel
from locft.train.encoding import encode_answer, encode_edit, encode_question
from locft.train.formats import RAW, UNSEEN, label
from locft.train.token_rows import SupervisedLogits, TokenRow, batches

EditMetric = Literal["reliability", "generalization", "portability", "locality"]
LOCALITY_FIELDS = {
    "locality": "kept", "locality_first": "first_kept", "locality_kl": "kl", "locality_exact": "correct",
}  # fmt: skip
"""Locality metrics and the fields of an outcome whose means they are."""
LONG_WORDS = 8
"""A target of more words than this is long: it is scored by F1 and containment as well as by exact match."""


@dataclass(frozen=True)
class EditQuestion:
    """A prompt and the answer that an edited model should give to it."""

    edit_id: str
    kind: EditMetric
    prompt: str
    expected: str
    row: TokenRow
    """Prompt and expected answer with its end, for teacher forcing. For locality, the answer is the unedited model's."""
    format: str = RAW
    """Format in which the prompt is put, by its `label`."""
    also_right: tuple[str, ...] = ()
    """Other names of the expected answer."""
    reference: TokenRow | None = None
    """For locality, prompt and reference answer: the data set's, or else the unedited model's own with its end."""

    @property
    def names(self) -> tuple[str, ...]:
        """All right answers, the expected one first."""
        return self.expected, *self.also_right

    def full_stops(self, name: str) -> int:
        """Number of sentence ends that belong to an answer of this name."""
        return 0 if self.kind == "locality" else len(sentence_ends(name))

    def outcome(self, got: str, correct: bool, correct_tf: bool, **change: Any) -> "EditOutcome":
        """The outcome of this question for an answer. change: fields of `ReferenceChange`, for locality."""
        asked = self.edit_id, self.kind, self.prompt, self.expected
        return EditOutcome(*asked, got, correct, correct_tf, self.format, **change)


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
    format: str = RAW
    kept: float | None = None
    """`ReferenceChange.kept`, for locality."""
    first_kept: bool | None = None
    kl: float | None = None

    @property
    def f1(self) -> float | None:
        """SQuAD's F1 of the words of answer and target, for long targets; None for others."""
        if not is_long(self.expected):
            return None
        said, wanted = (Counter(normalise_answer(text).split()) for text in (self.got, self.expected))
        return 2 * (said & wanted).total() / (said.total() + wanted.total())

    @property
    def contains(self) -> bool | None:
        """Whether the answer contains the target, word for word; None unless the target is long."""
        if not is_long(self.expected):
            return None
        return f" {normalise_answer(self.expected)} " in f" {normalise_answer(self.got)} "


@dataclass(frozen=True)
class ReferenceChange:
    """How far an edit changes what the model predicts along a reference answer."""

    kept: float
    """Share of its tokens whose most likely token is unchanged."""
    first_kept: bool
    """The same for its first token."""
    kl: float | None
    """KL(unedited || edited) at its first token, in nats; None if it is not finite."""


@dataclass(frozen=True)
class Following:
    """How far the most likely tokens follow the supervised tokens of a row."""

    matched: int
    """Number of supervised tokens, from the first on, that are the most likely ones at their places."""
    instead: int | None
    """The most likely token at the place of the next one; None if all are matched."""
    loss: float
    """Mean loss over the row's supervised tokens, in nats."""


def is_long(target: str) -> bool:
    return len(target.split()) > LONG_WORDS


def edit_questions(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    unedited: Sequence[ModelAnswer],
    formats: Sequence[str] = (RAW,),
) -> tuple[EditQuestion, ...]:
    """All questions about the edits. unedited: the base model's answers to the `locality_prompts`, in order.

    formats: those in which edit prompts, rephrases and portability questions are asked, `unseen` for edit prompts
    alone; unrelated prompts are asked raw. Raises ValueError unless there is exactly one answer per unrelated prompt.
    """
    if len(unedited) != (prompts := len(locality_prompts(requests))):
        raise ValueError(
            f"{len(unedited)} answers of the unedited model to {prompts} unrelated prompts, expected one each"
        )
    questions, answers = [], iter(unedited)
    for request in requests:
        asked: list[tuple[EditMetric, str, tuple[str, ...]]] = [("reliability", request.prompt, (request.target,))]
        asked += [("generalization", prompt, (request.target,)) for prompt in request.rephrases]
        asked += [("portability", one.prompt, one.answers) for one in request.portability]
        for form in formats:
            for kind, prompt, (answer, *others) in asked[: 1 if form == UNSEEN else None]:
                row = encode_edit(tokenizer, prompt, answer, form)
                questions.append(EditQuestion(request.id, kind, prompt, answer, row, label(form), tuple(others)))
        for unrelated in request.locality:
            kept, prompt_ids = next(answers), encode_question(tokenizer, unrelated.prompt)
            row = reference = TokenRow(prompt_ids + kept.token_ids, len(prompt_ids))
            if unrelated.answer:
                reference = encode_answer(tokenizer, unrelated.prompt, unrelated.answer)
            question = EditQuestion(request.id, "locality", unrelated.prompt, kept.text, row, reference=reference)
            questions.append(question)
    return tuple(questions)


def question_rows(questions: Sequence[EditQuestion]) -> list[TokenRow]:
    """Every row that is needed to measure the questions."""
    return [row for question in questions for row in (question.row, question.reference) if row]


def locality_prompts(requests: Sequence[EditRequest]) -> list[str]:
    """The unrelated prompts of all edits, in order."""
    return [unrelated.prompt for request in requests for unrelated in request.locality]


def ask(
    edited: LoadedModel,
    logits: SupervisedLogits,
    questions: Sequence[EditQuestion],
    *,
    followed: Mapping[TokenRow, Following] = MappingProxyType({}),
    changes: Mapping[TokenRow, ReferenceChange] = MappingProxyType({}),
    coarse: SupervisedLogits | None = None,
    generate_all: bool = False,
) -> tuple[EditOutcome, ...]:
    """Put the questions to the edited model, given as a model and as a function of rows (`logits`).

    One teacher-forced pass over the rows that are not in `followed` shows how far greedy generation follows the expected
    answer. If it follows to the end, stopping token included, the answer is right. Otherwise generation continues from
    there, only until the answer is decided: a wrong answer to a short target is left unfinished ("Lisb…"). changes: those of
    the questions' references, if locality is measured. coarse: as for `follow`. generate_all: generate every answer in full
    instead.
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
        got = _said(decoder, answers[index], question) if index in answers else question.expected
        right = normalise_answer(got) in map(normalise_answer, question.names)
        exact = known[question.row].instead is None
        change = changes.get(question.reference) if question.reference else None
        outcomes.append(question.outcome(got, right, exact, **(vars(change) if change else {})))
    return tuple(outcomes)


def edit_metrics(outcomes: Sequence[EditOutcome]) -> dict[str, float]:
    """The metrics of these outcomes by their names in the results table, each the mean over the edits.

    An edit with several prompts of a kind counts once, with their mean. `reliability`, `generalization` and `portability`
    (and their teacher-forced twins, `_tf`) are means over the formats except `unseen`; each format, `unseen` too, has
    its own, such as `reliability.FORMAT`. For long targets there are `reliability_f1` and `reliability_contains`, and the
    same for generalization. What was not asked, or has no finite value, is absent.
    """
    values: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))  # by metric and edit
    for outcome in outcomes:
        if outcome.kind == "locality":
            names = LOCALITY_FIELDS
        else:
            names = {f"{outcome.kind}.{outcome.format}": "correct"}
            if outcome.format != UNSEEN:
                names |= {outcome.kind: "correct", f"{outcome.kind}_tf": "correct_tf"}
                if outcome.kind != "portability" and is_long(outcome.expected):
                    names |= {f"{outcome.kind}_f1": "f1", f"{outcome.kind}_contains": "contains"}
        for name, field in names.items():
            values[name][outcome.edit_id].append(getattr(outcome, field))
    return {
        name: sum(sum(marks) / len(marks) for marks in by_edit.values()) / len(by_edit)
        for name, by_edit in values.items()
        if not any(None in marks for marks in by_edit.values())
    }


def asked_counts(questions: Sequence[EditQuestion]) -> dict[str, float]:
    """`n_edits`, the number of edits that the questions are about, and, where a metric is a mean over fewer of them, the number
    of those: `n_edits.generalization` and the like, and for long targets `n_edits.reliability_long`."""
    asked: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        asked["n_edits"].add(question.edit_id)
        asked[f"n_edits.{question.kind}"].add(question.edit_id)
        if question.kind in ("reliability", "generalization") and is_long(question.expected):
            asked[f"n_edits.{question.kind}_long"].add(question.edit_id)
    counts = {name: float(len(edits)) for name, edits in asked.items()}
    return {name: count for name, count in counts.items() if name == "n_edits" or count < counts["n_edits"]}


@torch.no_grad()
def reference_changes(
    edited: SupervisedLogits, unedited: SupervisedLogits, questions: Sequence[EditQuestion]
) -> dict[TokenRow, ReferenceChange]:
    """How far the predictions along each reference answer of the questions differ between two models."""
    rows = sorted({q.reference for q in questions if q.reference}, key=lambda row: (len(row.token_ids), row.token_ids))
    changes = {}
    for part in batches(rows, most=BATCH):
        before, after = unedited(rows[part]), edited(rows[part])  # (K, V)
        best, token = after.max(-1)
        same = ((before.argmax(-1) == token) & best.isfinite()).cpu()
        lengths = [len(row.target_ids) for row in rows[part]]
        firsts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        pairs = slices(before[firsts], after[firsts])
        divergences = torch.cat([divergence(*pair).cpu() for pair in pairs]).clamp(min=0).tolist()
        for row, kept, kl in zip(rows[part], same.split(lengths), divergences, strict=True):
            finite = kl if math.isfinite(kl) else None
            changes[row] = ReferenceChange(float(kept.double().mean()), bool(kept[0]), finite)
    return changes


def follow(
    logits: SupervisedLogits, rows: Sequence[TokenRow], coarse: SupervisedLogits | None = None
) -> list[Following]:
    """How far greedy generation would follow each row's supervised tokens.

    coarse: the same model computed coarsely, which decides the rows that are not close (`retake`); their losses are
    coarse, too.
    """
    found, margins = _followings(coarse or logits, rows)
    if coarse:

        def exactly(indices: list[int]) -> np.ndarray:
            """A margin's shift is its change or, if the row is now followed differently, the sum of both margins."""
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
    """As `follow` without `coarse`, and how far each row is from being followed differently: the smallest gap up
    to its first miss, in nats, float64 (rows,)."""
    found, margins = [], []
    for row, scores in zip(rows, scores_by_row(logits, rows, most=BATCH), strict=True):
        best = scores.best.tolist()
        matched = next((at for at, token in enumerate(best) if token != row.target_ids[at]), len(best))
        instead = best[matched] if matched < len(best) else None
        found.append(Following(matched, instead, float(-scores.log_likelihood.mean())))
        margins.append(float(scores.gap[: matched + 1].min()))
    return found, np.array(margins)


def _said(decoder: GreedyDecoder, answer: OpenAnswer, question: EditQuestion) -> str:
    """The text of an answer, ended like the name that it equals, or like the expected answer if it equals none."""
    texts = {name: decoder.text(replace(answer, full_stops=question.full_stops(name))) for name in question.names}
    equal = (text for name, text in texts.items() if normalise_answer(text) == normalise_answer(name))
    return next(equal, texts[question.expected])


def _begun(question: EditQuestion, following: Following | None) -> OpenAnswer:
    """The answer before generation: with the tokens that teacher forcing has shown (`following`), or without any."""
    row = question.row
    begun = OpenAnswer(
        row.token_ids[: row.start],
        full_stops=max(map(question.full_stops, question.names)),
        limit=max(NEW_TOKENS, len(row.target_ids)),
    )
    if following is None or following.instead is None:
        return begun
    only = None if question.also_right or is_long(question.expected) else question.expected
    return replace(begun, token_ids=(*row.target_ids[: following.matched], following.instead), expected=only)
