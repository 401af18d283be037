"""The cluster files: what Ray's launcher accepts, and what keeps a cluster private, tested and useful."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FILES = ("ray_cluster.yaml", "ray_cluster_local.yaml")
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|aws_secret|password|RAY_AUTH_TOKEN=|\b[0-9a-f]{32,}\b"
    r"|\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|(?-i:\bhf_\w{20,})",
    re.IGNORECASE,
)


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(params=FILES)
def cluster(request) -> dict:
    return load(request.param)


@pytest.mark.parametrize("name", FILES)
def test_rays_launcher_accepts_it(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(name))
    validate_config(prepared)
    # no default of Ray's may slip in: those of AWS install a nightly build
    assert prepared["setup_commands"] == load(name)["setup_commands"]


@pytest.mark.parametrize("name", FILES)
def test_holds_no_secret(name):
    assert SECRET.search((ROOT / name).read_text(encoding="utf-8")) is None


@pytest.mark.parametrize("leak", ["AKIA" + "A" * 16, "RAY_AUTH_TOKEN=x", "0123456789abcdef" * 4, "BEGIN PRIVATE KEY"])
def test_a_secret_would_be_seen(leak):
    assert SECRET.search(f"# {leak}")


def test_trials_run_on_gpu_workers_that_scale():
    config = load("ray_cluster.yaml")
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0 and head["resources"]["GPU"] == 0
    assert types
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1
        assert 1 <= worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["ImageId"] == head["node_config"]["ImageId"]
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_every_machine_of_the_local_cluster_is_used():
    config = load("ray_cluster_local.yaml")
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_nodes_install_this_project_with_the_tested_versions(cluster):
    (install,) = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert "-c ~/locft-sweeps/constraints.txt" in install
    assert '"$HOME/locft-sweeps[cluster]"' in install
    mounts = cluster["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "cluster" in project["project"]["optional-dependencies"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {mounts.get(f"~/locft-sweeps/{name}") for name in needed} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_nodes_share_the_token_and_ask_for_it(cluster):
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_ray_ports_are_not_opened(cluster):
    assert "security_group" not in cluster["provider"]
    (head,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head
    commands = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert "0.0.0.0" not in commands


def test_shells_get_the_settings(cluster, tmp_path):
    """The set-up commands that write them are run, twice, in a home folder of their own."""
    (tmp_path / ".bashrc").touch()
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    commands = [text for text in cluster["setup_commands"] if "locft-env" in text and "/bin/pip" not in text]
    for command in commands * 2:
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    assert (tmp_path / ".bashrc").read_text().splitlines() == [". ~/.locft-env"]
    said = subprocess.check_output(["bash", "-c", ". ~/.bashrc; env"], env=environment, text=True)
    settings = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["RAY_USAGE_STATS_ENABLED"] == "0"
    assert settings["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert settings["PATH"].split(":")[0] == f"{tmp_path}/locft-env/bin"


def test_ray_starts_with_these_settings(cluster):
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all(command.startswith(". ~/.locft-env; ") for command in commands)
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("--disable-usage-stats" in command for command in starts)


def test_constraints_are_exact_versions_and_fit_the_project():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["test"]
    assert {re.match(r"[A-Za-z0-9_.-]+", entry)[0].lower() for entry in asked} - pinned == set()
    assert "locft-sweeps" not in pinned
