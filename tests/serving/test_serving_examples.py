"""examples/serving: what it deploys exists, and the command that it gives serves."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from log_cases import postgres_server
from service_client import events, write_run
from service_process import ServiceProcess
from store_cases import redis_server

from hstu_xd.cli.app import build_app
from hstu_xd.serving.http.middleware import PROBES

yaml = pytest.importorskip("yaml", reason="no PyYAML here: examples/serving is NOT covered")

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
MANIFEST = (FOLDER / "kubernetes.yaml").read_text()
KINDS = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST)}
POD = KINDS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
COMMANDS = {"compose": COMPOSE["service"]["command"], "kubernetes": CONTAINER["args"]}


def parsed(command: list[str]) -> dict[str, Any]:
    """The values of all parameters, as the command line reads them."""
    group: Any = typer.main.get_command(build_app())
    assert command[0] == "serve"
    return group.commands["serve"].make_context("serve", command[1:]).params


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_is_read(name: str) -> None:
    given = parsed(COMMANDS[name])
    assert (given["host"], given["port"], given["workers"]) == ("0.0.0.0", 8000, 2)
    assert (given["log_format"], given["when_store_fails"]) == ("json", "rebuild")


def test_compose_agrees_with_itself() -> None:
    service = COMPOSE["service"]
    given = parsed(service["command"])
    (port,) = service["ports"]
    assert port.endswith(f":{given['port']}")
    asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)'", service["healthcheck"]["test"][-1])
    assert asked is not None
    assert (int(asked[1]), asked[2] in PROBES) == (given["port"], True)
    root = FOLDER.parents[1]
    image = (root / service["build"]["dockerfile"]).read_text()
    copied = [line.split()[1:-1] for line in image.splitlines() if line.startswith("COPY ")]
    assert all((root / name).exists() for names in copied for name in names)
    assert not any(name == "." for names in copied for name in names)
    # 5 s beyond --drain are the service's own, see README.
    assert int(service["stop_grace_period"].rstrip("s")) > given["drain"] + 5
    postgres = COMPOSE["postgres"]["environment"]
    user, database = postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]
    assert given["events"] == f"postgresql://{user}@postgres:5432/{database}"
    assert {"postgres", "redis"} == {*service["depends_on"]} == {*COMPOSE} - {"service"}
    # Passwords and tokens come from whoever starts it.
    secrets = (*service["environment"].values(), postgres["POSTGRES_PASSWORD"])
    assert all(re.match(r"\$\{\w+:\?", value) for value in secrets)


def test_kubernetes_agrees_with_itself() -> None:
    assert {*KINDS} == {"Deployment", "Service", "PodDisruptionBudget"}
    given = parsed(CONTAINER["args"])
    ((name, port),) = [(each["name"], each["containerPort"]) for each in CONTAINER["ports"]]
    assert port == given["port"]
    (served,) = KINDS["Service"]["spec"]["ports"]
    probes = {
        kind: CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")
    }
    assert {served["targetPort"], *(each["port"] for each in probes.values())} == {name}
    assert probes["liveness"]["path"] == "/livez"
    assert probes["startup"]["path"] == probes["readiness"]["path"] == "/readyz"
    assert {"/livez", "/readyz"} <= {*PROBES}
    labels = KINDS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selected = [
        KINDS["Deployment"]["spec"]["selector"]["matchLabels"],
        KINDS["Service"]["spec"]["selector"],
        KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(each == labels for each in selected)
    least = KINDS["PodDisruptionBudget"]["spec"]["minAvailable"]
    assert least < KINDS["Deployment"]["spec"]["replicas"]
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert POD["terminationGracePeriodSeconds"] > pause + given["drain"] + 5
    mounts = {each["name"] for each in CONTAINER["volumeMounts"]}
    assert mounts == {each["name"] for each in POD["volumes"]}
    assert {each["name"] for each in CONTAINER["env"]} == {"PGPASSWORD", "HSTU_XD_TOKEN"}
    assert all("secretKeyRef" in each["valueFrom"] for each in CONTAINER["env"])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_serves(name: str, tmp_path: Path) -> None:
    """With servers of the test in the place of its own."""
    with postgres_server() as postgres, redis_server(tmp_path) as redis:
        places = {
            "/runs/current": str(write_run(tmp_path / "run")),
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=8000": "--port=0",
            "--events=postgresql://hstu@postgres:5432/hstu": f"--events={postgres.database()}",
            "--store=redis://redis:6379/0": f"--store=unix://{redis}",
        }
        assert places.keys() <= {*COMMANDS[name]}
        _, run, *options = (places.get(word, word) for word in COMMANDS[name])
        with ServiceProcess(Path(run), *options, token="s3cret") as process:
            assert process.ask("GET", "/readyz", headers={}) == (200, {"status": "ready"})
            assert process.ask("POST", "/v1/events", {"events": events(3)})[0] == 200
            assert process.ask("POST", "/v1/events", {"events": []}, headers={})[0] == 401
            assert len(process.workers()) == 2
            code, said = process.end()
    assert code == 0, said
    assert "Traceback" not in said
