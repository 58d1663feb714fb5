"""The package as it would be with a switch more in model/settings.py; prints what it tells of it.

Run in a process of its own, with the path of a prepared store.
"""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

FIELDS = """\
    wormholes: int = setting(0, at_least=0, tag="wormholes{wormholes}", also=("shortcuts",))
    wormhole_depth: int = setting(3, at_least=1, needs={"wormholes": (1, 2)})
"""
MEANINGS = """\
        wormholes: number of wormholes.
        wormhole_depth: how deep each of them is.
"""


def add_to_the_declarations() -> None:
    spec = importlib.util.find_spec("hstu_xd.model.settings")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    for place, lines in (("    tape: bool = setting(", FIELDS), ("        tape: tell", MEANINGS)):
        assert source.count(place) == 1
        source = source.replace(place, lines + place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    exec(compile(source, spec.origin, "exec"), module.__dict__)


def main(store: Path) -> None:
    add_to_the_declarations()
    from hstu_xd.cli.app import run
    from hstu_xd.declaration import tags
    from hstu_xd.errors import InputError
    from hstu_xd.experiments.ablation import ablate
    from hstu_xd.plugins.rec.settings import RecSettings
    from hstu_xd.training.run import variant_name
    from hstu_xd.training.settings import load_settings

    log = StringIO()
    logging.basicConfig(stream=log)

    def refusal(call: Callable[..., Any], *arguments: Any, **others: Any) -> str:
        try:
            call(*arguments, **others)
        except InputError as error:
            return str(error)
        return "not refused"

    on = ["xd_encoder.wormholes = 2", "xd_encoder.wormhole_depth = 5"]
    settings = load_settings([], on)
    encoder = settings.encoder_settings(num_domains=2)
    rec = {"model": "HSTU_XD", "item_domain_path": "items.csv"}
    with_key = RecSettings.read({**rec, "xd_wormholes": 1})
    found = {
        "bound": settings.encoder,
        "written": [line for line in settings.to_gin().splitlines() if "wormhole" in line],
        "run": variant_name(settings),
        "path": tags(encoder),
        "plain": encoder.is_plain,
        "rec": with_key.encoder,
        "rec plain": with_key.is_plain,
        "log of what acts": log.getvalue(),
        "range": refusal(load_settings, [], ["xd_encoder.wormholes = -1"]),
        "type": refusal(load_settings, [], ["xd_encoder.wormholes = True"]),
        "meaning": refusal(load_settings, [], ["xd_encoder.shortcuts = 1"]),
        "ablation": refusal(ablate, store, ["hstu"], [1], Path("nowhere"), bindings=on[:1]),
        "llm": refusal(RecSettings.read, {**rec, "model": "HLLM_XD", "xd_wormholes": 1}),
    }
    load_settings([], on[1:])
    RecSettings.read({**rec, "xd_wormhole_depth": 5})
    run(["settings", "wormhole", "--json"])
    print(json.dumps({**found, "log": log.getvalue()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
