"""A study in MLflow for tests: results as trials produce them, opened and finished; and a server that is no MLflow server."""

import dataclasses
import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd

from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.tracking.study_run import Tracker
from sweeps.tracking.trial_run import StudyInputs, dataset_input

STUDY = "study-1"


def config(layer: int = 3, module: str = "mlp_down", **changes) -> TrialConfig:
    base = TrialConfig(
        model_fingerprint="f" * 64, data_fingerprint="d" * 64, layers=30, layer=layer, module=module,
        pipeline="breadth_first", batch_size=10, learning_rate=0.004, seed=0, loss_average="edit", epochs=25,
        skip_below=0.01, stop_below=0.01,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def result(trial: TrialConfig | None = None, *, edits: int = 20, epochs: int = 25) -> TrialResult:
    """A result whose numbers depend on nothing but the trial."""
    trial = trial or config()
    draw = random.Random(trial.id)
    reliability, capability = draw.uniform(0.2, 1), draw.uniform(0.4, 0.6)
    metrics = {
        "reliability": reliability, "generalization": reliability * 0.7, "locality": draw.random(),
        "capability": capability, "capability_change": capability - 0.55, "capability.facts": draw.random(),
        "drift_kl": draw.random(), "n_edits": float(edits), "train_loss": 0.01, "seconds": 31.4,
        "seconds_per_edit": 0.314, "diverged": 0.0,
    }  # fmt: skip
    outcomes = tuple(
        {
            "edit_id": f"e{number}", "kind": kind, "prompt": f"The capital of <b>country</b> {number} is",
            "expected": "Österby", "got": "Oslo" if number % 3 else "Österby", "correct": number % 3 == 0,
            "correct_tf": True,
        }
        for number in range(edits)
        for kind in ("reliability", "generalization", "locality")
    )  # fmt: skip
    losses = tuple(4 / (1 + epoch) + draw.random() / 10 for epoch in range(epochs))
    return TrialResult(trial, "done", None, metrics, losses, outcomes)


def failure(trial: TrialConfig, cause: str = "OutOfMemoryError: 3 GiB wanted") -> TrialResult:
    return TrialResult(trial, "failed", cause)


def open_study(tracker: Tracker) -> tuple[str, StudyInputs]:
    """The study's run and the inputs of its trials."""
    run_id = tracker.open_run(
        "layer-sweep", study_yaml="name: layer-sweep\nmodel: smollm2-135m\n", description="Layers of a small model.",
        environment={"python": "3.11", "packages": {"torch": "2.13"}}, tags={"locft.version": "0.1"},
    )  # fmt: skip
    data = (
        dataset_input("atlas", "a" * 64, "atlas", "edits", {"edits": 20, "contradictions": 0}),
        dataset_input("probes", "c" * 64, "probes", "capability", {"items": 640}),
    )
    facts = {"layers": 30, "dtype": "float32"}
    return run_id, StudyInputs("HuggingFaceTB/SmolLM2-135M", "f" * 64, facts, data, "here 1 CPU 0 GPU")


@contextmanager
def web_server(status: int, body: str) -> Iterator[int]:
    """A server on this machine that answers every request so; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def finish(tracker: Tracker, results: pd.DataFrame, html: str) -> None:
    best = results.sort_values("reliability").iloc[-1]
    position = f"{best.layer}.{best.module}"
    tracker.finish(
        results, html, {"trial_ids": (best.trial_id,), "position": position, "why": "most reliable"},
        {"best_reliability": best.reliability, "hypervolume": 0.31, "trials_done": len(results), "none": float("nan")},
        "done", answer=f"**{position}** edits best.",
    )  # fmt: skip
