"""HSTU_XD inside each codebase: parity, semantics, and its own trainer against a brute force."""

from typing import Any

import pytest

from hstu_xd.model.hstu import is_cross_domain

in_codebases = pytest.mark.parametrize("probed", ["standin", "hllm", "persrec"], indirect=True)


@in_codebases
def test_everything_off_is_their_hstu_to_the_bit(probed: dict[str, Any]) -> None:
    assert probed["parity"]["all_off"] == {"loss": 0, "gradient": 0, "scores": 0}


@in_codebases
@pytest.mark.parametrize(
    "case", ["eager", "reference", "zero_initialised", "projected_items", "no_bias_built"]
)
def test_our_layers_compute_their_hstu(probed: dict[str, Any], case: str) -> None:
    found = probed["parity"][case]
    assert found["scores"] <= 1e-6
    assert found["loss"] <= 2e-6  # of about 10: a few bits of float32
    assert found["gradient"] <= 5e-6


@in_codebases
def test_relative_bias_is_their_formula(probed: dict[str, Any]) -> None:
    assert probed["relative_bias"] <= 1e-5


@in_codebases
def test_random_items_in_padding_change_nothing(probed: dict[str, Any]) -> None:
    assert probed["semantics"]["padding"] == 0


@in_codebases
def test_mask_hides_other_domains(probed: dict[str, Any]) -> None:
    assert probed["semantics"]["other_domain"] == 0
    assert probed["semantics"]["own_domain"] > 0.1


@in_codebases
def test_negatives_come_from_the_positives_domain(probed: dict[str, Any]) -> None:
    assert probed["semantics"]["negatives"]


@in_codebases
def test_processes_draw_negatives_of_their_own(probed: dict[str, Any]) -> None:
    assert probed["semantics"]["equal_draws"] < 0.1


@in_codebases
def test_metrics_of_their_trainer_equal_a_brute_force(probed: dict[str, Any]) -> None:
    found = probed["end_to_end"]
    assert found["differs"] == found["theirs_differs"] == found["unexpected"] == []
    groups = {name.partition("[")[2].rstrip("]") for name in found["metrics"]}
    assert groups == {"", "books", "films", "groceries", "switch", "stay"}


@in_codebases
def test_everything_off_trains_to_the_metrics_of_their_hstu(probed: dict[str, Any]) -> None:
    assert probed["end_to_end"]["off_differs"] == []


@in_codebases
def test_their_checkpoint_continues_with_equal_metrics(probed: dict[str, Any]) -> None:
    found = probed["end_to_end"]
    assert found["continued_differs"] == []
    assert found["new_parameters"]
    assert all(is_cross_domain(name) for name in found["new_parameters"])


@in_codebases
def test_their_results_are_visible(probed: dict[str, Any]) -> None:
    assert "recall@10[books]" in probed["output"]


@in_codebases
def test_the_checkout_is_left_as_it_was(probed: dict[str, Any]) -> None:
    assert probed["written"] == []


@in_codebases
def test_other_versions_are_told(probed: dict[str, Any], request: pytest.FixtureRequest) -> None:
    is_other = "standin" in request.node.name
    assert bool(probed["unverified"]) == is_other
    assert ("differs from the versions" in probed["output"]) == is_other
