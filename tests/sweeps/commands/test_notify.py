"""Who is told when a study ends."""

import http.server
import json
import socket
import sys
import threading

import pytest

from locft.errors import InputError
from sweeps.commands.notify import Hooks


@pytest.fixture
def posted():
    """A server that remembers what is posted to it."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/secret-token", got
        server.shutdown()
        thread.join()


def writing(file):
    """A command that writes what it is told into a file."""
    return f"{sys.executable} -c 'import sys, pathlib; pathlib.Path({str(file)!r}).write_text(sys.stdin.read())'".replace(
        "'" + str(file) + "'", '"' + str(file) + '"'
    )


def test_command_and_webhook_hear_how_a_study_ended(tmp_path, posted):
    address, got = posted
    hooks, warnings = Hooks.checked(writing(tmp_path / "said"), address), []
    with hooks.at_the_end("mine", warnings.append) as event:
        event["done"] = 3
    expected = {"study": "mine", "event": "finished", "done": 3}
    assert warnings == [] and got == [expected] and json.loads((tmp_path / "said").read_text()) == expected
    with pytest.raises(KeyError):
        with hooks.at_the_end("mine", warnings.append):
            raise KeyError("why")
    assert got[1] == {"study": "mine", "event": "failed", "error": "'why'"}


def test_a_server_that_answers_nonsense_is_a_warning():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hooks, warnings = Hooks.checked(None, f"http://127.0.0.1:{listening.getsockname()[1]}/secret-token"), []

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"hello\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with hooks.at_the_end("mine", warnings.append):
            pass
        thread.join()
    assert warnings == ["--webhook: not delivered (BadStatusLine)"]


@pytest.mark.parametrize("address", ["ftp://host/secret", "https://", "http://host:port/secret", "host/secret"])
def test_an_address_that_is_none_is_told_at_once_and_not_repeated(address):
    with pytest.raises(InputError, match="--webhook: expected an address such as") as error:
        Hooks.checked(None, address)
    assert "secret" not in str(error.value)


def test_what_cannot_be_told_is_a_warning_without_the_address():
    warnings = []
    hooks = Hooks.checked("/no/such/command", "http://127.0.0.1:9/secret-token")
    with hooks.at_the_end("mine", warnings.append):
        pass
    assert len(warnings) == 2 and "/no/such/command" in warnings[0] and "not delivered" in warnings[1]
    assert "secret" not in "".join(warnings)
    Hooks.checked("false", None).tell({}, warnings.append)
    assert warnings[2] == "--on-end: false ended with exit code 1"


def test_wrong_hooks_are_told_together():
    with pytest.raises(InputError) as caught:
        Hooks.checked("echo 'open", "ftp://x")
    assert len(caught.value.problems) == 2


def test_a_sweep_tells(locft, workplace, study_file, ray_running, posted):
    address, got = posted
    study_file()
    said = locft("sweep", "tiny.yaml", "--webhook", address)
    assert said.code == 0 and "secret" not in said.err + said.out
    assert got[0].items() >= {"study": "tiny", "event": "finished", "ending": "complete", "done": 2, "left": 0}.items()
    assert got[0]["position"] in ("0.mlp_down", "2.mlp_down")
