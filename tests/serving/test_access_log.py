"""The lines of a service's log: one for a request, which tell of no user, as text or as JSON."""

import json
import logging
import re
from datetime import datetime
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from service_client import event, serving, write_run
from service_process import ServiceProcess

from hstu_xd.serving.http import access_log

FIELDS = ("time", "level", "worker", "method", "path", "status", "ms", "version", "request_id")


def test_a_request_is_a_json_object(tmp_path: Path) -> None:
    options = ["--events", str(tmp_path / "log"), "--log-level", "info", "--log-format", "json"]
    with ServiceProcess(write_run(tmp_path / "run"), *options, token="s3cret") as process:
        assert process.ask("POST", "/v1/events", {"events": [event(0)]})[0] == 200
        headers = {"authorization": "Bearer s3cret", "x-request-id": "r-1"}
        with urlopen(Request(f"{process.url}v1/users/ann/history?limit=7", headers=headers)) as got:
            assert got.headers["x-request-id"] == "r-1"
            version = got.headers["x-model"]
        assert process.ask("GET", "/v1/users/ann/secrets")[0] == 405
        assert process.ask("GET", "/ann", headers={"authorization": "Bearer s3cre"})[0] == 401
        code, said = process.end()
    assert code == 0
    lines = [json.loads(line) for line in said.splitlines()]
    first, asked, *others = [line for line in lines if "path" in line]
    assert tuple(asked) == FIELDS
    assert (asked["method"], asked["path"]) == ("GET", "/v1/users/{user}/history")
    assert (asked["status"], asked["version"], asked["request_id"]) == (200, version, "r-1")
    assert (asked["worker"], asked["level"]) == (0, "info")
    assert asked["ms"] > 0
    assert datetime.fromisoformat(asked["time"]).tzinfo is not None
    assert (first["path"], first["status"]) == ("/v1/events", 200)
    assert re.fullmatch("[0-9a-f]{32}", first["request_id"])
    found = [(line["path"], line["status"]) for line in others]
    assert found == [("/v1/users/{user}", 405), ("other", 401)]
    (warning,) = [line for line in lines if "without earlier histories" in line.get("message", "")]
    assert tuple(warning) == ("time", "level", "worker", "message")
    assert warning["level"] == "warning"
    assert "ann" not in said
    assert "s3cre" not in said


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (b"0af7651916cd43dd8448eb211c80319c", True),
        (b"Root=1-67891233-abcdef;Sampled=1", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"two words", False),
        (b"line\nbreak", False),
        ("\u00e9".encode(), False),
        (b"", False),
        (None, False),
    ],
)
def test_an_id_is_one_word_of_a_line(given: bytes | None, taken: bool) -> None:
    found = access_log.id_of(given)
    assert (found == given.decode()) if taken and given else re.fullmatch("[0-9a-f]{32}", found)


def test_every_answer_has_an_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(tmp_path, token="s3cret") as client:
        for path, status in (("/healthz", 200), ("/v1/users", 401), ("/nowhere", 401)):
            answer = client.ask("GET", path)
            assert answer.status_code == status
            assert len(answer.headers["x-request-id"]) == 32
            assert f"GET {path if status == 200 else ''}" in caplog.text
            assert answer.headers["x-request-id"] in caplog.text


def test_an_error_is_one_line_with_its_trace() -> None:
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(access_log.JsonLines(None).format(record))

    log = logging.getLogger("a test of lines")
    log.propagate = False
    log.addHandler(Kept())
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("a request failed: %s", "Append")
    (line,) = lines
    assert "\n" not in line
    found = json.loads(line)
    assert tuple(found) == ("time", "level", "message", "exception")
    assert found["message"] == "a request failed: Append"
    assert found["exception"].endswith("ValueError: two\nlines")
