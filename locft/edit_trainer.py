"""Training as trials call it: a position and settings in, a delta out.

What several training runs share (rows in other formats, prefixes, guards, curvature) is made when first needed and kept.
"""

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from locft.background import background_rows, prefix_texts
from locft.curvature import factor_bytes, measured_once
from locft.data.edit_request import EditRequest
from locft.data.requests import load_edits
from locft.engine.tail_engine import TailEngine, logits_with, unedited_logits
from locft.errors import InputError
from locft.measure.evaluation import follow
from locft.measure.generation import greedy_answers
from locft.model.models import DTYPES, LoadedModel, computed_with
from locft.model.positions import TuningPosition, layer_prefix, parameter_names
from locft.process import moved
from locft.train.encoding import encode_edit, encode_edits, encode_prompt
from locft.train.examples import Guards, TrainingExamples
from locft.train.formats import available, parse_formats
from locft.train.kept_state import KeptState
from locft.train.methods import HELD_BACK
from locft.train.methods.curvature import Curvature
from locft.train.pipelines import Beside, Earlier, Training, TrainingSettings, Watch, final_loss, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import Forward, TokenRow, windows

PREFIXES = 5
"""Different prefixes for each prompt, as in the paper's appendix A.4, divided among the formats, with at least two for each."""
GUARDS = 64
"""Maximum number of guards of a kind."""
GUARD_TOKENS = 8
"""Maximum number of tokens of the unedited model's answer that a guard covers."""
WINDOW = 32
"""Maximum number of tokens in a guard that is prose."""
SCALES = tuple(step / 20 for step in range(19, 9, -1))
"""Factors tried when a change is shrunk: 0.95 down to 0.5."""
CURVATURE_BYTES, TOGETHER_BYTES = 2**30, 2**28
"""Up to the first size, the curvature of a whole layer is measured at once; above it, only that of the trained position. Several
layers are measured at once up to the second size."""


T = TypeVar("T")


@dataclass(frozen=True)
class EditTrainer:
    """Trains one set of edits on one model, at any position and with any settings. The model is left unchanged."""

    loaded: LoadedModel
    requests: tuple[EditRequest, ...]
    rows: tuple[TokenRow, ...]
    """Token rows of the edits as raw prompts."""
    engine: TailEngine | None
    """The fast forward pass; None if everything is computed with the full model."""
    asked: str = ""
    """A hash of everything that a stream may be measured on along the way."""
    prose: tuple[TokenRow, ...] = ()
    """Rows that curvature is measured on; if empty, the background rows, made when first needed."""
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def train(
        self,
        position: TuningPosition,
        settings: TrainingSettings,
        earlier: Earlier | None = None,
        watch: Watch | None = None,
    ) -> Training:
        """Train the edits at a position. earlier: the edits that a stream continues. watch: called after each arrival of a stream.

        Raises InputError for settings that this model or these edits do not support.
        """
        examples = self.examples(settings)
        rows = examples.rows
        curvature = self.curvature(position, settings.precision) if settings.method in HELD_BACK else {}
        forward: Forward = partial(full_forward, self.loaded.model)
        engine = self._engine(rows)
        if settings.noise and not engine:
            raise InputError(
                "noise: this model is computed as a whole, so there are no boundary states to add noise to; expected 0"
            )
        if engine:
            noise = _gaussian(settings.noise, settings.seed) if settings.noise else None
            forward = engine.training_forward(position, rows, DTYPES[settings.precision], noise)
        training = finetune(
            self.loaded,
            examples,
            position,
            settings,
            forward,
            curvature,
            earlier,
            Beside(watch, None if earlier else self._kept_state(position, settings)),
        )
        if settings.shrink == "yes" and not training.diverged:
            training = self._shrunk(training, position, examples, settings, forward)
        return training

    def examples(self, settings: TrainingSettings) -> TrainingExamples:
        """The examples that training with these settings draws from."""
        formats = available(self.loaded.tokenizer, parse_formats(settings.train_formats, trained=True))
        plain, prefixed, guards = self._once(self._plain, formats), (), None
        if settings.prefix_share:
            prefixed = self._once(self._prefixed, formats, settings.precision)
        if settings.guard != "none":
            guards = self._once(self._guards, settings.guard, settings.precision)
        return TrainingExamples(self.rows, plain, prefixed, settings.prefix_share, guards)

    def curvature(self, position: TuningPosition, precision: str) -> dict[str, Curvature]:
        """Damped curvature of the position's parameters, by name, from passes in the precision that training computes in. Measured
        once for all positions of the layer, together with other layers that are trained on this machine."""
        names = parameter_names(self.loaded.model, position)
        last, found = self._kept.get("curvature", (None, {}))  # only the last: it is large
        if last != (names, precision):
            layers, prose = self._measured_together(position), self.prose or self.background(precision)
            measured = measured_once(self._computing_in(precision), layers, position.layer, prose, names)
            found = {name: measured[name].damped() for name in names}
            self._kept["curvature"] = (names, precision), found
        return found

    def _computing_in(self, precision: str) -> LoadedModel:
        """The model in the dtype that training computes in."""
        return replace(self.loaded, model=self.engine.model_in(DTYPES[precision])) if self.engine else self.loaded

    def _measured_together(self, position: TuningPosition) -> dict[int, list[str]]:
        """The parameters, by layer, whose curvature is measured in the same pass as a position's. The position's alone if the
        curvature of its layer is too large."""
        model = self.loaded.model
        shapes = {name: value.shape for name, value in model.named_parameters()}
        layers = self.engine.layers if self.engine and position.layer in self.engine.layers else (position.layer,)
        prefixes = {layer: f"{layer_prefix(model, layer)}." for layer in layers}
        named = {layer: [name for name in shapes if name.startswith(prefix)] for layer, prefix in prefixes.items()}
        sizes = {layer: sum(factor_bytes(shapes[name]) for name in names) for layer, names in named.items()}
        if sizes[position.layer] > CURVATURE_BYTES:
            return {position.layer: list(parameter_names(model, position))}
        groups: list[list[int]] = [[]]
        for layer in layers:
            if groups[-1] and sum(sizes[one] for one in (*groups[-1], layer)) > TOGETHER_BYTES:
                groups.append([])
            groups[-1].append(layer)
        return {layer: named[layer] for layer in next(group for group in groups if position.layer in group)}

    def _kept_state(self, position: TuningPosition, settings: TrainingSettings) -> KeptState | None:
        """Where the state of this training is kept; None with noise, because the state of its generator is not kept."""
        if settings.noise:
            return None
        loaded = self.loaded
        computed = [*computed_with(loaded.model), torch.get_num_threads(), self.engine is None]
        edits = [(request.prompt, request.target) for request in self.requests]
        rows = [loaded.tokenizer.chat_template, [row.token_ids for row in self.rows]]
        return KeptState([loaded.fingerprint, computed, str(position), asdict(settings), edits, rows, self.asked])

    def _once(self, make: Callable[..., Any], *given: Any) -> Any:
        """What a method makes of arguments, made in the first call and kept."""
        key = make.__name__, *given
        if key not in self._kept:
            self._kept[key] = make(*given)
        return self._kept[key]

    def background(self, precision: str) -> tuple[TokenRow, ...]:
        """Text on which nothing is measured (`locft.background`), written in that precision."""
        return self._once(self._background, precision)

    def _background(self, precision: str) -> tuple[TokenRow, ...]:
        return background_rows(self._computing_in(precision))

    def _plain(self, formats: Sequence[str]) -> tuple[tuple[TokenRow, ...], ...]:
        by_format = (encode_edits(self.loaded.tokenizer, self.requests, form) for form in formats)
        return tuple(zip(*by_format, strict=True))

    def _prefixed(self, formats: Sequence[str], precision: str) -> tuple[tuple[TokenRow, ...], ...]:
        texts = prefix_texts(self.loaded, self.background(precision))
        each = max(2, PREFIXES // len(formats))
        drawn = random.Random(0)
        rows = []
        for request in self.requests:
            before = iter(drawn.sample(texts, min(each * len(formats), len(texts))))
            encoded = (
                encode_edit(self.loaded.tokenizer, f"{text} {request.prompt}", request.target, form)
                for form in formats
                for text in itertools.islice(before, each)
            )
            rows.append(tuple(encoded))
        return tuple(rows)

    def _guards(self, kind: str, precision: str) -> Guards:
        rows = self._guard_rows(kind, precision)
        if not rows:
            raise InputError(
                f"guard: got {kind}, but no such prompts can be made from these edits; expected another guard or none"
            )
        return Guards(rows, unedited_logits(self.loaded, self._engine(rows)))

    def _guard_rows(self, kind: str, precision: str) -> tuple[TokenRow, ...]:
        """Guards of a kind: windows of prose, or prompts with the beginning of the unedited model's answer."""
        if kind == "prose":
            return tuple(_some(windows(self.background(precision), WINDOW)))
        prompts = _some(_same_relation(self.requests) if kind == "same_relation" else _locality_like(self.requests))
        rows = []
        for prompt, answer in zip(prompts, greedy_answers(self.loaded, prompts), strict=True):
            ids = encode_prompt(self.loaded.tokenizer, prompt)
            rows.append(TokenRow(ids + answer.token_ids[:GUARD_TOKENS], len(ids)))
        return tuple(rows)

    def _engine(self, rows: Sequence[TokenRow]) -> TailEngine | None:
        """An engine over these rows: the workbench's own if it has them all."""
        if self.engine is None or all(row in self.engine.tree for row in rows):
            return self.engine
        return self._once(self.engine.over, tuple(rows))

    def _shrunk(
        self,
        training: Training,
        position: TuningPosition,
        examples: TrainingExamples,
        settings: TrainingSettings,
        forward: Forward,
    ) -> Training:
        """The change scaled down for as long as every prompt that holds at full size, raw or in a trained format, still does."""
        model, engine = self.loaded.model, self._engine(examples.rows)
        rows = list(dict.fromkeys(itertools.chain(examples.raw, *examples.plain)))

        def holding(scale: float) -> set[TokenRow]:
            weights = training.delta.scaled(scale).weights(model)
            followed = follow(logits_with(self.loaded, engine, position.layer, weights), rows)
            return {row for row, following in zip(rows, followed, strict=True) if following.instead is None}

        wanted = holding(1.0)
        best = min(itertools.takewhile(lambda scale: wanted <= holding(scale), SCALES), default=1.0)
        if best == 1.0:
            return training
        delta = training.delta.scaled(best)
        logits = forward(delta.weights(model, torch.float32))
        return replace(training, delta=delta, trained_loss=final_loss(logits, examples, settings, training.pieces))


def _gaussian(share: float, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds Gaussian noise with `share` of each feature's standard deviation, freshly drawn in each call."""
    draws = torch.Generator().manual_seed(seed)

    def noisy(states: torch.Tensor) -> torch.Tensor:
        drawn = moved(torch.randn(states.shape, generator=draws), states.device).to(states.dtype)
        return states + share * states.flatten(0, -2).std(0) * drawn

    return noisy


def _some(found: list[T]) -> list[T]:
    """At most `GUARDS` of them, spread over all."""
    return found[:: max(1, len(found) // GUARDS)][:GUARDS]


def _same_relation(requests: Sequence[EditRequest]) -> list[str]:
    """Prompts of the edits with another edit's subject in place of their own, except prompts that train or measure an edit."""
    taken = _prompts_of(requests)
    known = [request for request in requests if request.subject and request.subject in request.prompt]
    apart = 1 + len(known) // 2 if len(known) > 2 else 1
    others = known[apart:] + known[:apart]
    swapped = [own.prompt.replace(own.subject, other.subject) for own, other in zip(known, others, strict=True)]
    return [prompt for prompt in dict.fromkeys(swapped) if prompt not in taken]


def _locality_like(requests: Sequence[EditRequest]) -> list[str]:
    """Questions about well-known facts, except prompts that train or measure an edit and those that name its subject. An edit
    without a subject bars every question about something that its prompt mentions."""
    taken = _prompts_of(requests)
    subjects = [request.subject for request in requests if request.subject]
    mentioned = {word for request in requests if not request.subject for word in _words(request.prompt)}
    return [
        prompt
        for prompt, about in _general_prompts().items()
        if prompt not in taken and not about & mentioned and not any(subject in prompt for subject in subjects)
    ]


def _prompts_of(requests: Sequence[EditRequest]) -> set[str]:
    """Every prompt that trains or measures one of the edits."""
    return {
        prompt
        for request in requests
        for prompt in (
            request.prompt,
            *request.rephrases,
            *(one.prompt for one in request.locality),
            *(one.prompt for one in request.portability),
        )
    }


def _general_prompts() -> dict[str, set[str]]:
    """Questions about well-known facts, each with the words for what it is about: those that occur in questions of at most
    two answers, such as a country's capital and its language."""
    answers = {one.prompt: one.answer for request in load_edits("atlas").requests for one in request.locality}
    found: dict[str, set[str | None]] = defaultdict(set)
    for prompt, answer in answers.items():
        for word in _words(prompt):
            found[word].add(answer)
    return {prompt: {word for word in _words(prompt) if len(found[word]) <= 2} for prompt in answers}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
