"""The service's page in a real browser, without a screen."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_client import DOMAINS, MODEL, event, events, write_run
from service_process import ServiceProcess

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TOKEN = "open-sesame"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser here ({', '.join(_BROWSERS)}): the web page is NOT covered")
    reason = "no playwright here: the web page is NOT covered"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        quiet = ["--disable-gpu", "--disable-background-networking"]
        found = driver.chromium.launch(executable_path=program, args=["--no-sandbox", *quiet])
        yield found
        found.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("page")
    with ServiceProcess(write_run(folder / "run"), "--events", str(folder / "log")) as service:
        yield service


@pytest.fixture
def page(browser: Any, service: ServiceProcess) -> Iterator[Any]:
    page = browser.new_page()
    page.set_default_timeout(20_000)
    errors: list[Any] = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(service.url)
    page.wait_for_selector("#domains input")
    yield page
    page.close()
    assert not errors


def take(service: ServiceProcess, rows: list[dict[str, Any]]) -> None:
    assert service.ask("POST", "/v1/events", {"events": rows})[0] == 200


def show(page: Any, user: str) -> None:
    page.fill("#user", user)
    page.click("#pick button")
    page.wait_for_function(
        "user => document.getElementById('length').textContent.includes(user)", arg=user
    )
    page.wait_for_selector("#recommendations li")


def recommended(service: ServiceProcess, user: str, domain: str) -> list[str]:
    asked = {"user": user, "domains": [domain], "k": 20}
    _, answer = service.ask("POST", "/v1/recommend", asked)
    return [row["item"] for row in answer["recommendations"][0]["items"]]


def shown(page: Any, where: str) -> list[str]:
    return page.locator(f"{where} .item").all_text_contents()


def test_history_is_coloured_by_domain_and_newest_first(page: Any, service: ServiceProcess) -> None:
    take(service, rows := events(9, "ann"))
    show(page, "ann")
    assert shown(page, "#history") == [row["item"] for row in reversed(rows)]
    found = page.locator("#history li").evaluate_all(
        "rows => rows.map(row => [row.dataset.domain, getComputedStyle(row).borderLeftColor])"
    )
    domain_of = MODEL.catalog.item_domains.tolist()
    assert [name for name, _ in found] == [
        DOMAINS[domain_of[int(row["item"])]] for row in reversed(rows)
    ]
    colours = dict(map(tuple, found))
    assert len(set(colours.values())) == len(colours) == len(DOMAINS)


def test_recommendations_are_those_of_the_chosen_domain(page: Any, service: ServiceProcess) -> None:
    take(service, events(5, "bob"))
    show(page, "bob")
    assert shown(page, "#recommendations") == recommended(service, "bob", DOMAINS[0])
    page.check(f"#domains input[value={DOMAINS[2]}]")
    page.wait_for_function(
        "name => document.getElementById('status').textContent.includes(name)", arg=DOMAINS[2]
    )
    assert shown(page, "#recommendations") == recommended(service, "bob", DOMAINS[2])


def test_a_chosen_item_joins_the_history(page: Any, service: ServiceProcess) -> None:
    take(service, events(3, "cy"))
    show(page, "cy")
    item = shown(page, "#recommendations")[0]
    page.click("#recommendations li:first-child button")
    page.wait_for_function("() => document.querySelectorAll('#history li').length === 4")
    page.wait_for_function(
        "item => document.querySelector('#recommendations .item').textContent !== item", arg=item
    )
    assert shown(page, "#history")[0] == item
    assert item not in shown(page, "#recommendations")
    known = service.ask("GET", "/v1/users/cy/history")[1]["events"]
    assert known[-1] == {"item": item, "domain": DOMAINS[0], "timestamp": 2001}


def test_users_are_suggested_as_one_types(page: Any, service: ServiceProcess) -> None:
    take(service, [event(0, f"zoe{number}") for number in range(3)] + [event(0, "yan")])
    page.fill("#user", "zoe")
    page.wait_for_function(
        "wanted => Array.from(users.options, one => one.value).join() === wanted",
        arg="zoe0,zoe1,zoe2",
    )


@pytest.mark.parametrize("user", ["<img src=x onerror=alert(1)>", "a/b?c#d", "zo\u00eb \u4e16"])
def test_any_name_is_a_name(page: Any, service: ServiceProcess, user: str) -> None:
    take(service, events(2, user))
    show(page, user)
    assert len(shown(page, "#history")) == 2
    assert page.locator("#length").text_content().count(user) == 1
    assert page.locator("main img").count() == 0


def test_a_stranger_is_answered(page: Any) -> None:
    show(page, "nobody")
    assert "no events" in page.locator("#length").text_content()


def test_a_busy_service_is_asked_again(page: Any) -> None:
    refused: list[str] = []

    def busy_once(route: Any) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            busy = json.dumps({"error": "the service is busy"})
            route.fulfill(status=503, headers={"Retry-After": "1"}, body=busy)

    page.route("**/v1/recommend", busy_once)
    show(page, "nobody")
    assert refused
    assert page.locator("#problem").is_hidden()


def test_a_token_is_asked_for_and_a_dead_service_told_of(browser: Any, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    with ServiceProcess(write_run(tmp_path / "run"), "--events", log, token=TOKEN) as service:
        page = browser.new_page()
        page.goto(service.url)
        page.wait_for_selector("#access:visible")
        page.fill("#token", "wrong")
        page.click("#access button")
        page.wait_for_selector("#problem:visible")
        page.fill("#token", TOKEN)
        page.click("#access button")
        page.wait_for_selector("#domains input")
        assert not page.locator("#access").is_visible()
        show(page, "ann")
        service.end()
        page.click("#pick button")
        page.wait_for_selector("#problem:visible")
        assert "does not answer" in page.locator("#problem").text_content()
        page.close()
