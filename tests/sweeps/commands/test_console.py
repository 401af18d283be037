"""The first line of a command that takes long to begin."""

import io
import time

import pytest
from rich.console import Console

from sweeps.commands import console


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def written(request, monkeypatch):
    """What is written on standard error, which is a terminal or not."""
    stream = io.StringIO()
    monkeypatch.setattr(console, "_err", Console(file=stream, force_terminal=request.param))
    return stream, request.param


def test_a_terminal_is_told_that_something_is_loading(written):
    stream, terminal = written
    console.break_silence(0.01)
    time.sleep(0.3)
    assert ("loading PyTorch" in stream.getvalue()) == terminal


def test_a_line_that_comes_first_takes_its_place(written):
    stream, _ = written
    console.break_silence(0.2)
    console.notice("reading")
    time.sleep(0.4)
    assert "reading" in stream.getvalue() and "loading" not in stream.getvalue()
