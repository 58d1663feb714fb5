"""``hstu-xd serve``: a trained run over HTTP, from states that are one event old."""

import logging
import os
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import typer

from hstu_xd.cli.run_options import AllowImports, Verify
from hstu_xd.errors import HstuXdError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hstu_xd.serving.http.workers import Work

_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client")
_TOKEN = "HSTU_XD_TOKEN"
# OpenTelemetry's variables that name a collector: one for traces, one for whatever is sent.
_TRACES_AT, _ALL_AT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACES_PATH = "/v1/traces"


Run = Annotated[Path, typer.Argument(help="Run folder.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")
]
Events = Annotated[
    str | None,
    typer.Option(
        help="Log of accepted events: a file, or postgresql://HOST:PORT/DATABASE. "
        "[default: serving/events.sqlite in RUN]"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Prepared store of earlier histories. [default: the run's own]"),
]
UseData = Annotated[
    bool, typer.Option("--use-data/--no-data", help="Read the earlier histories of users.")
]
Store = Annotated[
    str, typer.Option(help="Place of users' states: memory, sqlite:FILE or redis://HOST:PORT/DB.")
]
StoreTtl = Annotated[
    int | None, typer.Option(min=1, help="Seconds that Redis keeps a state. [default: for good]")
]
StoreEvery = Annotated[
    int | None,
    typer.Option(
        min=1, help="Events of a user from one writing of its state to the next. [default: 8]"
    ),
]
WhenStoreFails = Annotated[
    Literal["refuse", "rebuild"],
    typer.Option(help="Answer 503 who needs it, or rebuild states in memory until it is back."),
]
MaxBytes = Annotated[
    int, typer.Option(min=1 << 20, help="Most bytes of states in a worker's memory.")
]
Retrieval = Annotated[
    Literal["exact", "approximate"],
    typer.Option(help="Search large domains by all dot products, or by FAISS lists."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help=f"File with the token that clients must send; or set {_TOKEN}."),
]
MaxBody = Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")]
MaxK = Annotated[int, typer.Option(min=1, help="Most items recommended of a domain.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Most requests handled together.")]
MaxWait = Annotated[
    float, typer.Option(min=0, help="Milliseconds that a batch waits for more requests.")
]
MaxQueue = Annotated[int, typer.Option(min=1, help="Most requests that wait.")]
MaxDelay = Annotated[
    float, typer.Option(min=1, help="Milliseconds that a request may wait; 503 beyond them.")
]
Repeats = Annotated[
    Literal["keep", "drop"],
    typer.Option(help="Same user, item and time again: another event, or the one known."),
]
UnknownItems = Annotated[
    Literal["refuse", "skip"],
    typer.Option(help="Refuse a request with an unknown item, or skip the event."),
]
MaxClockSkew = Annotated[
    float, typer.Option(min=0, help="Seconds that an event may be ahead of the clock.")
]
RootPath = Annotated[
    str, typer.Option(help="Path under which a proxy shows the service, as /recommendations.")
]
LogLevel = Annotated[
    Literal["info", "warning", "error"],
    typer.Option(help="What is written to stderr; info adds a line for every request."),
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(help="How it is written: lines of text, or a JSON object a line."),
]
Traces = Annotated[
    str | None,
    typer.Option(
        help="Collector of OpenTelemetry that gets a trace of every request by OTLP over HTTP, as "
        f"http://HOST:4318. [default: {_ALL_AT}, or none]"
    ),
]
Drain = Annotated[float, typer.Option(min=0, help="Seconds that accepted requests get on SIGTERM.")]
ShadowRun = Annotated[
    Path | None,
    typer.Option(help="Run that answers the same requests unseen; /metrics has the differences."),
]
NumWorkers = Annotated[
    int, typer.Option(min=1, help="Processes that serve; more than one need PostgreSQL's log.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Threads of PyTorch. [default: all cores but one; of workers, their share]"
    ),
]


def serve(
    run: Run,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    events: Events = None,
    data: Data = None,
    use_data: UseData = True,
    verify: Verify = False,
    store: Store = "memory",
    store_ttl: StoreTtl = None,
    store_every: StoreEvery = None,
    when_store_fails: WhenStoreFails = "refuse",
    max_bytes: MaxBytes = 1 << 30,
    retrieval: Retrieval = "exact",
    token_file: TokenFile = None,
    max_body: MaxBody = 1 << 20,
    max_k: MaxK = 1000,
    max_batch: MaxBatch = 32,
    max_wait: MaxWait = 0.0,
    max_queue: MaxQueue = 1024,
    max_delay: MaxDelay = 100.0,
    repeats: Repeats = "keep",
    unknown_items: UnknownItems = "refuse",
    max_clock_skew: MaxClockSkew = 3600.0,
    root_path: RootPath = "",
    log_level: LogLevel = "warning",
    log_format: LogFormat = "text",
    traces: Traces = None,
    drain: Drain = 5.0,
    workers: NumWorkers = 1,
    shadow: ShadowRun = None,
    threads: Threads = None,
    allow_imports: AllowImports = False,
) -> None:
    """Serve a trained run over HTTP.

    Takes events of users and recommends items of any domain (POST /v1/recommend); a ranking run
    ranks given candidates instead (POST /v1/rank), and one of towers does both.

    POST /v1/models lets another run of the same folder answer, SIGHUP what RUN holds or links to
    now; requests go on meanwhile. With "mode": "shadow" it answers unseen, until DELETE
    /v1/models/shadow.
    """
    check_packages()
    from hstu_xd.serving.http import access_log
    from hstu_xd.serving.http.settings import (
        Limits,
        LogSettings,
        QueueSettings,
        ServiceSettings,
        StateSettings,
        WriteSettings,
    )
    from hstu_xd.serving.http.workers import Work

    if store == "memory" and store_every is not None:
        raise InputError(
            f"--store-every {store_every} has no effect on states in memory; drop it, or give "
            "--store"
        )
    log = LogSettings(log_level, log_format)
    access_log.set_up(log, None if workers > 1 else 0)
    settings = ServiceSettings(
        events=events or str(run / "serving" / "events.sqlite"),
        data=data,
        use_data=use_data,
        verify_data=verify,
        token=_token(token_file),
        drain_seconds=drain,
        root_path=root_path,
        traces=_collector(traces),
        queue=QueueSettings(max_batch, max_wait / 1e3, max_queue, max_delay / 1e3),
        limits=Limits(max_body=max_body, max_k=max_k),
        writes=WriteSettings(repeats, unknown_items, max_clock_skew),
        states=StateSettings(
            *(store, store_ttl, when_store_fails, max_bytes, threads, retrieval),
            store_every or StateSettings.store_every,
        ),
    )
    work = Work(run, settings, allow_imports, log, shadow)
    _listen(work if workers == 1 else work.share(workers), workers, host, port)


def _listen(work: "Work", workers: int, host: str, port: int) -> None:
    """Answer requests until the process is told to stop."""
    from hstu_xd.serving.events.open_log import is_postgres, shown_log
    from hstu_xd.serving.http import server
    from hstu_xd.serving.http.live_model import load_engine
    from hstu_xd.serving.http.service import Service
    from hstu_xd.serving.http.shadow import Shadow
    from hstu_xd.serving.http.swaps import LocalSwaps
    from hstu_xd.serving.http.workers import Workers

    settings = work.settings
    engine = None
    if workers == 1:
        engine = load_engine(work.run, settings, allow_imports=work.allow_imports)
    if not is_postgres(settings.events):
        _make_folder(Path(settings.events).parent)
    with server.listen(host, port) as sock:
        here = sock.getsockname()
        address = f"[{here[0]}]" if ":" in here[0] else here[0]

        def announce(name: str) -> "Callable[[], None]":
            def said() -> None:
                typer.echo(f"serving {name} on http://{address}:{here[1]}")
                typer.echo(f"events in {shown_log(settings.events)}")

            return said

        service = None if engine is None else Service(engine, settings)
        if settings.token is None and not is_loopback(here[0]):
            logging.getLogger(__name__).warning(
                "whoever reaches %s can read, change and delete what is known of users: ask for a "
                "token (--token-file or %s), or listen on 127.0.0.1",
                host,
                _TOKEN,
            )
        if service is None:
            name = f"{work.run.resolve().name} with {workers} workers"
            Workers(work, workers, sock).run(announce(name))
        else:
            if work.shadow is not None:
                try:
                    service.shadow = Shadow(
                        service, work.shadow, allow_imports=work.allow_imports, log=work.log
                    )
                except HstuXdError:
                    service.stop()
                    raise
            options = {"allow_imports": work.allow_imports, "log": work.log}
            swaps = LocalSwaps(service, work.run, **options)
            server.serve(service, sock, swaps, announce(service.model.name))


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches an address."""
    return ip_address(address.partition("%")[0]).is_loopback


def check_packages() -> None:
    """Check that the packages of the service are installed.

    Raises:
        HstuXdError: one of them is not.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise HstuXdError(
            f'{missing[0]} is not installed; serving needs pip install "hstu-xd[serving]"'
        )


def _token(file: Path | None) -> str | None:
    """Return the token of the file or else of the environment; None where neither has one."""
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


def _collector(option: str | None) -> str | None:
    """Return the URL that spans are posted to; None where nobody asks for traces.

    What the option asks for is done, or the command ends. OpenTelemetry's variables, which may be
    those of a whole cluster, are warned of where nothing follows from them.
    """
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if option is not None:
        if is_off:
            raise InputError("--traces with OTEL_SDK_DISABLED=true; drop one of them")
        return _traces_url("--traces", option)
    name = _TRACES_AT if os.environ.get(_TRACES_AT) else _ALL_AT
    given, exporter = os.environ.get(name), os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if not given or is_off or exporter.strip().lower() == "none":
        return None
    try:
        if exporter.strip().lower() != "otlp":
            raise InputError(f"OTEL_TRACES_EXPORTER is {exporter!r}; serve has otlp or none")
        protocols = (
            os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}PROTOCOL") for kind in ("TRACES_", "")
        )
        protocol = next(filter(None, protocols), "http/protobuf")
        if protocol != "http/protobuf":
            raise InputError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; serve has http/protobuf"
            )
        return _traces_url(name, given)
    except HstuXdError as error:
        logging.getLogger(__name__).warning("no traces: %s", error)
        return None


def _traces_url(name: str, given: str) -> str:
    """Check the URL of a collector, and complete it.

    Args:
        name: of the option or variable.
        given: its value.

    Raises:
        InputError: it is no such URL.
        HstuXdError: the extra is not installed.
    """
    try:
        parts = urlsplit(given)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_sound, parts = False, urlsplit("")
    if not is_sound or "@" in given or parts.query or parts.fragment:
        shown = (
            "has a user, a password or a query" if "@" in given or "?" in given else f"is {given!r}"
        )
        raise InputError(
            f"{name} {shown}; http://HOST:4318 is needed, and what a collector asks for goes in "
            "OTEL_EXPORTER_OTLP_HEADERS"
        )
    try:
        import hstu_xd.serving.http.tracing  # noqa: F401
    except ModuleNotFoundError as error:
        raise HstuXdError(
            f'{name}: {error.name} is not installed; traces need pip install "hstu-xd[otel]"'
        ) from error
    if name == _TRACES_AT or given.endswith(_TRACES_PATH):
        return given
    return given.rstrip("/") + _TRACES_PATH


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error}; give --events a place to write to") from error
