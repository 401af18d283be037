"""Reaching the Ray that a study runs on, and what fits into it."""

import socket
import tempfile
import time

import pytest

from locft.errors import InputError
from sweeps.run import cluster, dispatch
from sweeps.run.cluster import check_nodes, on_workers, ray_cluster
from sweeps.study.schema import Resources


def test_a_cluster_that_does_not_answer_is_told_within_seconds():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    began = time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(InputError, match=f"127.0.0.1:{port}.*nothing answers") as caught:
            with ray_cluster(address, Resources()):
                pytest.fail("there is no cluster")
        assert "ray start --head" in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_machine_too_busy_to_start_ray_is_told(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.")  # as Ray has it

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(InputError, match="could not be started on this machine: .*The current node timed out"):
        with ray_cluster(None, Resources()):
            pytest.fail("there is no Ray")


@pytest.mark.parametrize(
    ("resources", "have", "expected"),
    [
        ({}, {"CPU": 8}, 8),
        ({"cpus": 3}, {"CPU": 8}, 2),
        ({"concurrent": 3}, {"CPU": 8}, 3),
        ({"concurrent": 30}, {"CPU": 8}, 8),
        ({"gpus": 0.1, "device": "cuda"}, {"CPU": 64, "GPU": 3}, 30),
        ({"gpus": 1, "cpus": 4}, {"CPU": 8, "GPU": 4}, 2),
        ({"gpus": 0.6}, {"CPU": 64, "GPU": 2}, 2),
        ({"gpus": 2}, {"CPU": 64, "GPU": 5}, 2),
    ],
)
def test_trials_at_a_time(resources, have, expected):
    resources.pop("device", None)
    assert Resources(**resources).places([have]) == expected


def test_a_trial_fits_on_one_node_or_not_at_all():
    small, large, head = {"CPU": 4.0, "GPU": 1.0, "memory": 4e9}, {"CPU": 9.0, "memory": 16e9}, {"memory": 8e9}
    assert Resources(cpus=3).places([small, small, large, head]) == 5
    assert Resources(cpus=6).places([small, small, large]) == 1
    assert Resources(gpus=0.5).places([small, large, small]) == 4
    assert Resources().places([small, large, head], trial_bytes=3 * 10**9) == 1 + 5
    with pytest.raises(InputError, match="6 CPUs and 0 GPUs, but there are 4 CPUs and 1 GPUs on the largest"):
        Resources(cpus=6).places([small, head, small])
    with pytest.raises(InputError, match="1 CPUs and 2 GPUs, but there are 4 CPUs and 1 GPUs on the largest"):
        Resources(gpus=2).places([large, small, small])
    with pytest.raises(InputError, match="0 CPUs and 0 GPUs"):
        Resources().places([head])


@pytest.mark.parametrize(
    ("resources", "gigabytes", "expected"), [({}, 12, 4), ({}, 100, 8), ({}, 1, 1), ({"concurrent": 6}, 12, 6)]
)
def test_no_more_trials_than_memory_holds(resources, gigabytes, expected):
    have = {"CPU": 8.0, "memory": gigabytes * 1e9}
    assert Resources(**resources).places([have], trial_bytes=3 * 10**9) == expected


@pytest.mark.parametrize(
    ("resources", "named"), [({"gpus": 1}, "1 GPUs, but there are 8 CPUs and 0 GPUs"), ({"cpus": 9}, "9 CPUs")]
)
def test_resources_that_nothing_has(resources, named):
    with pytest.raises(InputError, match=named):
        Resources(**resources).places([{"CPU": 8.0}])


def test_nodes_that_do_not_see_the_model_are_named(ray_running, tmp_path, monkeypatch):
    import ray

    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    check_nodes(str(model))
    check_nodes("owner/name")

    with monkeypatch.context() as patched:  # the folder is gone by the time the node looks
        remote = ray.remote_function.RemoteFunction._remote
        patched.setattr(
            ray.remote_function.RemoteFunction,
            "_remote",
            lambda self, *given, **options: (model / "model.safetensors").unlink() or remote(self, *given, **options),
        )
        with pytest.raises(
            InputError, match="does not see .*model as this machine does .*there are no files there.*hub id"
        ):
            check_nodes(str(model))


def test_room_follows_the_nodes_and_shrinks_when_memory_runs_out(ray_running, monkeypatch):
    import ray

    have = {"CPU": 2.0}
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [gone, {"Alive": True, "Resources": have}])
    monkeypatch.setattr(dispatch, "LOOK_SECONDS", -1.0)
    with ray_cluster(None, Resources()) as room:
        assert room.trials() == 2
    have["CPU"] = 6.0
    assert room.trials() == 6 and not room.empty
    have["CPU"] = 0.0
    assert room.trials() == 1 and room.empty, "another node may come"
    have["CPU"] = 6.0
    assert room.trials() == 6 and not room.empty
    room.narrow(running=6)
    assert room.trials() == 3


def test_functions_run_on_workers_and_their_errors_come_back(ray_running):
    assert on_workers([lambda: 1, lambda: "two"], Resources()) == [1, "two"]

    def wrong():
        raise InputError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        on_workers([lambda: 1, wrong], Resources())


def test_a_temporary_folder_too_long_for_sockets(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert cluster._short_folder() == {}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 10)))
    assert cluster._short_folder() == {"_temp_dir": "/tmp/ray"}
    monkeypatch.setattr(cluster, "_SHORT", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"too long for Ray's sockets.*set RAY_TMPDIR"):
        cluster._short_folder()
