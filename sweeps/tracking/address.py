"""The address of the tracking store: resolve it, check within seconds that the store answers, never show its password.

MLflow itself retries an unreachable store for minutes and then fails with a traceback; a study that cannot be recorded
should not start. Commands and notebook functions resolve the address; everything below them takes it resolved.
"""

# SQLAlchemy and MLflow are imported where they are used: most commands start without them.

import os
import re
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from locft.errors import InputError

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it when it is imported

DEFAULT_URI = "sqlite:///mlflow.db"
CHECK_SECONDS = 10
"""How long a server may take to answer the check."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Names of this machine, which no proxy can reach."""
_VERSION = "SELECT version_num FROM alembic_version"
"""Asks for the version of MLflow's tables."""
DATABASES = ("postgresql", "mysql", "mssql")
_LOGIN = re.compile(r"://(?:[^/\s:]*:\S*|[^/\s'\"]*)@")
"""User and password of an address in a text. The password may contain "/", "@" and quotes."""
_LOGIN_OPTION = re.compile(
    r"([?&](?:user|username|uid|\w*passw\w*|pwd|token|odbc_connect)=)[^&\s]*(?<!['\"])", re.IGNORECASE
)
"""The same as an option at the end of an address."""
ACCEPTED = "sqlite:///FILE.db, http(s)://HOST:PORT, or a database address (postgresql://, mysql://, mssql://)"


def redact(text: str) -> str:
    """`text` without the user names and passwords of the addresses in it."""
    return _LOGIN.sub("://***@", _LOGIN_OPTION.sub(r"\1***", text))


def resolve_uri(uri: str | None) -> str:
    """The store's address: `uri`, else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, with file paths made absolute.

    Raises InputError for an address that MLflow 3 cannot write to; the message names the nearest one that it can.
    """
    given = (uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI).strip()
    scheme = _scheme(given)
    given = scheme + given[len(scheme) :]  # in lower case, as everything below and MLflow expect it
    if scheme in ("http", "https"):
        _check_host(given)
        return given.rstrip("/")
    if scheme == "sqlite":
        path = given.partition(":///")[2]
        if not Path(os.path.expanduser(path)).is_file():  # else the "?" is part of its name
            path = path.partition("?")[0]
        if not path or path == ":memory:":
            raise InputError(f"tracking address {given!r} names no file; expected for example {DEFAULT_URI}")
        file = Path(os.path.expanduser(path)).absolute()
        for place in (Path.cwd(), file.parent):  # working directories of commands and of the server of `locft ui`
            mlflow_address(f"sqlite:///{file}", place)
        return f"sqlite:///{file}"
    if scheme in DATABASES:
        return given
    if given.lower().partition(":")[0] in ("databricks", "databricks-uc", "uc"):
        raise InputError(f"tracking address {redact(given)!r}: LocFT does not write to Databricks; expected {ACCEPTED}")
    if scheme in ("", "file"):
        path = Path(unquote(given.removeprefix("file:").removeprefix("//")))
        file = path if path.suffix in (".db", ".sqlite", ".sqlite3") else path / "mlflow.db"
        raise InputError(
            f"tracking address {given!r} is a plain path, and MLflow no longer writes file-based stores;"
            f" use the SQLite file sqlite:///{file} instead"
        )
    raise InputError(f"tracking address {redact(given)!r} has the unknown scheme {scheme!r}; expected {ACCEPTED}")


def _scheme(uri: str) -> str:
    """What an address begins with, in lower case, without the driver of a database; empty for a plain path."""
    return uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""


def _check_host(uri: str) -> None:
    """Raises InputError unless an http address names a host and, if any, the number of a port."""
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port  # the port is checked when it is read
    except ValueError:
        raise InputError(
            f"tracking address {redact(uri)!r}: expected http(s)://HOST:PORT, with '/', '?' and '#' in a user name or "
            "password written as %2F, %3F and %23"
        ) from None
    if not host:
        raise InputError(f"tracking address {redact(uri)!r} names no host; expected for example http://HOST:5000")


def without_credentials(uri: str) -> str:
    """An address without user and password."""
    return _LOGIN_OPTION.sub(r"\1", _LOGIN.sub("://", uri))


