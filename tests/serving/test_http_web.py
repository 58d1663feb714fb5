"""The service as browsers and proxies meet it: kinds of bodies, names in paths, prefixes, pages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from service_client import Client, event, events, recommend, serving

from hstu_xd.errors import InputError
from hstu_xd.serving.http import middleware
from hstu_xd.serving.http.settings import ServiceSettings


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serving(tmp_path) as client:
        yield client


BODY = json.dumps(recommend("ann", k=1)).encode()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"content-type": ""}, "Content-Type is missing; send Content-Type: application/json"),
        ({"content-type": "text/plain"}, "Content-Type is text/plain; send"),
        ({"content-type": "application/x-www-form-urlencoded"}, "urlencoded; send"),
        ({"content-encoding": "gzip"}, "Content-Encoding is gzip; send the JSON itself"),
    ],
)
def test_a_body_that_is_not_said_to_be_json_is_refused(
    client: Client, headers: dict[str, str], message: str
) -> None:
    """Any web page can send the others to a service on its reader's machine."""
    answer = client.ask("POST", "/v1/recommend", BODY, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.ask("POST", "/v1/recommend", BODY, headers=kind).status_code == 200


NAMES = ["a\nb", "\n", "a\n", "\n/history", "a/b", "a/history", "..", "tab\t", "%2F", "a?b#c"]


@pytest.mark.parametrize("user", NAMES)
def test_whoever_is_taken_can_be_read_and_forgotten(client: Client, user: str) -> None:
    client.append(*events(3, user), event(0))
    name = quote(user, safe="").replace(".", "%2E")
    assert len(client.history(name)) == 3
    assert client.ask("DELETE", f"/v1/users/{name}").json() == {"forgotten": True}
    assert client.history(name) == []
    assert len(client.history()) == 1


def test_a_prefix_of_a_proxy_is_known(tmp_path: Path) -> None:
    with serving(tmp_path, root_path="/shop/rec") as client:
        assert client.ask("GET", "/openapi.json").json()["servers"] == [{"url": "/shop/rec"}]
        for prefix in ("", "/shop/rec"):
            assert client.ask("GET", f"{prefix}/v1/users").status_code == 200
            assert client.ask("GET", f"{prefix}/docs").status_code == 200
        assert client.ask("GET", "/shop/recv1/users").status_code == 404
        text = client.ask("GET", "/metrics").text
        assert 'hstu_xd_requests_total{route="/v1/users",status="200"} 2.0' in text
    for bad in ("rec", "/rec/", "/", "/a b", "/rec?x"):
        with pytest.raises(InputError, match="root_path is"):
            ServiceSettings(tmp_path, root_path=bad)


@pytest.mark.parametrize("page", ["/", "/docs"])
def test_the_pages_need_nothing_from_elsewhere(client: Client, page: str) -> None:
    answer = client.ask("GET", page)
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")
    assert "unsafe" not in policy
    found = re.findall(r'(?:src|href)="([^"]*)"', answer.text)
    assert "page.css" in found
    for link in found:
        # Relative, so that it works behind a prefix.
        assert not link.startswith(("/", "http")), link
        if not link.startswith("data:"):
            assert client.ask("GET", f"/{link.removeprefix('./')}").status_code == 200
    assert not re.search(r"<script(?! src)|\son\w+=|\sstyle=", answer.text)


def test_a_line_a_request_is_logged_without_names(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        client.ask("GET", "/v1/users/somebody/history")
        client.ask("POST", "/v1/recommend", b"x")
    lines = [record.getMessage() for record in caplog.records if "/v1/" in record.getMessage()]
    lines = [line for line in lines if not line.startswith("HTTP")]  # the client's own
    assert len(lines) == 2
    assert re.fullmatch(r"\S+ GET /v1/users/\{user\}/history 200 [\d.]+ ms [0-9a-f]{32}", lines[0])
    assert re.fullmatch(r"\S+ POST /v1/recommend 400 [\d.]+ ms [0-9a-f]{32}", lines[1])


def test_the_page_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<p>hello")
    (folder / "page.js").write_text("1")
    monkeypatch.setattr(middleware, "PAGE", folder)
    with serving(tmp_path, token="s3cret") as client:
        assert client.ask("GET", "/").text == "<p>hello"
        assert client.ask("GET", "/").headers["content-type"].startswith("text/html")
        assert "javascript" in client.ask("GET", "/page.js").headers["content-type"]
