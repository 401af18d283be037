"""Tasks of lm-evaluation-harness on an edited model in memory, paired item by item with the unedited one.

The harness builds the requests and scores the answers; the answers are computed here. Both models share the layers below
the edited layer, so the log-likelihoods of both come from one pass through those (`locft.engine`).
Needs the extra `harness`: import this module only where it is used.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from lm_eval import evaluate, utils
from lm_eval.api.model import TemplateLM

from locft.data.harness_tasks import SEED, asked_generation
from locft.engine.tail import NoTailView
from locft.engine.tail_engine import TailEngine, logits_with, unedited_logits
from locft.limits import most_positions
from locft.measure.capability import Change, score_rows
from locft.measure.generation import BATCH, GreedyDecoder, OpenAnswer
from locft.model.delta import EditDelta, applied
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition
from locft.train.token_rows import SupervisedLogits, TokenRow, batches

CHUNK_TOKENS = 8192
"""Tokens whose hidden states at the edited layer are held at once."""
RESAMPLES, RESAMPLES_OF_ANY = 2000, 100
"""Bootstrap resamples for metrics that are means over the items, and for others, such as BLEU, which take longer."""
TELL_SECONDS = 20

Scores = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, of the unedited and of the edited model on the same items."""

    task: str
    metric: str
    """Its name, with its filter if the task has several."""
    items: int
    unedited: float
    edited: float | None
    """None without a delta."""
    change: Change | None


