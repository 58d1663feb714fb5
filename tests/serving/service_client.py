"""A service of the tiny model, asked in this process, and run folders of it for real processes."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from tiny_models import EVERYTHING, ITEMS_PER_DOMAIN, NUM_DOMAINS, tiny_model

from hstu_xd.catalog import CATALOG_FILE
from hstu_xd.data.store import InteractionStore
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.serving import EncoderSession

pytest.importorskip("fastapi", reason="no fastapi here: the HTTP service is NOT covered")
pytest.importorskip("httpx", reason="no httpx here: the HTTP service is NOT covered")

import httpx

from hstu_xd.serving.http.app import build_app
from hstu_xd.serving.http.batch_handler import BatchHandler
from hstu_xd.serving.http.live_model import load_engine
from hstu_xd.serving.http.retrieval_engine import RetrievalEngine
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.settings import QueueSettings, ServiceSettings, StateSettings
from hstu_xd.serving.http.swaps import LocalSwaps

MODEL = tiny_model(**EVERYTHING).float().eval()
DOMAINS = MODEL.catalog.domain_names
ITEMS = NUM_DOMAINS * ITEMS_PER_DOMAIN
# What changes of the model ask for.
TOKEN = "sesame"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
# Short, so that windows slide.
WINDOW = 8
# However slow the machine is, nobody has waited too long.
PATIENT = QueueSettings(max_delay=1000.0)


def event(number: int, user: str = "ann") -> dict[str, Any]:
    """A user's event of this number; tokens of the tiny catalogue are its ids."""
    return {"user": user, "item": str(1 + number * 7 % ITEMS), "timestamp": number * 1000}


def events(count: int, user: str = "ann", first: int = 0) -> list[dict[str, Any]]:
    return [event(number, user) for number in range(first, first + count)]