def take_credentials(uri: str) -> str:
    """Moves `user:password@` from an http address to MLflow's environment variables, which MLflow reads for every request; returns
    the address without it, which is safe to print."""
    if _scheme(uri) not in ("http", "https") or not (parts := urlsplit(uri)).username:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def sqlite_path(uri: str) -> Path | None:
    """The file of a resolved sqlite address; None for every other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def mlflow_address(uri: str, folder: Path) -> str:
    """A resolved address as MLflow takes it in a process whose working directory is `folder`.

    SQLAlchemy ends the path of an SQLite file at "?" and reads "%" followed by two digits as an escape; MLflow, when it creates
    the file's folders, does not. A file whose path contains either is named relative to the working directory. Raises InputError
    if the relative path still contains either.
    """
    path = sqlite_path(uri)
    if path is None or not {"?", "%"} & set(str(path)):
        return uri
    name = os.path.relpath(path, folder)
    if "?" in name or unquote(name) != name:
        sign = "?" if "?" in name else "%"
        raise InputError(
            f"tracking store {path}: its path contains {sign!r}, which has a special meaning in the address of an "
            "SQLite file; rename the folder or the file, or run the command in the file's own folder"
        )
    return f"sqlite:///{name}"


def check_writable(folder: Path, what: str) -> None:
    """Checks that files can be written in `folder`, or that it can be created. Leaves nothing behind.

    Only writing shows that it works, so an unnamed file is written in the folder or its nearest existing ancestor. Raises
    InputError with the system's reason.
    """
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"cannot write {what} in {folder}: {error.strerror or error}") from None


def check_reachable(uri: str) -> None:
    """Checks that the store at a resolved address answers and lets us in, or that it can be created. Creates nothing.

    Raises InputError, which says what was tried, what happened, and what to do.
    """
    if (path := sqlite_path(uri)) is not None:
        _check_sqlite(path)
    elif uri.startswith("http"):
        _check_server(uri)
    else:
        _check_database(uri)


def _check_sqlite(path: Path) -> None:
    """Raises InputError if a store cannot be kept in the file, or holds tables of another version of MLflow. Changes nothing."""
    if path.is_dir():
        raise InputError(f"tracking store {path} is a folder, expected an SQLite file such as {path / 'mlflow.db'}")
    check_writable(path.parent, "the tracking store")
    if not path.exists():
        return
    if not os.access(path, os.W_OK):
        raise InputError(f"tracking store {path} is read-only; make it writable or give another --tracking-uri")
    with path.open("rb") as file:
        start = file.read(16)
    if start and start != b"SQLite format 3\0":
        raise InputError(f"tracking store {path} is not an SQLite file (it starts with {start!r}); give another file")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=CHECK_SECONDS)) as store:
            tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            found = [name for (name,) in store.execute(_VERSION)] if "alembic_version" in tables else []
    except sqlite3.Error as error:
        raise InputError(f"tracking store {path} cannot be read: {error}; give another --tracking-uri") from None
    if tables & {"alembic_version", "experiments"}:  # else it is still empty, and MLflow creates its tables
        upgrade = f"copy the file, then run `mlflow db upgrade 'sqlite:///{path}'`"
        _require_schema(f"tracking store {path}", found, upgrade)


def _require_schema(store: str, found: Sequence[str], upgrade: str) -> None:
    """Raises InputError unless the tables are those of the MLflow that is installed here. found: their version."""
    from mlflow import store as mlflow_store
    from mlflow.store.db.utils import _get_latest_schema_revision
    from mlflow.version import VERSION

    wanted = _get_latest_schema_revision()
    if list(found) == [wanted]:
        return
    migrations = Path(mlflow_store.__path__[0], "db_migrations", "versions")
    older = not found or any(migrations.glob(f"{found[0]}_*.py"))
    what = f"{upgrade}; or" if older else "use that MLflow, or"
    raise InputError(
        f"{store} was made by {'an older' if older else 'a newer'} MLflow than {VERSION}, which is installed here (its schema is "
        f"{', '.join(found) or 'none'}, expected {wanted}): {what} give another --tracking-uri"
    )


def _check_server(uri: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    server = f"tracking server {redact(uri)}"
    endpoint = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    credentials, proxied = get_default_host_creds(uri), _proxied(uri)
    try:
        answer = http_request(credentials, endpoint, "GET", max_retries=0, timeout=CHECK_SECONDS, raise_on_status=False)
    except Exception as error:
        hint = proxied or "start it (locft ui, or mlflow server), or correct --tracking-uri"
        raise InputError(f"{server} cannot be reached ({_cause(error)}); {hint}") from None
    between = f"; {proxied}" if proxied else ""
    if answer.status_code in (401, 403):
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"
        if "host" in answer.text.lower():  # the server's own guard against foreign host names
            hint = "start it with --allowed-hosts naming this address"
        raise InputError(
            f"{server} refuses access (HTTP {answer.status_code}: {answer.text.strip()[:120]}); {hint}{between}"
        )
    if not re.search('"(experiment|error_code)"', answer.text):
        raise InputError(
            f"{server} answers (HTTP {answer.status_code}), but it is not an MLflow server; check the port and the path{between}"
        )


def _proxied(uri: str) -> str | None:
    """What to do about a proxy between this machine and the server; None if there is none."""
    parts = urlsplit(uri)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname):
        return None
    return (
        f"requests to it go through {parts.scheme}_proxy={redact(proxy)}; if the server can be reached without it, "
        f"set no_proxy={parts.hostname}"
    )


def _check_database(uri: str) -> None:
    import sqlalchemy

    # MLflow's own attempt would retry for minutes. The PostgreSQL and MySQL drivers share the option's name.
    timeout = {} if uri.startswith("mssql") else {"connect_timeout": CHECK_SECONDS}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=timeout)
        with engine.connect() as connection:
            known = sqlalchemy.inspect(engine).has_table("alembic_version")
            found = list(connection.scalars(sqlalchemy.text(_VERSION))) if known else None
        engine.dispose()
    except ImportError as error:
        raise InputError(f"tracking database {redact(uri)} needs the Python package {error.name!r}") from None
    except Exception as error:
        raise InputError(f"tracking database {redact(uri)} cannot be reached: {_cause(error)}") from None
    if found is not None:
        upgrade = "make a copy of it, then run `mlflow db upgrade` on it"
        _require_schema(f"tracking database {redact(uri)}", found, upgrade)


def _cause(error: BaseException) -> str:
    """The innermost reason in one line, without passwords."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    lines = redact(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
