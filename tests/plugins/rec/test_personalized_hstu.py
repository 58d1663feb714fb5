"""PersonalizedHSTU_XD inside each codebase: parity, who reads which tokens, whole runs."""

from typing import Any

import pytest

from hstu_xd.model.hstu import is_cross_domain

in_codebases = pytest.mark.parametrize(
    "probed_personalized_hstu", ["standin", "persrec"], indirect=True
)
Figures = dict[str, Any]


@in_codebases
def test_everything_off_is_their_model_to_the_bit(probed_personalized_hstu: Figures) -> None:
    expected = {"loss": 0, "gradient": 0, "scores": 0, "names": False}
    assert probed_personalized_hstu["all_off"] == expected


@in_codebases
@pytest.mark.parametrize(
    "case",
    ["eager", "reference", "one_cut", "zero_initialised", "projected_items", "one_domain"],
)
def test_our_layers_compute_their_states(probed_personalized_hstu: Figures, case: str) -> None:
    found = probed_personalized_hstu["parity"][case]
    assert found["states"] <= 2e-5  # of up to 10
    assert found["scores"] <= 2e-6
    assert found["gradient"] <= 1e-5  # of the largest
    assert found["loss"] <= 5e-6  # of about 10


@in_codebases
@pytest.mark.parametrize("case", ["mask", "one_cut", "views"])
def test_who_reads_whom_is_as_pair_by_pair(probed_personalized_hstu: Figures, case: str) -> None:
    assert probed_personalized_hstu["masked"][case] <= 2e-5


@in_codebases
def test_tokens_carry_a_domains_past_to_that_domain_alone(
    probed_personalized_hstu: Figures,
) -> None:
    assert probed_personalized_hstu["semantics"]["other_domain"] == 0
    assert probed_personalized_hstu["semantics"]["own_domain_behind_tokens"] > 0.01


@in_codebases
def test_cached_tokens_are_refused(probed_personalized_hstu: Figures) -> None:
    assert probed_personalized_hstu["cached_tokens"] == [
        f"{method}: PersonalizedHSTU_XD with a switch on has no cached tokens; call predict, as "
        "PerSRec's trainer does"
        for method in ("compress_pretrain", "predict2")
    ]


@in_codebases
def test_random_items_in_padding_change_nothing(probed_personalized_hstu: Figures) -> None:
    assert probed_personalized_hstu["semantics"]["padding"] == 0


@in_codebases
def test_metrics_of_their_trainer_equal_a_brute_force(probed_personalized_hstu: Figures) -> None:
    found = probed_personalized_hstu["end_to_end"]
    assert found["differs"] == found["theirs_differs"] == found["unexpected"] == []


@in_codebases
def test_everything_off_trains_to_their_metrics(probed_personalized_hstu: Figures) -> None:
    assert probed_personalized_hstu["end_to_end"]["off_differs"] == []


@in_codebases
def test_their_checkpoint_continues_with_equal_metrics(probed_personalized_hstu: Figures) -> None:
    found = probed_personalized_hstu["end_to_end"]
    assert found["continued_differs"] == []
    assert found["new_parameters"]
    assert all(is_cross_domain(name) for name in found["new_parameters"])


@in_codebases
def test_the_checkout_is_left_as_it_was(probed_personalized_hstu: Figures) -> None:
    assert probed_personalized_hstu["written"] == []


@in_codebases
def test_persrec_is_a_verified_version(
    probed_personalized_hstu: Figures, request: pytest.FixtureRequest
) -> None:
    assert bool(probed_personalized_hstu["unverified"]) == ("standin" in request.node.name)
