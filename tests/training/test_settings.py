"""Settings from gin: defaults, round trip, and every way to get them wrong."""

from pathlib import Path

import pytest

from hstu_xd.declaration import defaults_of, settings_of
from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.settings import RecSettings
from hstu_xd.training.settings import BLOCKS, load_settings

# Those of rankers are tests/ranking/test_rank_command.py's.
RECIPES = sorted((Path(__file__).parents[2] / "gin" / "standalone").glob("[!r]*.gin"))


def test_later_bindings_win(tmp_path: Path) -> None:
    file = tmp_path / "a.gin"
    file.write_text("xd_encoder.ddsr = True\nxd_train.learning_rate = 1\nxd_train.num_epochs = 3\n")
    settings = load_settings([file], ["xd_train.num_epochs = 5"])
    assert settings.encoder["ddsr"] is True
    assert settings.train.learning_rate == 1.0
    assert settings.train.num_epochs == 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_round_trip(recipe: Path, tmp_path: Path) -> None:
    settings = load_settings([recipe])
    copy = tmp_path / "config.gin"
    copy.write_text(settings.to_gin())
    again = load_settings([copy])
    assert again.train == settings.train
    assert again.encoder_settings(3) == settings.encoder_settings(3)


def test_plain_hstu_trains_by_the_recipe_without_a_file() -> None:
    recipe = load_settings([Path("gin/standalone/hstu.gin")])
    assert load_settings([]).train == recipe.train
    assert load_settings([]).encoder_settings(3) == recipe.encoder_settings(3)


