"""Parts that a gin file brings: what is bound to them, what is stored, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_runs import QUICK

from hstu_xd.catalog import DomainCatalog
from hstu_xd.cli import app
from hstu_xd.data.window import Window
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.parts import Part
from hstu_xd.serving.codec import fingerprint
from hstu_xd.serving.session import EncoderSession
from hstu_xd.training import run as runs
from hstu_xd.training.extension import metrics_of, objective_of
from hstu_xd.training.settings import RunSettings, load_settings

MODULE = '''
import gin
import torch
from torch import nn

from hstu_xd.model.encoder import HSTULayer
from hstu_xd.objectives.objective import DotProduct
from hstu_xd.objectives.retrieval import Retrieval


@gin.configurable
class Margin:
    """Pairwise loss with a margin, and scores by distance."""

    def __init__(self, margin=1.0, shape=None):
        self.margin, self.shape, self.metrics = margin, shape, {"low": lambda ranks: -ranks}

    def loss(self, model, batch, targets, generator):
        other = torch.randint(1, model.catalog.num_items + 1, targets.shape, generator=generator)
        users = model(batch)
        good, bad = (model.item_vectors(x.to(users.device)) for x in (targets, other))
        loss = self.margin - (users * (good - bad)).sum(1)
        return loss.clamp(min=0).sum()

    def scorer(self, model):
        def score(items):
            vectors = model.item_vectors(items)
            return lambda users: -torch.cdist(users, vectors)

        return score


@gin.configurable
def shape(power):
    return power


@gin.configurable
def at(ranks, k=3):
    return (ranks <= k).double()


@gin.configurable
def wrong(ranks):
    return "good"


@gin.configurable
def mean(ranks):
    return (1 / ranks).mean()


@gin.configurable
def first(catalog, num_negatives, generator, skip=0):
    return [catalog.items_of(d)[skip : skip + 2] for d in range(catalog.num_domains)]


@gin.configurable
class Plain(nn.Module):
    """A layer that reads nothing but the token itself."""

    def __init__(self, settings, *, width=2, **others):
        super().__init__()
        self.inner = nn.Linear(settings.embedding_dim, width)
        self.outer = nn.Linear(width, settings.embedding_dim)

    def forward(self, x, *read, **others):
        return x + self.outer(self.inner(x).relu())


@gin.configurable
class Halved(HSTULayer):
    def forward(self, x, *read, **others):
        return x / 2


@gin.configurable
class NoLayer:
    def __init__(self, settings, **others):
        pass


@gin.configurable
def no_layer(settings, **others):
    return 3


@gin.configurable
class NoLoss:
    metrics = {}

    def scorer(self, model):
        return None
'''


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, which gin keeps for good once it is imported."""
    here = tmp_path_factory.mktemp("desk")
    (here / "brought_parts.py").write_text(MODULE)
    return here


def read(desk: Path, *lines: str) -> RunSettings:
    file = desk / "mine.gin"
    file.write_text("\n".join(("import brought_parts", *QUICK, *lines)) + "\n")
    return load_settings([file])


def read_back(settings: RunSettings, tmp_path: Path) -> RunSettings:
    copy = tmp_path / "config.gin"
    copy.write_text(settings.to_gin())
    return load_settings([copy])


def test_what_is_bound_to_parts_is_theirs_and_reads_back(desk: Path, tmp_path: Path) -> None:
    settings = read(
        desk,
        "wide = 3",
        "xd_train.objective = @Margin()",
        "Margin.margin = 0.5",
        "Margin.shape = @cubed/shape()",
        "cubed/shape.power = %wide",
        "xd_train.metrics = (@at, @ten/at)",
        "ten/at.k = 10",
        "xd_train.select_metric = 'ten/at'",
        "layer = @Plain",
        "xd_encoder.layer = %layer",
        "Plain.width = %wide",
        "xd_encoder.num_blocks = 1",
    )
    shape = "cubed/brought_parts.shape(power=3)"
    for one in (settings, read_back(settings, tmp_path)):
        objective: Any = objective_of(one.train)
        assert (objective.margin, objective.shape) == (0.5, 3)
        ranks = torch.tensor([1, 5, 20])
        found = {name: metric(ranks).tolist() for name, metric in metrics_of(one.train).items()}
        assert found == {"low": [-1, -5, -20], "at": [1, 0, 0], "ten/at": [1, 1, 0]}
        assert one.encoder["layer"].value.keywords == {"width": 3}
        assert one.parts == {
            "layer": "brought_parts.Plain(width=3)",
            "objective": f"brought_parts.Margin(margin=0.5, shape={shape})",
            "metric at": "brought_parts.at",
            "metric ten/at": "ten/brought_parts.at(k=10)",
        }
        assert one.foreign.modules == ("brought_parts",)
    again = read_back(settings, tmp_path)
    assert again.to_gin() == settings.to_gin()
    assert again.train == settings.train
    assert again.encoder_settings(3) == settings.encoder_settings(3)
    name = runs.variant_name(settings)
    assert "layer brought_parts.Plain(width=3)" in name
    assert f"objective brought_parts.Margin(margin=0.5, shape={shape})" in name


