"""One edit under the protocols of different papers: how far published figures disagree because of how they ask.

    python -m tests.benchmarks.protocols --edits FILE [--limit 100] [--positions 22.mlp_down 6.mlp_down] [--seeds 0 1 2]

Trains plain LocFT-BF with raw prompts, the model's EOS behind the target (as LocFT-BF does) and without it (as several
editors do), and measures each delta, with raw prompts and as questions, by

- tokens: share of the target's tokens that are the likeliest ones, teacher-forced (EasyEdit's `rewrite_acc`);
- teacher-forced: all of them are; and with EOS: the EOS behind them, too;
- contains: the target is somewhere in 32 greedy tokens; starts: it is at their beginning;
- exact: the answer up to EOS, the end of the line or of the sentence equals the target (this project's `reliability`).

Prints a table: mean over seeds and, in brackets, their range.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from locft.data.answers import normalise_answer
from locft.data.requests import load_edits
from locft.engine.tail_engine import TailEngine
from locft.measure.generation import BATCH, OpenAnswer, complete_answers
from locft.measure.token_scores import scores_by_row
from locft.model.delta import EditDelta, applied
from locft.model.models import DTYPES, LoadedModel, load_model
from locft.model.positions import TuningPosition
from locft.model.precision import training_precision
from locft.train.encoding import encode_edits
from locft.train.examples import TrainingExamples
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.token_rows import TokenRow

FORMS = ("raw", "qa")
MEASURES = ("tokens", "teacher-forced", "with EOS", "contains", "starts", "exact")


def measured(
    loaded: LoadedModel, engine: TailEngine, delta: EditDelta, rows: Sequence[TokenRow], targets: Sequence[str]
) -> dict[str, float]:
    """Each of `MEASURES` over the edits, in [0, 1]."""
    logits = engine.forward(TuningPosition.parse(delta.position).layer)(delta.weights(loaded.model))
    scores = scores_by_row(logits, rows, most=BATCH)
    hits = [[best == wanted for best, wanted in zip(one.best.tolist(), row.target_ids, strict=True)]
            for row, one in zip(rows, scores, strict=True)]  # fmt: skip
    prompts = [row.token_ids[: row.start] for row in rows]
    ended = [OpenAnswer(ids, full_stops=target.count(".")) for ids, target in zip(prompts, targets, strict=True)]
    with applied(loaded, delta):  # without a text that ends an answer, `NEW_TOKENS` tokens are generated
        texts = complete_answers(loaded, [OpenAnswer(ids, until=()) for ids in prompts])
        answers = complete_answers(loaded, ended)
    wanted, said, exact = ([*map(normalise_answer, text)] for text in (targets, texts, answers))
    by_measure = {
        "tokens": [sum(hit[:-1]) / len(hit[:-1]) for hit in hits],
        "teacher-forced": [all(hit[:-1]) for hit in hits],
        "with EOS": [all(hit) for hit in hits],
        "contains": [target in text for target, text in zip(wanted, said, strict=True)],
        "starts": [text.startswith(target) for target, text in zip(wanted, said, strict=True)],
        "exact": [target == text for target, text in zip(wanted, exact, strict=True)],
    }
    return {name: sum(values) / len(values) for name, values in by_measure.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", default="atlas")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--positions", nargs="+", default=["22.mlp_down", "6.mlp_down"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    requests = load_edits(options.edits, limit=options.limit).requests
    rows = {form: encode_edits(loaded.tokenizer, requests, form) for form in FORMS}
    trained = {"with EOS": rows["raw"], "without": tuple(TokenRow(r.token_ids[:-1], r.start) for r in rows["raw"])}
    positions = [TuningPosition.parse(position) for position in options.positions]
    every = [*rows["raw"], *rows["qa"], *trained["without"]]
    engine = TailEngine(loaded, every, [position.layer for position in positions], on_disk=False)
    precision = training_precision("auto")
    settings = TrainingSettings(learning_rate=options.learning_rate, batch_size=10, precision=precision)
    targets = [request.target for request in requests]
    print(f"| position | trained | asked | {' | '.join(MEASURES)} |\n|{'---|' * (3 + len(MEASURES))}")
    for position in positions:
        for name, examples in trained.items():
            forward = engine.training_forward(position, examples, DTYPES[precision])
            deltas = [
                finetune(
                    loaded, TrainingExamples.of_rows(examples), position, replace(settings, seed=seed), forward
                ).delta
                for seed in options.seeds
            ]
            for form in FORMS:
                found = [measured(loaded, engine, delta, rows[form], targets) for delta in deltas]
                cells = []
                for measure in MEASURES:
                    values = [100 * one[measure] for one in found]
                    cells.append(f"{sum(values) / len(values):.0f}% ({min(values):.0f}-{max(values):.0f})")
                print(f"| {position} | {name} | {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
