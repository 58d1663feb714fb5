"""The page as a whole, and what ``hstu-xd report`` refuses."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from workshop import Workshop

from hstu_xd.experiments.report.page import write_report

HOSTILE = '<script>alert("x")</script> & $\\frac$ \u672c'


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A report of two variants and an unfinished run, with a hostile domain name."""
    workshop = Workshop(tmp_path_factory.mktemp("report"))
    store = workshop.store(domains=(HOSTILE, "books"), synthetic=True)
    runs = [
        workshop.run(f"hstu-{seed}", store, variant="hstu", seed=seed, level=0.2) for seed in (1, 2)
    ]
    runs.append(workshop.run("all-1", store, variant="all <b>", level=0.3, epochs=10))
    runs.append(workshop.run("all-2", store, variant="all <b>", seed=2, finished=False))
    return write_report(runs, workshop.root / "report").parent


@pytest.fixture(scope="module")
def page(built):
    return (built / "index.html").read_text(encoding="utf-8")


def test_the_numbers_are_in_the_page(page):
    text = " ".join(Reader(page).text.split())
    assert "20.15 \u00b1 0.07" in text  # mean of 20.1 and 20.2
    assert "30.10 +9.95" in text
    assert "24.18 \u00b1 0.08" in text  # without a switch: a fifth more
    for word in ("40 users", "20 items", "2 domains", "seeds 1, 2", "2.13.0", "12,345"):
        assert word.replace(" ", "") in text.replace(" ", ""), word
    assert "hstu-xd train --data prepared --out all-1" in text
    assert "Synthetic data." in text
    assert "still training or stopped, after epoch 4" in text
    assert "ties" in text.lower()
    assert "leave-one-out" in text.lower()


def test_best_is_bold(page):
    assert "<b>30.10</b>" in page
    assert "<b>20.15</b>" not in page


def test_hostile_names_are_text(page):
    reader = Reader(page)
    assert "script" not in reader.tags
    assert HOSTILE in reader.text
    assert "all <b>" in reader.text


def test_nothing_outside_is_referred_to(page):
    for name, value in Reader(page).attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("#", "data:")), (name, value)
    assert not re.search(r"@import|url\((?!#)|<link|https?://", page)


def test_figures_lie_beside_the_page(built):
    assert sorted(path.name for path in built.iterdir()) == sorted(
        [
            "index.html",
            "open_questions.md",
            *(f"curve_{m}.png" for m in ("loss", "hr_at_10", "hr_at_100", "ndcg_at_100", "mrr")),
            *(f"{g}_{m}_at_100.png" for g in ("domains", "switch") for m in ("hr", "ndcg")),
            *(f"{n}.png" for n in ("domain_sizes", "transitions", "history_lengths", "cost_ratio")),
        ]
    )
    for path in built.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_the_data_the_page_says_so(workshop, hstu_xd_run):
    store = workshop.store()
    run = workshop.run("run", store, epochs=1)
    shutil.move(store, workshop.root / "moved")
    out = workshop.root / "report"
    code, stderr = hstu_xd_run(run, "--out", out)
    assert code == 0
    assert "No figures of the data" in (out / "index.html").read_text()
    assert not (out / "transitions.png").exists()
    # An existing report is replaced with --force only, and --data finds what has moved.
    code, stderr = hstu_xd_run(run, "--out", out)
    assert (code, "add --force" in stderr) == (2, True)
    code, stderr = hstu_xd_run(run, "--out", out, "--force", "--data", workshop.root / "moved")
    assert (code, (out / "transitions.png").exists()) == (0, True)


def test_a_store_that_changed_is_not_drawn(workshop):
    store = workshop.store()
    run = workshop.run("run", store, epochs=1)
    shutil.rmtree(store)
    workshop.store(seed=1)
    page = write_report([run], workshop.root / "report")
    assert "now holds other data" in page.read_text()


def test_different_data_is_refused_unless_allowed(workshop, hstu_xd_run):
    runs = [
        workshop.run("one", workshop.store("first"), epochs=1),
        workshop.run("two", workshop.store("second", seed=1), epochs=1, finished=False),
    ]
    out = workshop.root / "report"
    code, stderr = hstu_xd_run(*runs, "--out", out)
    assert code == 2
    assert all(word in stderr for word in (str(runs[0]), str(runs[1]), "--allow-mixed-data"))
    assert not out.exists()
    code, stderr = hstu_xd_run(*runs, "--out", out, "--allow-mixed-data")
    assert code == 0
    text = (out / "index.html").read_text()
    assert "Data: first" in text
    assert "Data: second" in text
    assert "No run has read its test yet" in text
    assert (out / "data2_transitions.png").exists()


def test_doubtful_means_are_pointed_out(workshop, monkeypatch):
    store = workshop.store()
    runs = [
        workshop.run("a", store, epochs=1),
        workshop.run("b", store, epochs=1, train={"local_batch_size": 64}),
    ]
    monkeypatch.setattr("hstu_xd.experiments.report.page._draw", lambda comparisons: pytest.fail(
        "\n".join(comparisons[0].notes)))  # fmt: skip
    with pytest.raises(pytest.fail.Exception) as caught:
        write_report(runs, workshop.root / "report")
    assert "differ in train.local_batch_size" in str(caught.value)
    assert "repeat a seed" in str(caught.value)
    assert not (workshop.root / "report").exists()


@pytest.mark.parametrize("kind", ["no run", "bad line", "foreign folder"])
def test_bad_input_exits_2_and_writes_nothing(workshop, hstu_xd_run, kind):
    run, out = workshop.run("run", workshop.store(), epochs=1), workshop.root / "report"
    if kind == "no run":
        shutil.rmtree(run)
    elif kind == "bad line":
        (run / "metrics.jsonl").write_text("nonsense\n")
    else:
        out.mkdir()
        (out / "index.html").write_text(json.dumps("mine"))
    before = sorted(workshop.root.rglob("*"))
    code, stderr = hstu_xd_run(run, "--out", out, "--force")
    assert code == 2
    assert str(out if kind == "foreign folder" else run) in stderr
    assert "\n" not in stderr.strip()
    assert sorted(workshop.root.rglob("*")) == before
