"""One model, one set of edits, one capability suite: everything that any number of trials share.

    bench = Workbench.prepare(load_model("smollm2-135m"), load_edits("atlas", limit=50), load_suite("probes"))
    training = bench.train(TuningPosition.parse("22.mlp_down"), TrainingSettings(learning_rate=4e-3))
    print(bench.measure(training.delta).metrics)

The unedited model is measured once, before anything is edited, and the result can be passed to other processes.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from locft.cache import content_key
from locft.data.edit_request import EditRequest
from locft.data.requests import EditSet
from locft.data.suites import Suite
from locft.edit_trainer import EditTrainer
from locft.engine.tail import NoTailView
from locft.engine.tail_engine import TailEngine, logits_with, unedited_logits
from locft.further import ENOUGH, further_trained
from locft.limits import check_limits
from locft.measure.capability import (
    PROSE_TOKENS,
    EncodedSuite,
    SuiteScores,
    capability_change,
    encode_suite,
    measure_drift,
    measure_perplexity,
    open_answers,
    score_suite,
    suite_rows,
)
from locft.measure.evaluation import (
    EditOutcome,
    EditQuestion,
    ask,
    asked_counts,
    edit_metrics,
    edit_questions,
    follow,
    locality_prompts,
    question_rows,
    reference_changes,
)
from locft.measure.generation import BATCH, NEW_TOKENS, ModelAnswer, complete_answers, greedy_answers
from locft.measure.token_scores import scores_by_row
from locft.model.delta import EditDelta, applied
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edits, encode_prompt
from locft.train.formats import CHAT, RAW, asked, parse_formats
from locft.train.pipelines import Training, TrainingSettings, Watch
from locft.train.token_rows import SupervisedLogits, TokenRow

in_memory = partial(TailEngine, on_disk=False)
"""An engine that keeps the hidden states of any layer in this process, for this process alone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """The unedited model, measured once."""

    locality_answers: tuple[ModelAnswer, ...]
    """Answers to the unrelated prompts of all edits, in order. An edit should leave them as they are."""
    scores: SuiteScores | None
    """Capability items answered right; None without a suite."""
    metrics: dict[str, float] = field(default_factory=dict)
    """reliability and generalization (before any edit; also of each format), capability, capability.<task>,
    perplexity."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        answers = [[answer.text, list(answer.token_ids)] for answer in self.locality_answers]
        return {"answers": answers, "scores": self.scores and self.scores.to_dict(), "metrics": self.metrics}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Baseline":
        answers = tuple(ModelAnswer(text, tuple(ids)) for text, ids in value["answers"])
        return cls(answers, value["scores"] and SuiteScores.from_dict(value["scores"]), value["metrics"])


@dataclass(frozen=True)
class Measurement:
    """What an edit did: finite metrics by name, and the answer to every question."""

    metrics: dict[str, float]
    outcomes: tuple[EditOutcome, ...]


@dataclass(frozen=True)
class Workbench:
    """A model with tokenized edits, questions and capability items, ready for trials."""

    loaded: LoadedModel
    requests: tuple[EditRequest, ...]
    rows: tuple[TokenRow, ...]
    """Token rows of the edits as raw prompts, one each."""
    questions: tuple[EditQuestion, ...]
    """Questions about the edits, or about a sample of them."""
    suite: EncodedSuite | None
    baseline: Baseline
    engine: TailEngine | None
    """The fast forward pass; None if everything is computed with the full model."""
    whole: "Workbench | None" = None
    """The larger workbench of which this one holds the first edits (`first`)."""
    _firsts: dict[Any, "Workbench"] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def prepare(
        cls,
        loaded: LoadedModel,
        edits: EditSet,
        suite: Suite | None,
        prose_tokens: int = PROSE_TOKENS,
        baseline: Baseline | None = None,
        *,
        engine: Callable[[LoadedModel, Sequence[TokenRow]], TailEngine] | None = in_memory,
        ask_formats: Sequence[str] = (RAW,),
        asked_places: Collection[int] | None = None,
    ) -> "Workbench":
        """Tokenize everything, and measure the unedited model unless its `baseline` is given.

        ask_formats: the formats that edits and rephrases are measured in (`locft.train.formats`); `chat` is left out, with a
        notice, if the tokenizer has no template, and `unseen` is added to any other than raw. engine: makes the fast forward
        pass over all rows; None computes everything with the full model, which also happens, with a warning, if the model
        has no tail view. asked_places: indices of the edits to ask about, None for all; a given baseline must have been
        measured on the same ones.
        """
        formats = asked(loaded.tokenizer, parse_formats(ask_formats))
        if CHAT in ask_formats and CHAT not in formats:
            _log.warning(
                "%s: its tokenizer has no chat template, so edits are not asked in the chat format", loaded.name
            )
        encoded = encode_suite(loaded.tokenizer, suite, prose_tokens) if suite else None
        items, begun = (suite_rows(encoded), open_answers(encoded)) if encoded else ([], [])
        rows = encode_edits(loaded.tokenizer, edits.requests)
        requests = edits.requests if asked_places is None else [edits.requests[at] for at in sorted(asked_places)]
        unrelated = locality_prompts(requests)
        check = partial(check_limits, loaded.model, loaded.tokenizer, loaded.name)
        texts = [(row.token_ids, 0) for row in (*rows, *items)] + [(one.prompt_ids, one.limit) for one in begun]
        check([*texts, *((encode_prompt(loaded.tokenizer, prompt), NEW_TOKENS) for prompt in unrelated)])
        answers = baseline.locality_answers if baseline else greedy_answers(loaded, unrelated)
        questions = edit_questions(loaded.tokenizer, requests, answers, formats)
        asked_rows = question_rows(questions)
        check((row.token_ids[: row.start], max(NEW_TOKENS, len(row.target_ids))) for row in asked_rows)
        every = [*rows, *asked_rows, *items]
        try:
            fast = engine(loaded, every) if engine else None
        except NoTailView as reason:
            _log.warning("%s: every step computes the whole model: %s", loaded.name, reason)
            fast = None
        if baseline is None:
            baseline = measure_unedited(loaded, unedited_logits(loaded, fast), answers, questions, encoded)
        return cls(loaded, edits.requests, rows, questions, encoded, baseline, fast)

    @cached_property
    def trainer(self) -> EditTrainer:
        """The trainer of these edits, with everything that it keeps from one training to the next."""
        asked: list[Any] = [row.token_ids for row in question_rows(self.questions)]
        if self.suite:
            asked += [self.suite.fingerprint, [row.token_ids for row in self.suite.prose]]
        return EditTrainer(self.loaded, self.requests, self.rows, self.engine, content_key(asked))

    def train(self, position: TuningPosition, settings: TrainingSettings, watch: Watch | None = None) -> Training:
        """Train the edits at a position. The model is left unchanged. watch: called after each arrival of a stream."""
        return self.trainer.train(position, settings, watch=watch)

    def first(self, count: int, asked_places: Collection[int] | None = None) -> "Workbench":
        """The workbench of the first `count` edits, 0 for all, which shares everything else. asked_places: indices of the
        edits to ask about, None for all that this one asks about. The baseline stays that of all edits. The same call returns
        the same object, with everything that its trainer keeps."""
        if asked_places is None and count in (0, len(self.requests)):
            return self
        key = count, None if asked_places is None else tuple(asked_places)
        if key not in self._firsts:
            requests = self.requests[: count or len(self.requests)]
            asked = {one.id for one in (requests if asked_places is None else [requests[at] for at in asked_places])}
            questions = tuple(question for question in self.questions if question.edit_id in asked)
            rows, whole = self.rows[: len(requests)], self.whole or self
            self._firsts[key] = replace(self, requests=requests, rows=rows, questions=questions, whole=whole)
        return self._firsts[key]

    @cached_property
    def bits(self) -> np.ndarray:
        """(E,) information in each edit: -log2 of the probability that the unedited model gives to the target after the raw
        prompt, without the end token, which is the same in every edit."""
        if self.whole:
            return self.whole.bits[: len(self.rows)]
        scores = scores_by_row(unedited_logits(self.loaded, self.engine), self.rows, most=BATCH)
        return np.array([-float(one.log_likelihood[:-1].sum()) / math.log(2) for one in scores])

    def measure(self, delta: EditDelta, *, whole_answers: bool = False) -> Measurement:
        """All metrics of the edited model, computed in the model's own dtype, by their names in the results table.

        whole_answers: also generate wrong answers in full, for a human reader. This changes no metric.
        """
        delta.require_base(self.loaded.name, self.loaded.fingerprint)
        started = time.perf_counter()
        edited, coarse = self.edited(delta)
        followed = follow(edited, self.rows)
        changes = reference_changes(edited, self.unedited(delta), self.questions)
        with applied(self.loaded, delta):
            outcomes = ask(
                self.loaded,
                edited,
                self.questions,
                followed=dict(zip(self.rows, followed, strict=True)),
                changes=changes,
                coarse=coarse,
                generate_all=whole_answers,
            )
        metrics = {**edit_metrics(outcomes), **asked_counts(self.questions), "delta_norm": delta.norm}
        metrics["merged_loss"] = sum(row.loss for row in followed) / len(followed)
        metrics["evaluate_seconds"] = time.perf_counter() - started
        if self.suite and self.baseline.scores:
            started = time.perf_counter()
            with applied(self.loaded, delta):
                scores = score_suite(edited, self.suite, coarse=coarse, complete=partial(complete_answers, self.loaded))
            change = capability_change(self.baseline.scores, scores)
            metrics |= capability_metrics(scores) | {"capability_change": change.mean}
            metrics |= {"capability_change_low": change.low, "capability_change_high": change.high}
            drift = measure_drift(edited, unedited_logits(self.loaded, self.engine), self.suite)
            metrics |= {"drift_kl": drift.kl, "perplexity": drift.perplexity}
            metrics["capability_seconds"] = time.perf_counter() - started
        return Measurement({name: value for name, value in metrics.items() if math.isfinite(value)}, outcomes)

    def measure_later(self, delta: EditDelta, steps: int, precision: str, seed: int) -> Measurement:
        """`measure` after `steps` steps of ordinary fine-tuning of all weights, on prose that drift is not measured on."""
        spare = self.suite.spare if self.suite else ()
        rows = spare if len(spare) >= ENOUGH else (*spare, *self.trainer.background(precision))
        later = further_trained(self.loaded, delta, rows, steps, precision, seed)
        return replace(self, engine=None).measure(later)  # the layers below the edit have changed as well

    def edited(self, delta: EditDelta) -> tuple[SupervisedLogits, SupervisedLogits | None]:
        """The edited model as a function of rows: exact, and coarse where that is faster
        (`TailEngine.coarse_forward`)."""
        weights, layer = delta.weights(self.loaded.model), TuningPosition.parse(delta.position).layer
        coarse = self.engine.coarse_forward(layer) if self.engine else None
        return logits_with(self.loaded, self.engine, layer, weights), coarse and coarse(weights)

    def unedited(self, delta: EditDelta) -> SupervisedLogits:
        """The unedited model, computed the same way (with its own weights as substitutes), so that both round alike."""
        weights = {name: self.loaded.model.get_parameter(name).detach() for name in delta.tensors}
        return logits_with(self.loaded, self.engine, TuningPosition.parse(delta.position).layer, weights)


def measure_unedited(
    loaded: LoadedModel,
    logits: SupervisedLogits,
    answers: Sequence[ModelAnswer],
    questions: Sequence[EditQuestion],
    suite: EncodedSuite | None,
) -> Baseline:
    """Measure the model before anything is edited."""
    before = ask(loaded, logits, [question for question in questions if question.kind != "locality"])
    metrics = {name: value for name, value in edit_metrics(before).items() if not name.endswith("_tf")}
    scores = None
    if suite:
        scores = score_suite(logits, suite, complete=partial(complete_answers, loaded))
        metrics |= capability_metrics(scores)
        metrics["perplexity"] = measure_perplexity(logits, suite)
    return Baseline(tuple(answers), scores, metrics)


def capability_metrics(scores: SuiteScores) -> dict[str, float]:
    """capability (the mean of the tasks) and capability.<task>."""
    return {"capability": scores.capability, **{f"capability.{task}": mean for task, mean in scores.accuracy.items()}}


def diverged_metrics(questions: Sequence[EditQuestion], baseline: Baseline) -> dict[str, float]:
    """Finite worst values for a training that diverged: nothing learnt, nothing kept. Divergences in nats are left out."""
    metrics = edit_metrics([question.outcome("", False, False, kept=0.0, first_kept=False) for question in questions])
    if baseline.scores:
        metrics |= dict.fromkeys(capability_metrics(baseline.scores), 0.0)
        changes = ("capability_change", "capability_change_low", "capability_change_high")
        metrics |= dict.fromkeys(changes, -baseline.metrics["capability"])
    return metrics
