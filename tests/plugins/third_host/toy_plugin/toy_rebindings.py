"""The names that are rebound, in one stage, and one more without a GPU."""

from collections.abc import Callable

from hstu_xd.plugins.rebinding import Rebinding

TRAINER = "toy_upstream.trainer"


def with_toy_xd(build_model: Callable[[str], str]) -> Callable[[str], str]:
    return lambda name: "our model" if name == "TOY_XD" else build_model(name)


REBINDINGS = ((Rebinding(TRAINER, "build_model", with_toy_xd, ("name",)),),)


def cpu_rebindings() -> tuple[Rebinding, ...]:
    return (Rebinding(TRAINER, "pick_device", lambda _: lambda rank: "cpu"),)
