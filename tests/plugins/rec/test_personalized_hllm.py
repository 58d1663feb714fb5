"""PersonalizedHLLM_XD inside each codebase: parity, who reads which tokens, whole runs."""

from typing import Any

import pytest

from hstu_xd.model.hstu import is_cross_domain

in_codebases = pytest.mark.parametrize(
    "probed_personalized_hllm", ["standin", "persrec"], indirect=True
)
Figures = dict[str, Any]


@in_codebases
def test_everything_off_is_their_model_to_the_bit(probed_personalized_hllm: Figures) -> None:
    expected = {"loss": 0, "gradient": 0, "scores": 0, "names": False}
    assert probed_personalized_hllm["all_off"] == expected


@in_codebases
@pytest.mark.parametrize(
    "case", ["zero_initialised", "zero_initialised_without_flash", "no_layer_masked"]
)
def test_step_zero_is_their_model(probed_personalized_hllm: Figures, case: str) -> None:
    found = probed_personalized_hllm["parity"][case]
    assert found["states"] <= 5e-6
    assert found["scores"] <= 2e-6
    assert found["gradient"] <= 2e-6
    assert found["loss"] <= 5e-6  # of about 10


@in_codebases
def test_no_negative_counts_twice(probed_personalized_hllm: Figures) -> None:
    # Columns of targets and of negatives; two were drawn for each history of ten events.
    assert probed_personalized_hllm["parity"]["few_negatives"] == [[10, 2]]


@in_codebases
@pytest.mark.parametrize("case", ["mask", "first_layer_full", "last_layer_full"])
def test_who_reads_whom_is_as_pair_by_pair(probed_personalized_hllm: Figures, case: str) -> None:
    assert probed_personalized_hllm["masked"][case] <= 1e-5


@in_codebases
def test_random_items_in_padding_change_nothing(probed_personalized_hllm: Figures) -> None:
    assert probed_personalized_hllm["semantics"]["padding"] <= 1e-6


@in_codebases
def test_activations_computed_twice_see_the_same_rows(probed_personalized_hllm: Figures) -> None:
    assert probed_personalized_hllm["semantics"]["checkpointing"] <= 1e-6


@in_codebases
def test_negatives_of_other_domains_do_not_count(probed_personalized_hllm: Figures) -> None:
    assert probed_personalized_hllm["semantics"]["negatives"] == 0


@in_codebases
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("mistral", "user_pretrain_dir: the user LLM is a mistral; PerSRec's mask of history and"),
        ("dropped", "item_dropout: 0.1; PersonalizedHLLM_XD with a switch on drops no events"),
        ("recent", "recent_item_num: 5; with pretrain_item_num (4) it must make MAX_ITEM_LIST_LEN"),
        ("compress_pretrain", "compress_pretrain: PersonalizedHLLM_XD with a switch on has no ca"),
        ("predict1", "predict1: PersonalizedHLLM_XD with a switch on has no cached tokens; call"),
        ("evaluated", "MAX_ITEM_LIST_LENGTH_TEST: 12; with a switch on it must be MAX_ITEM_LIST_L"),
    ],
)
def test_what_it_cannot_do_is_refused(
    probed_personalized_hllm: Figures, case: str, said: str
) -> None:
    assert probed_personalized_hllm["refusals"][case].startswith(said)


@in_codebases
def test_metrics_of_their_trainer_equal_a_brute_force(probed_personalized_hllm: Figures) -> None:
    found = probed_personalized_hllm["end_to_end"]
    assert found["differs"] == found["theirs_differs"] == found["unexpected"] == []


@in_codebases
def test_everything_off_trains_to_their_metrics(probed_personalized_hllm: Figures) -> None:
    assert probed_personalized_hllm["end_to_end"]["off_differs"] == []


@in_codebases
def test_their_checkpoint_continues_with_equal_metrics(probed_personalized_hllm: Figures) -> None:
    found = probed_personalized_hllm["end_to_end"]
    assert found["continued_differs"] == []
    assert found["new_parameters"]
    assert all(is_cross_domain(name) for name in found["new_parameters"])


@in_codebases
def test_the_checkout_is_left_as_it_was(probed_personalized_hllm: Figures) -> None:
    assert probed_personalized_hllm["written"] == []