def test_parts_that_differ_in_what_is_bound_to_them_are_told_apart(desk: Path) -> None:
    one = read(desk, "xd_encoder.layer = @Plain", "Plain.width = 3")
    other = read(desk, "xd_encoder.layer = @Plain", "Plain.width = 4")
    recorded = {"encoder": {"num_domains": 3, "layer": "brought_parts.Plain(width=3)"}, "train": {}}
    assert one.unlike(recorded) == []
    (unlike,) = other.unlike(recorded)
    assert "xd_encoder.layer" in unlike
    assert runs.variant_name(one) != runs.variant_name(other)


def test_what_nothing_refers_to_is_still_refused(desk: Path) -> None:
    for line, name in (
        ("Margin.margin = 2.0", "Margin.margin"),
        ("unused = 3", "unused"),
        ("xd_train.metrics = (@at,)\nten/at.k = 10", "ten/at.k"),
    ):
        with pytest.raises(InputError, match=rf"nothing reads the binding '{name}'"):
            read(desk, *line.splitlines())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["xd_train.objective = @NoLoss()"], "NoLoss() is a NoLoss without loss; an object with"),
        (["xd_train.objective = @Margin"], "is the class Margin; an object with loss"),
        (["xd_train.objective = 'ranking'"], "'ranking'; it must be 'retrieval' or a reference"),
        (["xd_encoder.layer = @NoLayer"], "@brought_parts.NoLayer is no torch.nn.Module; derive"),
        (["xd_encoder.layer = 'dense'"], "layer is 'dense'; 'hstu', 'sasrec', or a reference"),
        (["xd_encoder.layer = @shape()", "shape.power = 3"], "is a int; give the class itself"),
        (["xd_train.negatives = @shape()", "shape.power = 3"], "is a int; a function (catalog"),
        (["xd_train.negatives = 'all'"], "xd_train.negatives = 'all'; it must be"),
        (["xd_train.metrics = ('mrr',)"], "holds 'mrr'; functions of ranks are needed"),
        (["xd_train.metrics = (@at, @at)"], "'at' is the name of two metrics"),
        (["xd_train.select_metric = 'at'"], "'at'; it must be one of hr@1"),
        (["xd_train.objective = @Nowhere()"], "No configurable matching reference '@Nowhere()'"),
        (["import nowhere_parts"], "No module named 'nowhere_parts'"),
    ],
)
def test_parts_that_cannot_do_their_work(desk: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(desk, *lines)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_alone_needs_no_tuple(desk: Path) -> None:
    assert read(desk, "xd_train.metrics = @at").train.metrics == ("brought_parts.at",)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("wrong", "the metric wrong returned 'good' for .* ranks; a tensor of shape"),
        ("mean", r"the metric mean returned shape \(\) for .* a number for each rank"),
    ],
)
def test_a_metric_that_gives_no_numbers_is_named(
    desk: Path, store_path: Path, tmp_path: Path, metric: str, message: str
) -> None:
    settings = read(desk, f"xd_train.metrics = (@{metric},)")
    with pytest.raises(InputError, match=message):
        runs.train(store_path, settings, tmp_path / "run")


def test_a_layer_is_checked_when_it_is_built(desk: Path, store_path: Path, tmp_path: Path) -> None:
    settings = read(desk, "xd_encoder.layer = @no_layer")
    with pytest.raises(InputError, match=r"no_layer makes a int; a torch\.nn\.Module is needed"):
        runs.train(store_path, settings, tmp_path / "run")


