"""A switch that is added where settings are declared is known wherever settings are spoken of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hstu_xd.data.synthetic import SynthOptions, synthesize

PROGRAM = Path(__file__).with_name("new_switch.py")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the package makes of the new switch; under "listed", what `hstu-xd settings` prints."""
    store = tmp_path_factory.mktemp("new_switch") / "store"
    synthesize(store, SynthOptions(users=40, domains=2, items_per_domain=20, mean_length=8))
    line = [sys.executable, str(PROGRAM), str(store)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed, found = done.stdout.strip().rsplit("\n", 1)
    return {**json.loads(found), "listed": {row["name"]: row for row in json.loads(listed)}}


def test_it_is_bound_written_and_listed(told: dict[str, Any]) -> None:
    assert told["bound"] == {"wormholes": 2, "wormhole_depth": 5}
    assert told["written"] == ["xd_encoder.wormholes = 2", "xd_encoder.wormhole_depth = 5"]
    assert set(told["listed"]) == {
        "xd_encoder.wormholes",
        "xd_encoder.wormhole_depth",
        "xd_wormholes",
        "xd_wormhole_depth",
    }
    assert told["listed"]["xd_encoder.wormhole_depth"] == {
        "name": "xd_encoder.wormhole_depth",
        "type": "int",
        "default": 3,
        "meaning": "how deep each of them is.",
        "block": "xd_encoder",
        "also": [],
    }


def test_it_stands_in_the_names_of_runs_and_checkpoints(told: dict[str, Any]) -> None:
    assert told["run"] == "HSTU + wormholes2 + wormhole_depth=5"
    assert told["path"][0] == "wormholes2"
    assert len(told["path"]) == 2
    assert told["plain"] is False


def test_it_is_checked_and_guarded(told: dict[str, Any]) -> None:
    assert told["range"] == "wormholes is -1; 0 or more is needed"
    assert told["type"] == "gin: xd_encoder.wormholes = True is a bool; a int is needed"
    assert told["meaning"].endswith("Did you mean xd_encoder.wormholes?")
    assert "variant 'hstu' would have xd_encoder.wormholes = 2" in told["ablation"]


def test_it_is_said_where_it_does_nothing(told: dict[str, Any]) -> None:
    assert told["log of what acts"] == ""
    said = "xd_encoder.wormhole_depth = 5 does nothing while xd_encoder.wormholes is 0"
    assert said in told["log"]
    assert "xd_wormhole_depth: 5 does nothing while xd_wormholes is 0" in told["log"]


def test_rec_has_a_key_for_it(told: dict[str, Any]) -> None:
    assert told["rec"] == {"wormholes": 1}
    assert told["rec plain"] is False
    assert "xd_wormholes: 1; HLLM_XD has no such setting" in told["llm"]
