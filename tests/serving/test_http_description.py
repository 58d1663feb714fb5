"""The OpenAPI description is true: schemathesis asks what it allows, and what it does not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="no schemathesis: the OpenAPI description NOT covered")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from ranking_runs import make_runs
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from service_client import Client, events, serving, write_run

from hstu_xd.serving.http.middleware import PROBES

OPERATIONS = (
    "POST /v1/events",
    "POST /v1/events/remove",
    "POST /v1/models",
    "GET /v1/models",
    "DELETE /v1/models/shadow",
    "GET /v1/domains",
    "GET /v1/users",
    "GET /v1/users/{user}/history",
    "DELETE /v1/users/{user}",
    "GET /healthz",
    "GET /livez",
    "GET /readyz",
)
# What a service of each kind of run answers beside these.
QUESTIONS = {
    "retrieval": ("POST /v1/recommend", "POST /v1/score"),
    "ranking": ("POST /v1/rank",),
    "towers": ("POST /v1/rank", "POST /v1/recommend"),
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """A client of a service of each kind of run."""
    folder = tmp_path_factory.mktemp("service")
    rankers = make_runs(folder, ["hard", "towers"])
    with (
        serving(folder / "retrieval", run=write_run(folder / "run")) as retrieval,
        serving(folder / "ranking", run=rankers / "hard") as ranking,
        serving(folder / "towers-log", run=rankers / "towers") as towers,
    ):
        retrieval.append(*events(5))
        yield {"retrieval": retrieval, "ranking": ranking, "towers": towers}


@pytest.fixture(params=QUESTIONS)
def client(clients: dict[str, Client], request: pytest.FixtureRequest) -> Client:
    return clients[request.param]


# What a service accepts depends on its catalogue, which no schema can say: an item that fits the
# schema may still be unknown, which is a 400.
UNSAID = [positive_data_acceptance]


@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_operation_is_asked(clients: dict[str, Client], kind: str) -> None:
    described = clients[kind].ask("GET", "/openapi.json").json()["paths"]
    found = {f"{method.upper()} {path}" for path, each in described.items() for method in each}
    assert found == {*OPERATIONS, *QUESTIONS[kind]}


WITHOUT_INPUT = (
    "GET /v1/domains",
    "GET /v1/models",
    "DELETE /v1/models/shadow",
    *(f"GET {path}" for path in PROBES),
)
# What both answer is asked of one.
CASES = [
    (kind, name, mode)
    for kind, names in (QUESTIONS | {"retrieval": (*OPERATIONS, *QUESTIONS["retrieval"])}).items()
    for name in names
    for mode in GenerationMode
    if name not in WITHOUT_INPUT or mode is GenerationMode.POSITIVE
]


@pytest.mark.parametrize(("kind", "name", "mode"), CASES)
def test_answers_are_those_described(
    clients: dict[str, Client], kind: str, name: str, mode: GenerationMode
) -> None:
    client = clients[kind]
    method, path = name.split()
    description = schemathesis.openapi.from_asgi("/openapi.json", client.app)

    @given(case=description[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(excluded_checks=UNSAID)

    ask()


def test_the_description_names_every_status(client: Client, tmp_path: Path) -> None:
    described = client.ask("GET", "/openapi.json").json()
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            if path not in PROBES:
                assert {"200", "400", "413", "503"} <= set(operation["responses"])
    with serving(tmp_path, token="t") as other:
        described = other.ask("GET", "/openapi.json").json()
        for path, operations in described["paths"].items():
            for operation in operations.values():
                assert ("401" in operation["responses"]) == (path not in PROBES)
                assert ("security" in operation) == (path not in PROBES)
        assert "openapi.json" in other.ask("GET", "/docs").text