def test_settings_that_an_objective_does_not_read_are_said(
    desk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(desk, "xd_train.temperature = 0.2")
    assert not caplog.records
    read(desk, "xd_train.objective = @Margin()", "xd_train.temperature = 0.2")
    assert (
        "temperature = 0.2 does nothing while xd_train.objective is @brought_parts" in caplog.text
    )


def test_a_run_of_parts_trains_and_ranks_by_its_own_scores(
    desk: Path, store_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = read(desk, "xd_train.objective = @Margin()", "xd_train.select_metric = 'low'")
    summary = runs.train(store_path, settings, run)
    assert summary["valid"]["low"] < -1  # the first epoch is the best however bad it is
    trained = runs.load_trained(run, allow_imports=True)
    items, users = torch.tensor([1, 4]), torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    scores = trained.scorer(items)(users)
    expected = -torch.cdist(users, trained.model.item_vectors(items))
    assert torch.equal(scores, expected)
    session = EncoderSession(trained.model, scorer=trained.scorer)
    session.append(["ann", "ann"], [1, 2], [10, 20])
    domain = int(trained.model.catalog.domain_of(torch.tensor(4)))
    ((best, *_),) = session.recommend(["ann"], [domain], 3)
    score = trained.scorer(torch.tensor([best[0]]))(session.query(["ann"], [domain]))
    assert best[1] == pytest.approx(score.item(), abs=1e-5)
    assert best[1] < 0
    assert session.score(["ann"], torch.tensor([[best[0]]]), [domain]).item() == pytest.approx(
        best[1], abs=1e-5
    )
    with pytest.raises(InputError, match=r"approximate.*searches by dot products"):
        EncoderSession(trained.model, retrieval="approximate", scorer=trained.scorer)


def test_a_sampler_stands_in_the_name_and_is_used(
    desk: Path, store_path: Path, tmp_path: Path
) -> None:
    losses = []
    for skip in (0, 20):
        settings = read(desk, "xd_train.negatives = @first", f"first.skip = {skip}")
        assert f"negatives brought_parts.first(skip={skip})" in runs.variant_name(settings)
        runs.train(store_path, settings, tmp_path / f"run{skip}")
        losses.append((tmp_path / f"run{skip}" / "metrics.jsonl").read_text().splitlines()[0])
    assert losses[0] != losses[1]


def test_a_layer_of_another_kind_trains_and_is_not_served(
    desk: Path, store_path: Path, tmp_path: Path
) -> None:
    runs.train(store_path, read(desk, "xd_encoder.layer = @Plain"), tmp_path / "run")
    model = runs.load(tmp_path / "run", allow_imports=True)
    with pytest.raises(InputError, match=r"layer is brought_parts\.Plain; a session computes"):
        EncoderSession(model)
    settings = read(desk, "xd_encoder.layer = @Halved").encoder_settings(model.catalog.num_domains)
    with pytest.raises(InputError, match=r"brought_parts\.Halved overrides forward; a session"):
        EncoderSession(CrossDomainHSTU(model.catalog, settings))


def test_states_of_one_layer_are_not_those_of_another(desk: Path) -> None:
    model = CrossDomainHSTU(*tiny())
    before = fingerprint(model, Window(8), torch.float32)
    model.settings = read(desk, "xd_encoder.layer = @Halved").encoder_settings(2)
    one = fingerprint(model, Window(8), torch.float32)
    object.__setattr__(model.settings, "layer", Part("other.Halved", None))
    assert len({before, one, fingerprint(model, Window(8), torch.float32)}) == 3


def tiny() -> tuple[DomainCatalog, EncoderSettings]:
    catalog = DomainCatalog(torch.tensor([0, 0, 1]), ["a", "b"])
    return catalog, EncoderSettings(num_domains=2, norm_length=8)


@pytest.fixture(scope="module")
def plain(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    runs.train(store_path, load_settings([], QUICK), run)
    return run


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("import planted", "planted"),
        ("import planted.deeper", "planted.deeper"),
        ("from planted import deeper", "planted.deeper"),
        ("import planted as hstu_xd", "planted"),
        ("import \\\n    planted", "planted"),
        ("import hstu_xd_planted", "hstu_xd_planted"),
        ("from __gin__ import dynamic_registration", "__gin__.dynamic_registration"),
        ("include 'planted.gin'", "file planted.gin"),
        ("import hstu_xd.training.settings\nimport planted", "planted"),
    ],
)
def test_a_run_from_elsewhere_executes_nothing(
    plain: Path,
    tmp_path: Path,
    lines: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, fired = tmp_path / "run", tmp_path / "fired"
    run.mkdir()
    for file in plain.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    (run / "config.gin").write_text(f"{lines}\n{(run / 'config.gin').read_text()}")
    code = f"open({str(fired)!r}, 'w')"
    for name in ("planted", "hstu_xd_planted"):
        (tmp_path / f"{name}.py").write_text(code)
    (run / "planted.gin").write_text("import planted\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HSTU_XD_ALLOW_IMPORTS", raising=False)
    assert app.run(["evaluate", "run"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"needs code from outside hstu-xd, which loading it would execute: {named};" in error
    assert not fired.exists()
    assert "planted" not in sys.modules


def test_a_stored_file_that_cannot_be_parsed_is_refused(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text((plain / "run.json").read_text())
    (run / "config.gin").write_text("import (planted\n")
    assert app.run(["evaluate", str(run)]) == 2
    assert "config.gin" in capsys.readouterr().err


def test_modules_of_this_package_need_no_permission(plain: Path, tmp_path: Path) -> None:
    text = (plain / "config.gin").read_text()
    (plain / "config.gin").write_text(f"import hstu_xd.plugins.host\n{text}")
    try:
        runs.load(plain)
    finally:
        (plain / "config.gin").write_text(text)


def test_the_places_of_modules_do_not_stay_known_for_nothing(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.gin").write_text("xd_train.num_epochs = 2\n")
    before = list(sys.path)
    load_settings([tmp_path / "plain.gin"])
    assert sys.path == before


def test_recipes_are_included_from_a_users_own_file(tmp_path: Path) -> None:
    (tmp_path / "mine.gin").write_text('include "gin/standalone/xd.gin"\nxd_encoder.ddsr = False\n')
    settings = load_settings([tmp_path / "mine.gin"])
    assert settings.encoder["tape"] is True
    assert settings.encoder["ddsr"] is False