def measure_tasks(
    loaded: LoadedModel,
    delta: EditDelta | None,
    tasks: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[TaskScore]:
    """Every metric of the tasks that `load_tasks` found; a group or tag is scored over the items of all its tasks.

    limit: measure only this many items of each task, the first ones. tell: receives sentences about the progress.
    """
    every = {own: task for found in tasks.values() for own, task in found.items()}
    model = PairedModel(loaded, delta, tell)
    samples = [_samples(model, every, limit)]
    for sentence in model.notices:
        tell(sentence)
    if delta:
        model.edited = True
        with applied(loaded, delta):  # for generation
            samples.append(_samples(model, every, limit))
    return [score for name, found in tasks.items() for score in _scores(name, found, samples)]


def _samples(model: "PairedModel", tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[dict[str, Any]]]:
    """The harness's log of every item of every task, in order."""
    for task in tasks.values():
        task.set_fewshot_seed(seed=SEED)
    found = evaluate(lm=model, task_dict={"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=True)
    return found["samples"]


def _scores(name: str, tasks: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Iterator[TaskScore]:
    """samples: those of the unedited model and, if there is one, of the edited model."""
    values: dict[tuple[str, str], list[list[Any]]] = defaultdict(list)
    combine: dict[str, Callable[[list[Any]], float]] = {}
    for part, task in tasks.items():
        combine = {**task.aggregation(), **combine}
        for pair in zip(*(one[part] for one in samples), strict=True):
            if len({(item["doc_id"], item["filter"], item["prompt_hash"]) for item in pair}) > 1:
                raise RuntimeError(f"{part}: the harness gave the edited model different prompts from the unedited one")
            for metric in pair[0]["metrics"]:
                if metric in task.aggregation():
                    values[metric, pair[0]["filter"]].append([item[metric] for item in pair])
    several = len({kind for _, kind in values}) > 1
    for (metric, kind), pairs in values.items():
        mean, columns = combine[metric], [list(column) for column in zip(*pairs, strict=True)]
        numbers = all(isinstance(value, int | float) for column in columns for value in column)
        plain = numbers and getattr(mean, "__name__", "") in ("mean", "nanmean")
        found = [float(mean(column)) for column in columns]
        change = paired_change(columns[0], columns[1], None if plain else mean) if len(columns) > 1 else None
        label = f"{metric} ({kind})" if several else metric
        yield TaskScore(name, label, len(pairs), found[0], found[1] if change else None, change)


def paired_change(
    before: Sequence[Any], after: Sequence[Any], combine: Callable[[list[Any]], float] | None = None, seed: int = 0
) -> Change:
    """After minus before, with the 95% percentile interval of a paired bootstrap over the items.

    combine: turns the items' values into one number; None is their mean."""
    generator, size = np.random.default_rng(seed), len(before)
    if combine is None:
        differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
        mean = float(differences.mean())
        drawn = [differences[generator.integers(size, size=size)].mean() for _ in range(RESAMPLES)]
    else:
        mean = float(combine(list(after))) - float(combine(list(before)))
        places = (generator.integers(size, size=size) for _ in range(RESAMPLES_OF_ANY))
        drawn = [combine([after[at] for at in one]) - combine([before[at] for at in one]) for one in places]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Change(mean, float(low), float(high))


@dataclass
class _Progress:
    """Reports from time to time how many requests of a kind are done, and how long the rest will probably take."""

    tell: Callable[[str], None]
    what: str
    total: int
    began: float = field(default_factory=time.monotonic)
    told: float = field(default_factory=time.monotonic)

    def done(self, count: int) -> None:
        now = time.monotonic()
        if count < self.total and now - self.told > TELL_SECONDS:
            left, self.told = (now - self.began) / count * (self.total - count), now
            unit = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
            self.tell(f"lm-eval: {count:,} of {self.total:,} {self.what}, about {unit} left")


class PairedModel(TemplateLM):
    """A model and an edit of it behind the harness's interface: texts in, scores and texts out."""

    def __init__(self, loaded: LoadedModel, delta: EditDelta | None, tell: Callable[[str], None]):
        super().__init__()
        self.loaded, self.delta, self.tell = loaded, delta, tell
        self.tokenizer = loaded.tokenizer
        self.edited = False
        """Whether to answer as the edited model. Its scores may be known already from the unedited model's turn."""
        self.notices: dict[str, None] = {}
        """Sentences that say where a task is not run as it is written, in order."""
        longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(longest or math.inf, self.tokenizer.model_max_length)
        self._known: dict[TokenRow, tuple[Scores, ...]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **special)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scores]:
        return super().loglikelihood(requests, disable_tqdm=True)  # no progress bar between our lines

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Scores]:
        """requests: the original texts, context tokens, continuation tokens."""
        return self._scored([self._row(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows: list[list[TokenRow]] = []
        size = int(min(self.max_length, 2**20))
        if places := most_positions(self.loaded.model):
            size = min(size, places - 1)  # our rows end with the last predicted token, which the harness leaves out
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, size, 1)
            rows.append([self._row(*utils.make_disjoint_window(window)) for window in windows])
        scores = iter(self._scored([row for own in rows for row in own]))
        return [sum(log_likelihood for log_likelihood, _ in islice(scores, len(own))) for own in rows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers with the model's current weights."""
        open_answers = []
        for request in requests:
            context, given = request.args
            until, tokens, sampled = asked_generation(given)
            if sampled:
                self._note(f"{request.task_name}: asks for sampled answers; they are decoded greedily instead")
            if tokens > self.max_length // 2:
                tokens = int(self.max_length // 2)
                self._note(f"answers are cut off after {tokens:,} tokens, half of the model's context")
            ids = self._cut(self.tok_encode(context) or [self.prefix_token_id], tokens)
            open_answers.append(OpenAnswer(tuple(ids), limit=tokens, until=until))
        decoder, texts, progress = GreedyDecoder(self.loaded), [], _Progress(self.tell, "answers", len(requests))
        for at in range(0, len(open_answers), BATCH):
            texts += [decoder.text(answer) for answer in decoder.complete(open_answers[at : at + BATCH])]
            progress.done(len(texts))
        return texts

    def _note(self, sentence: str) -> None:
        self.notices[sentence] = None

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> TokenRow:
        ids = self._cut((*context, *continuation), 0, keep=len(continuation) + 1)
        return TokenRow(tuple(ids), len(ids) - len(continuation))

    def _cut(self, ids: Sequence[int], room: int, keep: int = 1) -> Sequence[int]:
        """The end of a text that leaves `room` for more tokens in the model's context."""
        most = max(keep, self.max_length - room)
        if len(ids) > most:
            context = f"the model's context of {self.max_length:,} tokens"
            self._note(f"texts longer than {context} are truncated at the beginning")
            return ids[len(ids) - int(most) :]
        return ids

    def _scored(self, asked: Sequence[TokenRow]) -> list[Scores]:
        """Each row's scores, by the unedited or the edited model. Rows that are new are scored by both together."""
        rows = sorted(
            {*asked} - self._known.keys(), key=lambda row: (-row.start, row.token_ids[: row.start], row.token_ids)
        )
        engine, progress, done = self._tail(rows), _Progress(self.tell, "log-likelihoods", len(rows)), 0
        for part in batches(rows, tokens=CHUNK_TOKENS, supervised=math.inf):
            chunk, found = rows[part], []
            for logits in self._models(engine and engine.over(chunk)):
                log_likelihoods, leads = score_rows(logits, chunk)
                found.append(zip(log_likelihoods.tolist(), (leads > 0).tolist(), strict=True))
            self._known |= zip(chunk, zip(*found, strict=True), strict=True)
            progress.done(done := done + len(chunk))
        return [self._known[row][self.edited] for row in asked]

    def _tail(self, rows: Sequence[TokenRow]) -> TailEngine | None:
        """An engine, tried on some of the rows; the longest row decides how they are packed."""
        if self.delta is None or not rows:
            return None
        try:
            return TailEngine(self.loaded, [max(rows, key=lambda row: len(row.token_ids)), *rows[:3]], on_disk=False)
        except NoTailView:
            return None

    def _models(self, engine: TailEngine | None) -> Iterator[SupervisedLogits]:
        """The unedited and, if there is one, the edited model."""
        yield unedited_logits(self.loaded, engine)
        if self.delta:
            layer = TuningPosition.parse(self.delta.position).layer
            yield logits_with(self.loaded, engine, layer, self.delta.weights(self.loaded.model))
