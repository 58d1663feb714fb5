"""Settings that differ have different names, and defaults add nothing to one."""

import dataclasses
import pickle
from typing import Any

from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hstu_xd.declaration import defaults_of, labels, settings_of, tags
from hstu_xd.errors import InputError
from hstu_xd.model.settings import PER_DOMAIN, SWITCHES, EncoderSettings
from hstu_xd.parts import Part

SIZES = {"num_domains": 2, "norm_length": 8}
DECLARED = settings_of(EncoderSettings)
BOUND = [name for name, each in DECLARED.items() if not each.from_data]


def values_of(name: str) -> st.SearchStrategy[Any]:
    each = DECLARED[name]
    if each.allowed:
        return st.sampled_from(each.allowed)
    if name in ("full_attention_layers", "ddsr_layers"):
        return st.sampled_from([(), (0,), (1,), (0, 1)])
    if name == "layer":
        return st.sampled_from(["hstu", Part("mine.Layer", object), Part("mine.Other", object)])
    if name == "impl":
        return st.sampled_from(["auto", "eager", "reference", "softmax", "mask"])
    drawn = {bool: st.booleans(), int: st.integers(0, 4), float: st.sampled_from([0.1, 0.2, 0.4])}
    return st.one_of(st.just(each.default), drawn[each.type])


@st.composite
def encoders(draw: st.DrawFn) -> EncoderSettings:
    """Settings that are allowed, few of them changed, so that two are often nearly alike."""
    changed = draw(st.lists(st.sampled_from(BOUND), max_size=5, unique=True))
    values = {name: draw(values_of(name)) for name in changed}
    try:
        return EncoderSettings(**SIZES, **values)
    except InputError:
        assume(False)
        raise


def path_of(settings: EncoderSettings) -> tuple[Any, ...]:
    """What a checkpoint's path tells: upstream's part, which names its sizes, and ours."""
    sizes = (getattr(settings, n) for n, each in DECLARED.items() if each.upstream and not each.tag)
    return (*sizes, "-".join(tags(settings)))


@hypothesis_settings(max_examples=300, deadline=None)
@given(encoders(), encoders())
def test_settings_that_differ_have_different_names(
    one: EncoderSettings, other: EncoderSettings
) -> None:
    assert (path_of(one) == path_of(other)) == (one == other)
    assert (" + ".join(labels(one)) == " + ".join(labels(other))) == (one == other)


@hypothesis_settings(max_examples=300, deadline=None)
@given(encoders(), st.data())
def test_one_change_changes_the_names(settings: EncoderSettings, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(BOUND))
    value = data.draw(values_of(name))
    try:
        changed = dataclasses.replace(settings, **{name: value})
    except InputError:
        return
    assert (path_of(changed) == path_of(settings)) == (changed == settings)
    assert (labels(changed) == labels(settings)) == (changed == settings)


def test_names_that_runs_have_had_stay() -> None:
    def named(**switches: Any) -> tuple[str, str]:
        settings = EncoderSettings(**SIZES, **switches)
        return "-".join(tags(settings)), " + ".join(labels(settings))

    assert named() == ("", "")
    assert named(domain_mask=True, target_view_heads=2, tape=True, ddsr=True) == (
        "mask-view2-tape-ddsr4",
        "mask + target view + TAPE + DDSR",
    )
    assert named(target_domain_embedding=True) == ("target", "target-domain embedding")
    assert named(normalization="softmax")[0] == "softmax"
    assert named(segment_by="count", history_tokens=2)[0] == "count64-tokens2"
    assert named(segment_by="session", segment_lookback=1)[0] == "session86400-tokens0-lookback1"


def test_what_has_no_tag_is_spelled_out_for_people_and_hashed_for_paths() -> None:
    settings = EncoderSettings(**SIZES, ddsr=True, states_per_domain=2, combine="after_gate")
    assert labels(settings) == ["DDSR", "combine=after_gate", "states_per_domain=2"]
    ddsr, digest = tags(settings)
    assert ddsr == "ddsr2"
    assert len(digest) == 9


def test_every_setting_is_declared_and_has_a_meaning() -> None:
    assert set(DECLARED) == {field.name for field in dataclasses.fields(EncoderSettings)}
    assert set(DECLARED) - set(defaults_of(EncoderSettings)) == set(SIZES)
    assert all(each.meaning.endswith(".") for each in DECLARED.values())


def test_switches_are_what_makes_another_model() -> None:
    assert set(PER_DOMAIN) < set(SWITCHES)
    assert set(SWITCHES) - set(PER_DOMAIN) == {
        "segment_by",
        "segment_lookback",
        "history_tokens",
        "normalization",
        "layer",
    }
    plain = EncoderSettings(**SIZES, num_blocks=4, concat_ua=True, states_per_domain=2)
    assert plain.is_plain
    assert not dataclasses.replace(plain, impl="eager").is_plain
    assert not dataclasses.replace(plain, normalization="softmax").is_plain
    assert not plain.is_cross_domain
    assert dataclasses.replace(plain, tape=True).is_cross_domain


def test_what_is_read_follows_from_what_is_on() -> None:
    def read(**switches: Any) -> tuple[bool, bool]:
        switches = {"enable_relative_attention_bias": False, **switches}
        settings = EncoderSettings(**SIZES, **switches)
        return settings.reads_time, settings.reads_target_domain

    assert read() == (False, False)
    assert read(enable_relative_attention_bias=True) == (True, False)
    assert read(ddsr=True) == (True, True)
    assert read(ddsr=True, state_age_bias=False, query_target_domain=False) == (False, False)
    assert read(target_view_heads=1) == (False, True)
    assert read(segment_by="count") == (False, False)
    assert read(segment_by="time_gap", segment_gap=0) == (True, False)


def test_settings_can_be_stored_and_compared() -> None:
    settings = EncoderSettings(**SIZES, ddsr=True)
    assert settings.reads_time
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert EncoderSettings(**dataclasses.asdict(settings)) == settings
    assert "Setting(" not in repr(settings)
