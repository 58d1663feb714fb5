"""``hstu-xd serve``: recommendations over HTTP, from states that are one event old."""

import logging
import os
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import typer

from hstu_xd.errors import HstuXdError, InputError

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")
_TOKEN = "HSTU_XD_TOKEN"


def serve(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    events: Annotated[
        Path | None,
        typer.Option(help="Log of accepted events. [default: serving/events.sqlite in RUN]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Prepared store with earlier histories; default: the run's."),
    ] = None,
    use_data: Annotated[
        bool, typer.Option("--use-data/--no-data", help="Know the earlier histories.")
    ] = True,
    store: Annotated[
        str, typer.Option(help="States of users: memory, sqlite:FILE or redis://HOST:PORT/DB.")
    ] = "memory",
    store_ttl: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds that Redis keeps a state. [default: for good]"),
    ] = None,
    when_store_fails: Annotated[
        Literal["refuse", "rebuild"],
        typer.Option(help="Answer 503, or rebuild states in memory until it is back."),
    ] = "refuse",
    max_bytes: Annotated[int, typer.Option(min=1 << 20, help="Bytes of states in memory.")] = 1
    << 30,
    retrieval: Annotated[
        Literal["exact", "approximate"],
        typer.Option(help="Search large domains by all dot products, or by FAISS lists."),
    ] = "exact",
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token clients must send; or set {_TOKEN}."),
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 1 << 20,
    max_k: Annotated[int, typer.Option(min=1, help="Items recommended for a domain.")] = 1000,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests handled together.")] = 32,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that a batch waits for more requests.")
    ] = 0.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait.")] = 1024,
    max_delay: Annotated[
        float, typer.Option(min=1, help="Milliseconds a request may wait; 503 beyond it.")
    ] = 100.0,
    repeats: Annotated[
        Literal["keep", "drop"],
        typer.Option(help="Same user, item and time again: another event, or the one known."),
    ] = "keep",
    unknown_items: Annotated[
        Literal["refuse", "skip"],
        typer.Option(help="Refuse a request with an unknown item, or skip the event."),
    ] = "refuse",
    max_clock_skew: Annotated[
        float, typer.Option(min=0, help="Seconds that an event may be ahead of the clock.")
    ] = 3600.0,
    root_path: Annotated[
        str, typer.Option(help="Path under which a proxy shows the service, as /recommendations.")
    ] = "",
    log_level: Annotated[
        Literal["info", "warning", "error"],
        typer.Option(help="What is said on stderr; info: a line for every request."),
    ] = "warning",
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds that accepted requests get on SIGTERM.")
    ] = 5.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch. [default: all cores but one]")
    ] = None,
) -> None:
    """Serve a trained run: take events, recommend items of any domain, over HTTP."""
    check_packages()
    from hstu_xd.serving.http import server
    from hstu_xd.serving.http.service import Served, Service
    from hstu_xd.serving.http.settings import (
        Limits,
        QueueSettings,
        ServiceSettings,
        StateSettings,
        WriteSettings,
    )

    logging.basicConfig(level=log_level.upper(), format="hstu-xd: %(message)s")
    settings = ServiceSettings(
        events=events or run / "serving" / "events.sqlite",
        data=data,
        use_data=use_data,
        token=_token(token_file),
        drain_seconds=drain,
        root_path=root_path,
        queue=QueueSettings(max_batch, max_wait / 1e3, max_queue, max_delay / 1e3),
        limits=Limits(max_body=max_body, max_k=max_k),
        writes=WriteSettings(repeats, unknown_items, max_clock_skew),
        states=StateSettings(store, store_ttl, when_store_fails, max_bytes, threads, retrieval),
    )
    served = Served.of(run, settings)
    _make_folder(settings.events.parent)
    with server.listen(host, port) as sock:
        service = Service(served, settings)
        here = sock.getsockname()
        if settings.token is None and not is_loopback(here[0]):
            logging.getLogger(__name__).warning(
                "whoever reaches %s can read, change and delete what is known of users: ask for a "
                "token (--token-file or %s), or listen on 127.0.0.1",
                host,
                _TOKEN,
            )
        address = f"[{here[0]}]" if ":" in here[0] else here[0]

        def announce() -> None:
            typer.echo(f"serving {service.model_name} on http://{address}:{here[1]}")
            typer.echo(f"events in {settings.events}")

        server.serve(service, sock, announce)


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    return ip_address(address.partition("%")[0]).is_loopback


def check_packages() -> None:
    """Refuse to go on without what the service is made of.

    Raises:
        HstuXdError: a package is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise HstuXdError(
            f'{missing[0]} is not installed; serving needs pip install "hstu-xd[serving]"'
        )


def _token(file: Path | None) -> str | None:
    """The token, of the file or the environment."""
    text = os.environ.get(_TOKEN)
    if file is not None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {file}: {error}; give a file with the token") from error
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            f"{file or _TOKEN}: the token must be printable ASCII without spaces, and not empty"
        )
    return token


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error}; give --events a place to write to") from error
