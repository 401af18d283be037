"""Did the edit take? Reliability, generalization and locality by greedy answers.

An answer is what the model generates greedily until EOS, the end of the line or the end of the sentence; it is right
when it equals the expected one after SQuAD-style normalisation. Teacher-forced exactness is reported beside it and never
instead of it: teacher forcing hides the errors that follow the first one.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from locft.encoding import SupervisedLogits, TokenRow, encode_edit, encode_prompt
from locft.models import LoadedModel
from locft.requests import EditRequest, normalise_answer

Kind = Literal["reliability", "generalization", "locality"]
NEW_TOKENS = 32
BATCH = 64
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
    edited: LoadedModel, logits: SupervisedLogits, questions: Sequence[Question], *, generate_all: bool = False
) -> tuple[Outcome, ...]:
    """Put the questions to the edited model.

    logits: the same edited model as a function of rows. Where teacher forcing finds every expected token most likely, the
    stopping one included, greedy generation must give exactly that answer, so it is not run; `generate_all` runs it all the
    same (the plain way, for checking).
    """
    exact = exact_rows(logits, [question.row for question in questions])
    open_ = [question for question, right in zip(questions, exact, strict=True) if generate_all or not right]
    generated = iter(
        greedy_answers(edited, [q.prompt for q in open_], [_dots(q) for q in open_], [_tokens(q) for q in open_])
    )
    outcomes = []
    for question, right in zip(questions, exact, strict=True):
        got = question.expected if right and not generate_all else next(generated).text
        correct = normalise_answer(got) == normalise_answer(question.expected)
        outcomes.append(
            Outcome(question.edit_id, question.kind, question.prompt, question.expected, got, correct, right)
        )
    return tuple(outcomes)


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


@torch.no_grad()
def exact_rows(logits: SupervisedLogits, rows: Sequence[TokenRow]) -> list[bool]:
    """Per row: is every supervised token the most likely one at its place?"""
    exact = [False] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].token_ids))
    for start in range(0, len(rows), BATCH):
        batch = by_length[start : start + BATCH]
        best = logits([rows[index] for index in batch]).argmax(-1).tolist()  # (K,)
        for index in batch:
            expected = rows[index].target_ids
            exact[index] = tuple(best[: len(expected)]) == expected
            best = best[len(expected) :]
    return exact


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
    tokens = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    allowed = list(dots) if dots is not None else [0] * len(prompts)
    limits = list(new_tokens) if new_tokens is not None else [NEW_TOKENS] * len(prompts)
    answers: list[Answer | None] = [None] * len(prompts)
    alone = loaded.model.config.model_type in ONE_BY_ONE
    for batch in _generation_batches(tokens, 1 if alone else BATCH, getattr(loaded.model, "_is_stateful", False)):
        generated = _generate(
            loaded, [tokens[i] for i in batch], [allowed[i] for i in batch], [limits[i] for i in batch]
        )
        for index, answer in zip(batch, generated, strict=True):
            answers[index] = answer
    return answers  # type: ignore[return-value]  # every index is in one batch


def _tokens(question: Question) -> int:
    """Tokens to generate at most: the usual 32, or more where the expected answer is longer."""
    return max(NEW_TOKENS, len(question.row.target_ids))


def _dots(question: Question) -> int:
    return 0 if question.kind == "locality" else question.expected.count(".")


def _generation_batches(tokens: Sequence[tuple[int, ...]], size: int, equal_lengths: bool) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        last = batches[-1] if batches else []
        mixed = equal_lengths and last and len(tokens[last[0]]) != len(tokens[index])
        if not last or len(last) == size or mixed:
            batches.append([])
        batches[-1].append(index)
    return batches


def _generate(
    loaded: LoadedModel, prompts: Sequence[tuple[int, ...]], dots: Sequence[int], new_tokens: Sequence[int]
) -> list[Answer]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = _end_tokens(loaded)
    config = GenerationConfig(do_sample=False, max_new_tokens=max(new_tokens), eos_token_id=ends, pad_token_id=ends[0])
    # Whatever a call leaves open, `generate` takes from the model's own generation settings, and many models ship a
    # repetition penalty there: ask a view of the model (same weights) that has no settings but ours.
    model = copy.copy(loaded.model)
    model.generation_config = config
    stop = _AnswerEnds(loaded.tokenizer, width, ends, dots, new_tokens)
    out = model.generate(
        input_ids.to(loaded.model.device),
        attention_mask=mask.to(loaded.model.device),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    answers = []
    for row, ids in enumerate(out[:, width:].tolist()):
        kept = tuple(ids[: stop.lengths[row]])
        answers.append(Answer(_cut(_said(loaded.tokenizer, kept, ends), dots[row]), kept))
    return answers


class _AnswerEnds(StoppingCriteria):
    """Tells `generate` which rows have said their answer, and remembers after how many tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        start: int,
        ends: Sequence[int],
        dots: Sequence[int],
        new_tokens: Sequence[int],
    ):
        self.tokenizer, self.start, self.ends, self.dots, self.new_tokens = tokenizer, start, ends, dots, new_tokens
        self.lengths: list[int | None] = [None] * len(dots)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            if self.lengths[row] is None and (
                ids[-1] in self.ends
                or len(ids) >= self.new_tokens[row]
                or _ended(_said(self.tokenizer, ids, self.ends), self.dots[row])
            ):
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