def test_the_recipes_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("gin/standalone/xd.gin")
    assert load_settings([recipe]).encoder["ddsr"] is True
    (tmp_path / "gin" / "standalone").mkdir(parents=True)
    recipe.write_text("xd_encoder.ddsr = False\n")
    assert load_settings([recipe]).encoder["ddsr"] is False


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("xd_encoder.dssr = True", "dssr.*Did you mean xd_encoder.ddsr"),
        ("xd_enkoder.ddsr = True", "xd_enkoder.*Did you mean xd_encoder"),
        ("hstu_encoder.num_blocks = 2", "hstu_encoder"),
        ("xd_encoder.num_domains = 2", "num_domains"),
        ('xd_encoder.ddsr = "yes"', "xd_encoder.ddsr = 'yes' is a str; a bool"),
        ("xd_train.num_epochs = 2.5", "num_epochs = 2.5 is a float; a int"),
        (
            "xd_encoder.full_attention_layers = (0, 'b')",
            "full_attention_layers.*'b' is a str; a int",
        ),
        ("xd_train.num_epochs = 0", "num_epochs = 0; it must be at least 1"),
        ('xd_train.select_metric = "auc"', "select_metric = 'auc'.*hr@1"),
        ("xd_encoder.target_view_heads = 9", "target_view_heads is 9; 0..num_heads=4"),
        ('xd_train.select_metric = "auc[switch]"', "'auc.switch.'.*or one of a group, hr@1.switch"),
        ('xd_train.select_metric = "hr@10[switch"', "'hr@10.switch'; it must be one of hr@1"),
        ('xd_train.select_metric = "hr@10[]"', "'hr@10..'; it must be one of hr@1"),
        ("xd_encoder.num_heads =", "xd_encoder.num_heads =.*parse"),
        ("scope/xd_encoder.ddsr = True", "nothing reads.*scope/xd_encoder"),
        ("depth = 3", "nothing reads the binding 'depth'"),
    ],
)
def test_bad_binding_names_value_and_mend(binding: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_settings([], [binding])
    assert "\n" not in str(caught.value)


FLOATS = [
    (block, name)
    for block, cls in BLOCKS.items()
    for name, each in settings_of(cls).items()
    if each.type is float
]


@pytest.mark.parametrize(("block", "name"), FLOATS)
@pytest.mark.parametrize("written", ["1e999", "-1e999", f"1{'0' * 400}"])
def test_number_that_is_not_finite_is_refused_in_gin(
    block: str, name: str, written: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.gin"
    file.write_text(f"{block}.{name} = {written}\n")
    for given in (([], [f"{block}.{name} = {written}"]), ([file],)):
        with pytest.raises(InputError, match=rf"{name}.*a finite number"):
            load_settings(*given)


@pytest.mark.parametrize("written", ["1e999", "(1, -1e999)", "[{'a': 1e999}]"])
def test_gin_loses_no_value_in_silence(written: str) -> None:
    """Gin writes no infinite number, so that a macro or a part's own would not reach the run."""
    for binding in (f"depth = {written}", f"scope/xd_train.num_epochs = {written}"):
        with pytest.raises(InputError, match=r"(depth|num_epochs) = .*inf.*a finite number"):
            load_settings([], [binding])


@pytest.mark.parametrize(("block", "name"), FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400])
def test_number_that_is_not_finite_is_refused_in_python(
    block: str, name: str, value: float
) -> None:
    cls = BLOCKS[block]
    needed = {one: 1 for one in settings_of(cls) if one not in defaults_of(cls)}
    with pytest.raises(InputError, match=rf"{name}.*a finite number"):
        cls(**needed, **{name: value})


def test_number_that_is_not_finite_is_refused_in_yaml() -> None:
    """No key of this package is a float; REC's own size of that type is checked all the same."""
    sizes = {"norm_length": 9, "linear_dropout_rate": float("nan")}
    with pytest.raises(InputError, match="linear_dropout_rate is nan; a finite number"):
        RecSettings.read({"model": "HSTU_XD"}).encoder_settings(sizes, 2)
    with pytest.raises(InputError, match="xd_states_per_domain: inf is a float; a int"):
        RecSettings.read({"model": "HSTU_XD", "xd_states_per_domain": float("inf")})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("xd_train.lr", "xd_train.learning_rate"),
        ("xd_train.batch_size", "xd_train.local_batch_size"),
        ("xd_train.dropout", "xd_train.dropout_rate"),
        ("xd_train.seed", "xd_train.random_seed"),
        ("xd_encoder.num_epochs", "xd_train.num_epochs"),
        ("xd_encoder.dropout", "xd_encoder.linear_dropout_rate"),
        ("xd_encoder.mask", "xd_encoder.domain_mask"),
        ("xd_encoder.num_layers", "xd_encoder.num_blocks"),
        ("train_fn.learning_rate", "xd_train.learning_rate"),
        ("num_epochs", "xd_train.num_epochs"),
        ("lr", "xd_train.learning_rate"),
        ("batch_size", "xd_train.local_batch_size"),
    ],
)
def test_wrong_name_gets_the_setting_that_it_means(written: str, meant: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings([], [f"{written} = 1"])
    assert str(caught.value).endswith(f"Did you mean {meant}?")


def test_name_that_means_nothing_gets_no_advice() -> None:
    for name in ("xd_train.qqqq", "qqqq"):
        with pytest.raises(InputError, match="qqqq") as caught:
            load_settings([], [f"{name} = 1"])
        assert "Did you mean" not in str(caught.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.gin: no such file"):
        load_settings([Path("nowhere.gin")])


def test_used_macro_is_read(tmp_path: Path) -> None:
    assert load_settings([], ["depth = 3", "xd_encoder.num_blocks = %depth"]).encoder == {
        "num_blocks": 3
    }


def test_setting_without_its_switch_is_said_to_do_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_settings([], ["xd_encoder.states_per_domain = 3", "xd_encoder.ddsr = True"])
    assert not caplog.records
    load_settings([], ["xd_encoder.states_per_domain = 3"])
    assert "states_per_domain = 3 does nothing while xd_encoder.ddsr is False" in caplog.text


def test_file_includes_its_neighbour_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, epochs in (("here", 7), ("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        base = tmp_path / folder / "base.gin"
        base.write_text(f"xd_train.num_epochs = {epochs}\n")
    for folder in ("a", "b"):
        (tmp_path / folder / "top.gin").write_text('include "base.gin"\n')
    monkeypatch.chdir(tmp_path / "here")  # where another base.gin lies
    a, b = Path("../a/top.gin"), Path("../b/top.gin")
    assert load_settings([a]).train.num_epochs == 2
    assert load_settings([a, b]).train.num_epochs == 3
    assert load_settings([b, a]).train.num_epochs == 2
    assert not caplog.records


def test_own_file_anywhere_includes_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "mine" / "own.gin"
    own.parent.mkdir()
    own.write_text('include "gin/standalone/xd.gin"\nxd_train.num_epochs = 3\n')
    monkeypatch.chdir(tmp_path)
    settings = load_settings([own])
    assert settings.train.num_epochs == 3
    assert settings.encoder["ddsr"] is True
    assert settings.encoder["num_blocks"] == 2  # of hstu.gin, which the recipe includes
    # A file beside the user's own comes before the shipped one.
    beside = own.parent / "gin" / "standalone"
    beside.mkdir(parents=True)
    (beside / "xd.gin").write_text("xd_encoder.ddsr = False\n")
    assert load_settings([own]).encoder == {"ddsr": False}


def test_error_in_an_included_file_names_it_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "top.gin").write_text('include "part.gin"\n')
    part = tmp_path / "part.gin"
    part.write_text('include "gin/standalone/hstu.gin"\n\nxd_encoder.dssr = True\n')
    with pytest.raises(InputError, match=r'part\.gin", line 3.*Did you mean xd_encoder\.ddsr'):
        load_settings([tmp_path / "top.gin"])
    part.write_text('include "top.gin"\n')
    with pytest.raises(InputError, match=r"part\.gin includes 'top\.gin', which includes it"):
        load_settings([tmp_path / "top.gin"])


def test_included_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    top = tmp_path / "top.gin"
    top.write_text('include "nowhere.gin"\n')
    with pytest.raises(InputError, match=r"top\.gin.*nowhere\.gin"):
        load_settings([top])


@pytest.mark.parametrize(
    ("bindings", "name"),
    [
        (["xd_encoder.segment_length = 5"], "segment_length = 5"),
        (['xd_encoder.segment_by = "session"', "xd_encoder.segment_length = 5"], "segment_length"),
        (['xd_encoder.segment_by = "count"', "xd_encoder.segment_gap = 5"], "segment_gap = 5"),
        (
            ["xd_encoder.domain_mask = True", "xd_encoder.full_attention_layers = (0, 1)"],
            "domain_mask = True",
        ),
        (
            ["xd_encoder.domain_mask = True", "xd_encoder.target_view_heads = 4"],
            "domain_mask = True",
        ),
    ],
)
def test_setting_that_another_one_leaves_nothing_to_do_is_named(
    bindings: list[str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_settings([], bindings)
    assert len(caplog.records) == 1
    assert f"xd_encoder.{name}" in caplog.text
    assert "does nothing" in caplog.text


@pytest.mark.parametrize(
    "bindings",
    [
        ['xd_encoder.segment_by = "count"', "xd_encoder.segment_length = 5"],
        ['xd_encoder.segment_by = "time_gap"', "xd_encoder.segment_gap = 5"],
        ["xd_encoder.domain_mask = True", "xd_encoder.full_attention_layers = (1,)"],
        # Runs are cut by domain whatever the heads read.
        [
            "xd_encoder.domain_mask = True",
            "xd_encoder.target_view_heads = 4",
            'xd_encoder.segment_by = "count"',
        ],
    ],
)
def test_settings_that_act_are_not_warned_of(
    bindings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    load_settings([], bindings)
    assert not caplog.records
