"""HLLM_XD inside each codebase: parity, the mask, its own trainer against a brute force."""

from typing import Any

import pytest

from hstu_xd.model.hstu import is_cross_domain

in_codebases = pytest.mark.parametrize("probed_hllm", ["standin", "hllm", "persrec"], indirect=True)


@in_codebases
def test_everything_off_is_their_hllm_to_the_bit(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["parity"]["all_off"] == {"loss": 0, "gradient": 0, "scores": 0}


@in_codebases
@pytest.mark.parametrize(
    "case", ["zero_initialised", "zero_initialised_without_flash", "no_layer_masked"]
)
def test_step_zero_is_their_hllm(probed_hllm: dict[str, Any], case: str) -> None:
    found = probed_hllm["parity"][case]
    assert max(found.values()) <= 1e-6


@in_codebases
@pytest.mark.parametrize("kind", ["llm", "mistral"])
def test_mask_hides_other_domains(probed_hllm: dict[str, Any], kind: str) -> None:
    other_domain, own_domain = probed_hllm["mask"]["change"][kind]
    assert other_domain == 0
    assert own_domain > 0.1


@in_codebases
def test_llms_that_take_no_mask_are_refused(probed_hllm: dict[str, Any]) -> None:
    said = "xd_domain_mask: the user LLM is a bert, whose attention takes no mask here"
    assert said in probed_hllm["mask"]["bert"]


@in_codebases
def test_mask_is_on_the_layers_that_are_not_named(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["mask"]["second_layer_only"] <= 5e-6


@in_codebases
def test_activations_computed_twice_see_the_same_mask(probed_hllm: dict[str, Any]) -> None:
    assert max(probed_hllm["mask"]["checkpointing"].values()) <= 1e-6


@in_codebases
def test_parts_stand_around_their_user_llm(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["semantics"]["parts"]["difference"] <= 1e-5
    assert probed_hllm["semantics"]["parts"]["effect"] > 0.1


@in_codebases
def test_ages_of_states_are_read(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["semantics"]["times"] > 1e-5


@in_codebases
def test_random_items_in_padding_change_nothing(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["semantics"]["padding"] <= 1e-6


@in_codebases
def test_negatives_of_other_domains_do_not_count(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["semantics"]["negatives"] == 0


@in_codebases
def test_samples_hold_negatives_of_the_events_domains_and_times(
    probed_hllm: dict[str, Any],
) -> None:
    assert all(probed_hllm["drawn"])


@in_codebases
def test_processes_draw_negatives_of_their_own(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["equal_draws"] < 0.1


@in_codebases
def test_metrics_of_their_trainer_equal_a_brute_force(probed_hllm: dict[str, Any]) -> None:
    found = probed_hllm["end_to_end"]
    assert found["differs"] == found["theirs_differs"] == found["unexpected"] == []
    groups = {name.partition("[")[2].rstrip("]") for name in found["metrics"]}
    assert groups == {"", "books", "films", "groceries", "switch", "stay"}


@in_codebases
def test_everything_off_trains_to_the_metrics_of_their_hllm(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["end_to_end"]["off_differs"] == []


@in_codebases
def test_their_checkpoint_continues_with_equal_metrics(probed_hllm: dict[str, Any]) -> None:
    found = probed_hllm["end_to_end"]
    assert found["continued_differs"] == []
    assert found["new_parameters"]
    assert all(is_cross_domain(name) for name in found["new_parameters"])


@in_codebases
def test_the_checkout_is_left_as_it_was(probed_hllm: dict[str, Any]) -> None:
    assert probed_hllm["written"] == []