def window_of(known: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The events that are still in the window, which slides by quarters."""
    quarter = WINDOW // 4
    return known[quarter * max(0, -((WINDOW - len(known)) // quarter)) :]


def encoded(known: Sequence[dict[str, Any]], domain: int) -> torch.Tensor:
    """The vector of a user with these events, by the full encoder on the window."""
    rows = window_of(known)
    items = torch.tensor([[int(row["item"]) for row in rows]])
    times = torch.tensor([[row["timestamp"] for row in rows]])
    with torch.inference_mode():
        return MODEL.encode(items, times, torch.tensor([domain]))[0]


def scores(known: Sequence[dict[str, Any]], domain: int) -> dict[str, float]:
    """Every item of the domain with its score; of nobody's history by the session itself."""
    items = MODEL.catalog.items_of(domain)
    if known:
        vector = encoded(known, domain)
    else:
        vector = EncoderSession(MODEL, window=WINDOW).query(["nobody"], [domain])[0]
    with torch.inference_mode():
        found = MODEL.item_vectors(items) @ vector
    return {str(item): score for item, score in zip(items.tolist(), found.tolist())}


class Client:
    """Asks a service in this process, one request after the other or many at once."""

    def __init__(self, service: Service, run: Path | None = None) -> None:
        self.service = service
        self._loop = asyncio.new_event_loop()
        self.app = build_app(service, None if run is None else LocalSwaps(service, run))
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://service")

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._ask(method, path, body, **options))

    def ask_all(
        self, requests: Sequence[tuple[str, str, Any]], gate: "Gate | None" = None
    ) -> list[httpx.Response]:
        """Answers of requests that are sent at once; they all wait at the gate, if there is one."""

        async def together() -> list[httpx.Response]:
            before = []
            if gate is not None:
                before.append(asyncio.ensure_future(self._ask("GET", "/v1/users")))
                await asyncio.to_thread(gate.reached.wait, 60)
            tasks = [asyncio.ensure_future(self._ask(*request)) for request in requests]
            # Every request gets as far as it does without the thread.
            for _ in range(200):
                await asyncio.sleep(0)
            if gate is not None:
                gate.open()
            return (await asyncio.gather(*before, *tasks))[len(before) :]

        return self._loop.run_until_complete(together())

    def append(self, *rows: dict[str, Any]) -> httpx.Response:
        return self.ask("POST", "/v1/events", {"events": rows})

    def history(self, user: str = "ann", limit: int = 200) -> list[dict[str, Any]]:
        answer = self.ask("GET", f"/v1/users/{user}/history", params={"limit": limit})
        assert answer.status_code == 200, answer.text
        return answer.json()["events"]

    def score_all(self, user: str = "ann", domain: int = 0) -> dict[str, float]:
        """Scores of all items of a domain."""
        items = list(map(str, MODEL.catalog.items_of(domain).tolist()))
        answer = self.ask("POST", "/v1/score", score(user, domain, items))
        assert answer.status_code == 200, answer.text
        return dict(zip(items, answer.json()["scores"]))

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics").text.splitlines()
        (found,) = [line for line in lines if line.startswith(f"{name} ")]
        return float(found.split()[-1])

    def close(self) -> None:
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()
        self.service.stop()

    async def _ask(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> httpx.Response:
        if body is not None:
            options["content"] = body if isinstance(body, bytes) else json.dumps(body)
            options["headers"] = {"content-type": "application/json"} | options.get("headers", {})
        return await self._client.request(method, path, **options)


def ask(client: "Client", method: str, path: str, body: Any = None) -> Any:
    """Ask with the token."""
    return client.ask(method, path, body, headers=HEADERS)


def right(client: Client, count: int, user: str = "ann") -> bool:
    """Whether a user's history and answers are those of the first events."""
    assert [row["timestamp"] for row in client.history(user)] == [n * 1000 for n in range(count)]
    return client.score_all(user) == pytest.approx(scores(events(count), 0), abs=1e-5)


def recommend(user: str, *domains: str, **options: Any) -> dict[str, Any]:
    return {"user": user, "domains": list(domains or DOMAINS)} | options


def score(user: str, domain: int, items: Sequence[str], **options: Any) -> dict[str, Any]:
    return {"user": user, "domain": DOMAINS[domain], "items": list(items)} | options


@contextmanager
def serving(
    folder: Path,
    *,
    prepared: InteractionStore | None = None,
    model: Any = MODEL,
    states: dict[str, Any] | None = None,
    log: str | None = None,
    run: Path | None = None,
    **settings: Any,
) -> Iterator[Client]:
    """A client of a service whose log is in a folder, or at a URL; started again it goes on.

    With a run folder its model is that of the run, and others may take its place. Every event
    changes the stored state, unless ``states`` says otherwise: what a store does shows at once.
    """
    folder.mkdir(exist_ok=True)
    chosen = ServiceSettings(log or folder / "events.sqlite", **({"queue": PATIENT} | settings))
    states = {"threads": 1, "store_every": 1} | (states or {})
    chosen = replace(chosen, states=StateSettings(**states))
    if run is None:
        engine = RetrievalEngine("tiny", model, WINDOW, prepared, chosen.states)
    else:
        engine = load_engine(run, chosen)
    client = Client(Service(engine, chosen), run)
    try:
        yield client
    finally:
        client.close()


class Gate:
    """Holds the thread of a service between two batches until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.reached, self._open = Event(), Event()
        handle = BatchHandler.handle

        def gated(handler: BatchHandler, tickets: Any) -> None:
            self.sizes.append(len(tickets))
            self.reached.set()
            assert self._open.wait(60)
            handle(handler, tickets)

        monkeypatch.setattr(BatchHandler, "handle", gated)

    def open(self) -> None:
        self._open.set()


def write_run(
    folder: Path, model: CrossDomainHSTU = MODEL, data: InteractionStore | None = None
) -> Path:
    """A run folder of a tiny model, as training would leave it, perhaps with its store."""
    from hstu_xd.training.checkpoint import MODEL_FILE, save_checkpoint

    folder.mkdir(parents=True)
    sizes = {"num_blocks": 2, "num_heads": 4, "dqk": 5, "dv": 4} | EVERYTHING
    lines = [f"xd_encoder.{name} = {value!r}" for name, value in sizes.items()]
    lines += ["xd_train.max_sequence_length = 8", "xd_train.gr_output_length = 15"]
    lines += ["xd_train.item_embedding_dim = 16", "xd_train.dropout_rate = 0.0"]
    (folder / "config.gin").write_text("\n".join(["import hstu_xd.training.settings", *lines]))
    model.catalog.save(folder / CATALOG_FILE)
    save_checkpoint(folder / MODEL_FILE, model.state_dict(), {})
    facts = {
        "data": str(folder / "no-data" if data is None else data.path.resolve()),
        "data_hashes": {CATALOG_FILE: ""} if data is None else data.manifest["hashes"],
        "max_sequence_length": WINDOW,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder
