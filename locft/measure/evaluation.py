"""Did the edit take? Reliability, generalization and locality by greedy answers.

An answer is what the model generates greedily until EOS, the end of the line or the end of the sentence; it is right
when it equals the expected one after SQuAD-style normalisation. Teacher-forced exactness is reported beside it and never
instead of it: teacher forcing hides the errors that follow the first one.
"""

import copy
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from locft.train.encoding import SupervisedLogits, TokenRow, encode_edit, encode_prompt
from locft.model.models import LoadedModel
from locft.data.edit_request import EditRequest
from locft.data.requests import ARTICLES, normalise_answer
from locft.measure.two_stage_scoring import retake
from locft.measure.token_scores import scores_by_row

Kind = Literal["reliability", "generalization", "locality"]
NEW_TOKENS = 32
BATCH = 64
ROUND = 4
"""Tokens after which the answers that are decided leave their batch."""
ONE_BY_ONE = ("rwkv",)
"""Model types that transformers 5 decodes wrongly in batches: RWKV's one-token step mixes the states of the rows."""


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """The generated tokens, the stopping one included."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that an edited model should give to it."""

    edit_id: str
    kind: Kind
    prompt: str
    expected: str
    row: TokenRow
    """Prompt and expected answer, EOS or the unedited model's stopping token included, for teacher forcing."""


@dataclass(frozen=True)
class Outcome:
    """What an edited model answered to one question."""

    edit_id: str
    kind: Kind
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
    """So many in a row are the most likely ones at their places."""
    instead: int | None
    """The most likely token at the place of the next; None where all are matched."""
    loss: float
    """Mean over the row's supervised tokens, in nats."""

    @property
    def way(self) -> tuple[int, int | None]:
        return self.matched, self.instead


def edit_questions(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], unedited: Sequence[Answer]
) -> tuple[Question, ...]:
    """All questions about the edits. `unedited`: the base model's answers to the `locality_prompts`, in order.

    Raises ValueError when there is not one answer per prompt (answers to the prompts of other edits).
    """
    if len(unedited) != (prompts := len(locality_prompts(requests))):
        raise ValueError(f"{len(unedited)} answers of the unedited model to {prompts} unrelated prompts, expected one each")
    questions = []
    answers = iter(unedited)
    for request in requests:
        row = encode_edit(tokenizer, request.prompt, request.target)
        questions.append(Question(request.id, "reliability", request.prompt, request.target, row))
        for prompt in request.rephrases:
            row = encode_edit(tokenizer, prompt, request.target)
            questions.append(Question(request.id, "generalization", prompt, request.target, row))
        for unrelated in request.locality:
            answer, prompt_ids = next(answers), encode_prompt(tokenizer, unrelated.prompt)
            row = TokenRow(prompt_ids + answer.token_ids, len(prompt_ids))
            questions.append(Question(request.id, "locality", unrelated.prompt, answer.text, row))
    return tuple(questions)


def locality_prompts(requests: Sequence[EditRequest]) -> list[str]:
    """The unrelated prompts of all edits, in order."""
    return [unrelated.prompt for request in requests for unrelated in request.locality]


def ask(
    edited: LoadedModel,
    logits: SupervisedLogits,
    questions: Sequence[Question],
    *,
    followed: Mapping[TokenRow, Following] = MappingProxyType({}),
    coarse: SupervisedLogits | None = None,
    generate_all: bool = False,
) -> tuple[Outcome, ...]:
    """Put the questions to the edited model.

    logits: the same edited model as a function of rows; `coarse` as of `follow`. One teacher-forced pass over the rows that are
    not in `followed` tells how far greedy generation follows the expected answer: where that is to its end, the stopping token
    included, the answer is right; elsewhere what is known goes on being generated only until it is decided, and a wrong answer
    is then left unfinished ("Lisb…"). `generate_all` generates every answer to its end, the plain way.
    """
    rest = list(dict.fromkeys(question.row for question in questions if question.row not in followed))
    known = {**followed, **dict(zip(rest, follow(logits, rest, coarse), strict=True))}
    ends = _end_tokens(edited)
    pending: dict[int, _Pending] = {}
    texts: dict[int, str] = {}
    for index, question in enumerate(questions):
        row, way = question.row, known[question.row]
        start = _Pending(row.token_ids[: row.start], (), _dots(question), _tokens(question), None)
        if generate_all:
            pending[index] = start
        elif way.instead is None:
            texts[index] = question.expected
        else:
            begun = replace(start, known=(*row.target_ids[: way.matched], way.instead), expected=question.expected)
            if begun.done(edited.tokenizer, ends, begun.known):
                texts[index] = begun.text(edited.tokenizer, ends, begun.known)
            else:
                pending[index] = begun
    for index, ids in zip(pending, _generate_all(edited, list(pending.values())), strict=True):
        texts[index] = pending[index].text(edited.tokenizer, ends, ids)
    return tuple(
        Outcome(
            question.edit_id,
            question.kind,
            question.prompt,
            question.expected,
            texts[index],
            normalise_answer(texts[index]) == normalise_answer(question.expected),
            known[question.row].instead is None,
        )
        for index, question in enumerate(questions)
    )


def edit_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Reliability, generalization and locality (and their teacher-forced twins, `_tf`), each the mean over the edits.

    An edit with several rephrases or unrelated prompts counts once, with their mean. A kind without questions is absent.
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

    coarse: the same model computed coarsely (`locft.measure.two_stage_scoring`), which decides what is not close; losses then are coarse, too.
    """
    found, margins = _followings(coarse or logits, rows)
    if coarse:

        def exactly(indices: list[int]) -> np.ndarray:
            again, exact = _followings(logits, [rows[index] for index in indices])
            before = margins[indices]
            same = [found[index].way == other.way for index, other in zip(indices, again, strict=True)]
            for index, other in zip(indices, again, strict=True):
                found[index] = other
            return np.where(same, np.abs(exact - before), exact + before)

        retake(np.nan_to_num(margins, nan=0.0), exactly)
    return found


def _followings(logits: SupervisedLogits, rows: Sequence[TokenRow]) -> tuple[list[Following], np.ndarray]:
    """And how far each is from being another one: the least gap up to its first miss, in nats."""
    found, margins = [], np.full(len(rows), math.inf)
    scores = scores_by_row(logits, rows, lambda row: len(row.token_ids), most=BATCH)
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        said = score.best.tolist()
        matched = next((at for at, token in enumerate(said) if token != row.target_ids[at]), len(said))
        instead = said[matched] if matched < len(said) else None
        found.append(Following(matched, instead, float(-score.log_likelihood.mean())))
        margins[index] = float(score.gap[: matched + 1].min())
    return found, margins


@torch.no_grad()
def greedy_answers(
    loaded: LoadedModel,
    prompts: Sequence[str],
    dots: Sequence[int] | None = None,
    new_tokens: Sequence[int] | None = None,
) -> list[Answer]:
    """Greedy answers in batches with a KV cache, prompts padded on the left.

    An answer ends at EOS, at a line end once something was said, at the first full stop after `dots[i]` others (an
    expected "St. Louis" has one inside), or after `new_tokens[i]` tokens (32 unless told). It depends on nothing else that
    is asked beside it. Models with a recurrent state are asked in batches of equal length, unpadded.
    """
    allowed = dots if dots is not None else [0] * len(prompts)
    limits = new_tokens if new_tokens is not None else [NEW_TOKENS] * len(prompts)
    pending = [
        _Pending(encode_prompt(loaded.tokenizer, prompt), (), allowed[index], limits[index], None)
        for index, prompt in enumerate(prompts)
    ]
    ends = _end_tokens(loaded)
    generated = _generate_all(loaded, pending)
    return [Answer(p.text(loaded.tokenizer, ends, ids), ids) for p, ids in zip(pending, generated, strict=True)]


@dataclass(frozen=True)
class _Pending:
    """An answer that is being generated."""

    prompt_ids: tuple[int, ...]
    known: tuple[int, ...]
    """Its first tokens, found without generating."""
    dots: int
    """Full stops that belong to the answer."""
    limit: int
    """Tokens at most, the known ones included."""
    expected: str | None
    """When given, the answer need not go on once it can no longer equal this."""

    def done(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], ids: Sequence[int]) -> bool:
        """Need no token follow `ids`, the known ones included?"""
        if ids[-1] in ends or len(ids) >= self.limit:
            return True
        said = _said(tokenizer, ids, ends)
        return _ended(said, self.dots) or (self.expected is not None and cannot_become(said, self.expected))

    def text(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], ids: Sequence[int]) -> str:
        """The answer; with "…" where it was left unfinished."""
        said = _said(tokenizer, ids, ends)
        whole = ids[-1] in ends or len(ids) >= self.limit or _ended(said, self.dots)
        return _cut(said, self.dots) if whole else said + "…"


def cannot_become(said: str, expected: str) -> bool:
    """Is it certain that no continuation of `said` equals `expected` after `normalise_answer`?

    Whole words that were said stay; the last one may go on, or be an article, which does not count. Where normalisation is
    less simple than that, nothing is certain.
    """
    wanted = normalise_answer(expected).split()
    if not any(map(str.isalnum, "".join(wanted))):  # such as "?": letters and digits never vanish
        return any(map(str.isalnum, said)) or _other_marks(said, " ".join(wanted))
    if not "".join(wanted).isalnum() or set(wanted) & ARTICLES or "\ufffd" in said:
        return False
    chunks = said.split()
    last = "" if not chunks or said[-1].isspace() else chunks.pop()
    words = [w for w in normalise_answer(" ".join(chunks)).split() if w not in ARTICLES] if chunks else []
    if not "".join(words).isalnum() and words:
        return False
    if words != wanted[: len(words)]:
        return True
    partial = normalise_answer(last) if last.isascii() and last.isalnum() else ""
    if not partial or any(article.startswith(partial) for article in ARTICLES):
        return False
    return len(words) == len(wanted) or not wanted[len(words)].startswith(partial)


def _other_marks(said: str, wanted: str) -> bool:
    """Nothing is taken from an answer of ASCII punctuation alone: does one that begins with `said` differ from `wanted`?"""
    if not set(wanted) <= {*string.punctuation, " "} or "\ufffd" in said:
        return False
    return not wanted.startswith(normalise_answer(said))


def _tokens(question: Question) -> int:
    """Tokens to generate at most: the usual 32, or more where the expected answer is longer."""
    return max(NEW_TOKENS, len(question.row.target_ids))


def _dots(question: Question) -> int:
    return 0 if question.kind == "locality" else question.expected.count(".")


def _generate_all(loaded: LoadedModel, pending: Sequence[_Pending]) -> list[tuple[int, ...]]:
    """The tokens of all answers, the known and the stopping ones included, in the order given.

    A batch is computed until its last answer is done. Answers to be given up as soon as they are decided mostly are after
    a token or two, so those are generated in rounds, and the few that are left go on in batches of their own.
    """
    found = [p.known for p in pending]
    tokens = [p.limit if p.expected is None else ROUND for p in pending]  # new ones of the next round, at most
    rest, ends = list(range(len(pending))), _end_tokens(loaded)
    while rest:
        begun = {index: replace(pending[index], known=found[index]) for index in rest}
        for batch in _batches(loaded, begun):
            answers = [begun[index] for index in batch]
            for index, ids in zip(batch, _generate(loaded, answers, max(tokens[i] for i in batch)), strict=True):
                found[index] = ids
        rest = [index for index in rest if not pending[index].done(loaded.tokenizer, ends, found[index])]
        tokens = [p.limit for p in pending]
    return found


def _batches(loaded: LoadedModel, begun: Mapping[int, _Pending]) -> list[list[int]]:
    """Of about one length; of exactly one for models with a recurrent state, which cannot be padded."""
    alone = loaded.model.config.model_type in ONE_BY_ONE
    size, equal_lengths = 1 if alone else BATCH, getattr(loaded.model, "_is_stateful", False)
    batches: list[list[int]] = []

    def length(index: int) -> int:
        return len(begun[index].prompt_ids) + len(begun[index].known)

    for index in sorted(begun, key=length):
        last = batches[-1] if batches else []
        if not last or len(last) == size or (equal_lengths and length(last[0]) != length(index)):
            batches.append([])
        batches[-1].append(index)
    return batches


@torch.no_grad()
def _generate(loaded: LoadedModel, pending: Sequence[_Pending], tokens: int) -> list[tuple[int, ...]]:
    """Known and new tokens of one batch: each answer until it is done, at most so many new tokens."""
    begun = [p.prompt_ids + p.known for p in pending]
    width = max(map(len, begun))
    input_ids = torch.zeros(len(pending), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(begun):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    ends = _end_tokens(loaded)
    most = min(tokens, max(p.limit - len(p.known) for p in pending))
    config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=ends, pad_token_id=ends[0])
    # Whatever a call leaves open, `generate` takes from the model's own generation settings, and many models ship a
    # repetition penalty there: ask a view of the model (same weights) that has no settings but ours.
    model = copy.copy(loaded.model)
    model.generation_config = config
    stop = _AnswerEnds(loaded.tokenizer, width, ends, pending)
    out = model.generate(
        input_ids.to(loaded.model.device),
        attention_mask=mask.to(loaded.model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    return [p.known + tuple(ids[: stop.lengths[row]]) for row, (p, ids) in enumerate(zip(pending, out[:, width:].tolist()))]


class _AnswerEnds(StoppingCriteria):
    """Tells `generate` which rows have said their answer, and remembers after how many new tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, start: int, ends: Sequence[int], pending: Sequence[_Pending]
    ):
        self.tokenizer, self.start, self.ends, self.pending = tokenizer, start, ends, pending
        self.lengths: list[int | None] = [None] * len(pending)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            answer = self.pending[row]
            if self.lengths[row] is None and answer.done(self.tokenizer, self.ends, [*answer.known, *ids]):
                self.lengths[row] = len(ids)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


def _end_tokens(loaded: LoadedModel) -> list[int]:
    own = loaded.model.generation_config.eos_token_id
    others = own if isinstance(own, list) else [own] if own is not None else []
    return list(dict.fromkeys([loaded.tokenizer.eos_token_id, *others]))


def _said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> str:
    """The text so far; a stopping token is no part of it, even where the tokenizer does not know it as special."""
    return tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=True).lstrip()


def _ended(said: str, dots: int) -> bool:
    return "\n" in said or said.count(".") > dots


def _cut(said: str, dots: int) -> str:
    return ".".join(said.split("\n")[0].split(".")[: dots + 1]).strip()
