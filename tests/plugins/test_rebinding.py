"""Rebinding and reverting, on a module made for the test."""

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from hstu_xd.errors import HstuXdError
from hstu_xd.plugins.rebinding import Rebinding, apply


def greet(name: str) -> str:
    return f"hello {name}"


class Door:
    def open(self) -> str:
        return "open"


@pytest.fixture
def theirs() -> Iterator[ModuleType]:
    module = ModuleType("theirs")
    module.greet, module.Door = greet, Door  # type: ignore[attr-defined]
    sys.modules["theirs"] = module
    yield module
    del sys.modules["theirs"]


def shouting(original):
    return lambda name: original(name).upper()


GREET = Rebinding("theirs", "greet", shouting, ("name",))


def test_replacement_sees_the_original_and_revert_restores_the_identical_object(theirs) -> None:
    patch = apply([GREET])
    assert theirs.greet("you") == "HELLO YOU"
    assert patch.originals == {"theirs.greet": greet}
    patch.revert()
    assert theirs.greet is greet
    patch.revert()
    assert theirs.greet is greet
    assert patch.originals == {}


def test_a_name_that_is_rebound_twice_goes_back_to_where_it_was(theirs) -> None:
    with apply([GREET]) as patch:
        patch.add([Rebinding("theirs", "greet", lambda o: lambda name: o(name) + "!", ("name",))])
        assert theirs.greet("you") == "HELLO YOU!"
        assert patch.originals == {"theirs.greet": greet}
    assert theirs.greet is greet


def test_a_method_is_reached_through_its_class(theirs) -> None:
    original = Door.open
    with apply([Rebinding("theirs", "Door.open", lambda o: lambda self: o(self) + " wide")]):
        assert Door().open() == "open wide"
    assert Door.open is original


def test_all_or_nothing(theirs) -> None:
    with pytest.raises(HstuXdError, match=r"theirs\.absent is not there"):
        apply([GREET, Rebinding("theirs", "absent", shouting)])
    assert theirs.greet is greet


def test_changed_signature_is_refused(theirs) -> None:
    with pytest.raises(HstuXdError, match=r"theirs\.greet takes no parameter 'title'"):
        apply([Rebinding("theirs", "greet", shouting, ("name", "title"))])
    assert theirs.greet is greet


def test_somebody_elses_later_rebinding_is_not_trampled(theirs) -> None:
    patch = apply([GREET])
    theirs.greet = later = shouting(greet)
    with pytest.raises(HstuXdError, match="rebound again"):
        patch.revert()
    assert theirs.greet is later


def test_old_and_new_are_logged(theirs, caplog) -> None:
    with caplog.at_level(logging.DEBUG), apply([GREET]):
        assert "theirs.greet" in caplog.text
        assert "greet becomes" in caplog.text
        assert "shouting" in caplog.text
    assert "back to" in caplog.text


def test_a_log_of_information_has_one_line_of_all_names(theirs, caplog) -> None:
    with caplog.at_level(logging.INFO), apply([GREET]):
        pass
    assert caplog.messages == ["hstu-xd takes the place of greet; log DEBUG for more"]
