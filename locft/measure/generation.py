"""Greedy answers: what a model says to a prompt, up to EOS or the end of its turn, line or sentence.

Legend: B answers of a batch, T tokens.
"""

import copy
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from locft.data.answers import ARTICLES, may_go_on, normalise_answer, sentence_ends
from locft.limits import check_limits
from locft.model.models import LoadedModel
from locft.train.encoding import answer_end, encode_prompt, encode_question
from locft.train.formats import CHAT, RAW

NEW_TOKENS = 32
"""Length limit of an answer, in tokens."""
BATCH = 64
ROUND = 4
"""Number of new tokens after which answers that are decided leave their batch."""
ONE_BY_ONE = ("rwkv",)
"""Model types that transformers 5 decodes wrongly in batches: RWKV's one-token step mixes the states of the rows."""


@dataclass(frozen=True)
class ModelAnswer:
    """What a model says to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """The generated tokens, including the stopping one."""


@dataclass(frozen=True)
class OpenAnswer:
    """An answer that is being generated."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    """The answer so far."""
    full_stops: int = 0
    """Number of sentence ends that belong to the answer: "St. Louis" has one inside, "1.2 million" none."""
    limit: int = NEW_TOKENS
    """Maximum number of tokens."""
    expected: str | None = None
    """If given, generation may stop once the answer can no longer equal this."""
    until: tuple[str, ...] | None = None
    """If given, the answer ends before the first of these, instead of at the end of its line or sentence."""


def greedy_answers(loaded: LoadedModel, prompts: Sequence[str]) -> list[ModelAnswer]:
    """Greedy answers of at most `NEW_TOKENS` tokens. An answer does not depend on the other prompts."""
    decoder = GreedyDecoder(loaded)
    answers = decoder.complete([OpenAnswer(encode_prompt(loaded.tokenizer, prompt)) for prompt in prompts])
    return [ModelAnswer(decoder.text(answer), decoder.needed(answer)) for answer in answers]


def line_answers(loaded: LoadedModel, prompts: Sequence[str], tokens: int, form: str = RAW) -> list[str]:
    """The greedy answer to each prompt in a format, up to the end of its line and at most `tokens` tokens.

    Raises InputError for prompts that do not fit into the model.
    """
    ids = [encode_question(loaded.tokenizer, prompt, form) for prompt in prompts]
    check_limits(loaded.model, loaded.tokenizer, loaded.name, [(one, tokens) for one in ids])
    return complete_answers(loaded, [OpenAnswer(one, full_stops=tokens, limit=tokens) for one in ids])


def complete_answers(loaded: LoadedModel, answers: Sequence[OpenAnswer]) -> list[str]:
    """The texts of answers, generated to their ends."""
    decoder = GreedyDecoder(loaded)
    return [decoder.text(answer) for answer in decoder.complete(answers)]


def end_tokens(loaded: LoadedModel) -> list[int]:
    """The tokens with which a model ends an answer."""
    own = loaded.model.generation_config.eos_token_id
    others = own if isinstance(own, list) else [own] if own is not None else []
    said = (answer_end(loaded.tokenizer, form) for form in (RAW, CHAT))
    return list(dict.fromkeys([*said, *others]))


class GreedyDecoder:
    """Generates answers in batches with a KV cache, prompts padded on the left.

    Models with a recurrent state, which cannot be padded, get batches of equal length.
    """

    def __init__(self, loaded: LoadedModel):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.ends = end_tokens(loaded)

    def complete(self, answers: Sequence[OpenAnswer]) -> list[OpenAnswer]:
        """Continue each answer until it is done.

        A batch runs until its last answer is done. Answers with an expected text are mostly decided after a token or
        two: they get one short round, and the few that are left go on in batches of their own.
        """
        completed, new_tokens = list(answers), ROUND
        while rest := [index for index, answer in enumerate(completed) if not self.is_done(answer)]:
            for batch in self._batches(completed, rest):
                chosen = [completed[index] for index in batch]
                most = max(new_tokens if answer.expected is not None else answer.limit for answer in chosen)
                for index, answer in zip(batch, self._generate(chosen, most), strict=True):
                    completed[index] = answer
            new_tokens = max(completed[index].limit for index in rest)
        return completed

    def is_done(self, answer: OpenAnswer) -> bool:
        """True if no further token is needed."""
        if not answer.token_ids:
            return False
        if self._has_ended(answer):
            return True
        return answer.expected is not None and cannot_become(self._said(answer), answer.expected)

    def text(self, answer: OpenAnswer) -> str:
        """The answer, with "…" if it was left unfinished."""
        said = self._said(answer)
        if answer.until is not None:
            return said[: min((said.index(stop) for stop in answer.until if stop in said), default=None)]
        if not self._has_ended(answer):
            return said + "…"
        line = said.split("\n")[0]
        return line[: next(iter(sentence_ends(line)[answer.full_stops :]), None)].strip()

    def needed(self, answer: OpenAnswer) -> tuple[int, ...]:
        """The tokens, without a last one that only showed that the full stop before it is not a decimal point."""
        before = replace(answer, token_ids=answer.token_ids[:-1])
        ends = [len(sentence_ends(self._said(one))) for one in (before, answer)] if before.token_ids else [0]
        surplus = min(ends) > answer.full_stops and may_go_on(self._said(before))
        return before.token_ids if surplus else answer.token_ids

    def _has_ended(self, answer: OpenAnswer) -> bool:
        if answer.token_ids[-1] in self.ends or len(answer.token_ids) >= answer.limit:
            return True
        said = self._said(answer)
        if answer.until is not None:
            return any(stop in said for stop in answer.until)
        return "\n" in said or len(sentence_ends(said)) - may_go_on(said) > answer.full_stops

    def _said(self, answer: OpenAnswer) -> str:
        """The text so far, without the stopping token, even where the tokenizer does not know it as special."""
        ids = answer.token_ids[:-1] if answer.token_ids[-1] in self.ends else answer.token_ids
        said = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return said if answer.until is not None else said.lstrip()

    def _batches(self, answers: Sequence[OpenAnswer], rest: Sequence[int]) -> list[list[int]]:
        """Batches of indices of answers of similar length, of exactly equal length for models with a recurrent state."""
        size = 1 if self.model.config.model_type in ONE_BY_ONE else BATCH
        equal_lengths = getattr(self.model, "_is_stateful", False)
        batches: list[list[int]] = []
        lengths = {index: len(answers[index].prompt_ids) + len(answers[index].token_ids) for index in rest}
        for index in sorted(rest, key=lengths.__getitem__):
            last = batches[-1] if batches else []
            if not last or len(last) == size or (equal_lengths and lengths[last[0]] != lengths[index]):
                batches.append([])
            batches[-1].append(index)
        return batches

    @torch.no_grad()
    def _generate(self, answers: Sequence[OpenAnswer], tokens: int) -> list[OpenAnswer]:
        """Continue one batch: each answer until it is done, with at most `tokens` new tokens."""
        begun = [answer.prompt_ids + answer.token_ids for answer in answers]
        input_ids, mask = (
            pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")  # (B, T)
            for rows in (begun, [[1] * len(ids) for ids in begun])
        )
        most = min(tokens, max(answer.limit - len(answer.token_ids) for answer in answers))
        config = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=self.ends, pad_token_id=self.ends[0]
        )
        stop = _StopWhenDone(self, answers, input_ids.shape[1])
        # The states that the head takes are a non-contiguous slice. With those, PyTorch's bfloat16 product on CPUs copies the
        # whole head once per row: 3.6 GB and 10 s for a batch of 64 with a head of 49,152 x 576.
        closed_up = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(),)
        )
        try:
            with_settings(self.model, config).generate(
                input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        finally:
            closed_up.remove()
        return stop.answers


class _StopWhenDone(StoppingCriteria):
    """Tells `generate` which answers are done, and keeps each as it was when it became done."""

    def __init__(self, decoder: GreedyDecoder, answers: Sequence[OpenAnswer], start: int):
        """start: index of the first new token."""
        self.decoder, self.begun, self.start = decoder, answers, start
        self.answers = list(answers)
        self.done = [False] * len(answers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            if not self.done[row]:
                self.answers[row] = replace(self.begun[row], token_ids=(*self.begun[row].token_ids, *ids))
                self.done[row] = self.decoder.is_done(self.answers[row])
        return torch.tensor(self.done, device=input_ids.device)


def cannot_become(said: str, expected: str) -> bool:
    """True if certainly no continuation of `said` equals `expected` after `normalise_answer`.

    Words said in full stay; the last one may go on, or be an article, which does not count. Where normalisation is less
    simple than that, nothing is certain.
    """
    wanted = normalise_answer(expected).split()
    if not any(map(str.isalnum, "".join(wanted))):  # such as "?": letters and digits never vanish
        return any(map(str.isalnum, said)) or _other_marks(said, " ".join(wanted))
    if not "".join(wanted).isalnum() or set(wanted) & ARTICLES or "\ufffd" in said:
        return False
    chunks = said.split()
    last = "" if not chunks or said[-1].isspace() else chunks.pop()
    words = [word for word in normalise_answer(" ".join(chunks)).split() if word not in ARTICLES] if chunks else []
    if not "".join(words).isalnum() and words:
        return False
    if words != wanted[: len(words)]:
        at = next(at for at, word in enumerate(words) if [word] != wanted[at : at + 1])
        number = len(words) == at + 1 and words[at].isdigit() and "".join(wanted[at : at + 1]).startswith(words[at])
        return not number  # which further groups of digits may continue
    partial = normalise_answer(last) if last.isascii() and last.isalnum() else ""
    if not partial or any(article.startswith(partial) for article in ARTICLES):
        return False
    return len(words) == len(wanted) or not wanted[len(words)].startswith(partial)


def _other_marks(said: str, wanted: str) -> bool:
    """The same for an expected answer of ASCII punctuation alone, from which normalisation removes nothing."""
    if not set(wanted) <= {*string.punctuation, " "} or "\ufffd" in said:
        return False
    return not wanted.startswith(normalise_answer(said))


def with_settings(model: PreTrainedModel, config: GenerationConfig) -> Any:
    """A view of the model (same weights) with these generation settings and no others: `generate` fills whatever a call leaves
    open from the model's own settings, and many models ship a repetition penalty there."""
    view = copy.copy(model)
    view.generation_config = config
    return view


def drawn_tokens(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token (K,) for each row of logits (K, V), drawn from its distribution: several times faster than multinomial."""
    cumulated = logits.softmax(-1).cumsum(-1)
    heights = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, heights)[:, 0].clamp(max=logits.shape[1] - 1)
