"""Where a command runs: without a name, without a home, behind a proxy, on some of the cores."""

import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import proxy_bypass

import pytest

import sweeps
from locft.cache import cache_folder
from locft.errors import InputError
from locft.machine import usable_cores
from sweeps.commands.surroundings import settle

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing that `settle` sets outlives a test."""
    before = dict(os.environ)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_an_ordinary_place_needs_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    assert settle() == [] and dict(os.environ) == before


def test_a_user_without_a_name(monkeypatch, tmp_path):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: nobody())
    settle()
    assert getpass.getuser() == "unknown"


@pytest.mark.parametrize("home", ["/proc/none", "/proc", None])
def test_a_home_that_is_none(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    (sentence,) = settle()
    place = tmp_path / "tmp" / f"locft-{os.getuid()}"
    assert str(place) in sentence and "XDG_CACHE_HOME" in sentence
    assert cache_folder().is_relative_to(place) and Path("~").expanduser() == place
    assert place.stat().st_mode & 0o077 == 0, "nobody else reads or writes it"


def test_a_cache_that_is_named_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert settle() == [] and cache_folder() == tmp_path / "c" / "locft"
    assert os.environ["HOME"] != "/proc/none", "the state of a study has a place, too"


def test_no_place_at_all(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(InputError, match="set HOME and XDG_CACHE_HOME"):
        settle()


@pytest.mark.parametrize(
    "text", ["it broke\nsomewhere", "Traceback (most recent call last):\n  File x\nKeyError: it broke"]
)
def test_what_nobody_foresaw_says_what_broke_and_how_to_report_it(text, monkeypatch, locft):
    def fail():
        raise RuntimeError(text)

    monkeypatch.delenv("LOCFT_DEBUG", raising=False)
    monkeypatch.setattr("sweeps.commands.cli.settle", fail)
    said = locft("status", "study.yaml")
    assert said.code == 1 and "it broke" in said.err and "LOCFT_DEBUG=1" in said.err and "report it" in said.err


@pytest.mark.parametrize("given", [None, "intra.example", "*"])
def test_this_machine_is_exempt_from_proxies(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
    settle()
    for name in ("no_proxy", "NO_PROXY"):
        hosts = os.environ[name].split(",")
        assert hosts == ["*"] if given == "*" else {"127.0.0.1", "localhost", *([given] if given else [])} <= set(hosts)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_hosts_that_are_exempt_under_one_name_stay_exempt(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for each in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "intra.example")
    settle()
    assert proxy_bypass("intra.example") and proxy_bypass("127.0.0.1")


def test_the_functions_for_notebooks_begin_with_it_too(monkeypatch, workplace, study_file, capsys):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert sweeps.load_results(study_file()).empty
    assert "no writable home folder" in capsys.readouterr().err
    assert proxy_bypass("127.0.0.1") and os.environ["HOME"] != "/proc/none"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a system that binds no processes to cores")
def test_cores_are_those_that_the_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from locft.machine import usable_cores as u; print(u())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "1\n" and usable_cores() == len(os.sched_getaffinity(0))
