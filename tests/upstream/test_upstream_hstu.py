"""Every switch off is the HSTU of generative-recommenders, to the last bit.

Runs where that code and fbgemm are importable (a checkout on PYTHONPATH, fbgemm-gpu-cpu installed).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu_xd.batch import JaggedBatch
from hstu_xd.catalog import DomainCatalog
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings

try:
    import fbgemm_gpu  # noqa: F401  (registers the operators that upstream calls)
    from generative_recommenders.research.modeling.sequential import embedding_modules
    from generative_recommenders.research.modeling.sequential import hstu as upstream_hstu
    from generative_recommenders.research.modeling.sequential import (
        input_features_preprocessors as preprocessors,
    )
    from generative_recommenders.research.modeling.sequential import (
        output_postprocessors as postprocessors,
    )
except (ImportError, OSError) as error:
    pytest.skip(
        f"generative_recommenders with fbgemm_gpu is not importable ({error}): NOT covered in this "
        "run are bit-equality of outputs with upstream's HSTU, its gradients, its parameter names "
        "and loading its checkpoints",
        allow_module_level=True,
    )

NUM_ITEMS, WIDTH, BLOCKS, HEADS, DQK, DV = 50, 32, 3, 2, 5, 8
MAX_SEQUENCE, MAX_OUTPUT = 20, 11
NORM_LENGTH = MAX_SEQUENCE + MAX_OUTPUT
LENGTHS = torch.tensor([20, 1, 7, 13, 2, 19])

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_activation": {"linear_activation": "none"},
    "concat_ua": {"concat_ua": True},
}
every_configuration = pytest.mark.parametrize(
    "configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS
)


def upstream_model(*, linear_activation: str = "silu", concat_ua: bool = False) -> nn.Module:
    """Upstream's class with large random parameters, so that no term is negligible."""
    torch.manual_seed(4)
    model = upstream_hstu.HSTU(
        max_sequence_len=MAX_SEQUENCE,
        max_output_len=MAX_OUTPUT,
        embedding_dim=WIDTH,
        num_blocks=BLOCKS,
        num_heads=HEADS,
        linear_dim=DV,
        attention_dim=DQK,
        normalization="rel_bias",
        linear_config="uvqk",
        linear_activation=linear_activation,
        linear_dropout_rate=0.0,
        attn_dropout_rate=0.0,
        embedding_module=embedding_modules.LocalEmbeddingModule(NUM_ITEMS, WIDTH),
        similarity_module=None,
        input_features_preproc_module=(
            preprocessors.LearnablePositionalEmbeddingInputFeaturesPreprocessor(
                NORM_LENGTH, WIDTH, 0.0
            )
        ),
        output_postproc_module=postprocessors.L2NormEmbeddingPostprocessor(WIDTH),
        concat_ua=concat_ua,
        verbose=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def our_model(impl: str = "auto", **configuration: Any) -> CrossDomainHSTU:
    catalog = DomainCatalog(torch.arange(NUM_ITEMS + 1) % 3, ["a", "b", "c"])
    settings = EncoderSettings(
        num_domains=3,
        norm_length=NORM_LENGTH,
        embedding_dim=WIDTH,
        num_blocks=BLOCKS,
        num_heads=HEADS,
        dqk=DQK,
        dv=DV,
        linear_dropout_rate=0.0,
        impl=impl,
        **configuration,
    )
    return CrossDomainHSTU(catalog, settings, dropout_rate=0.0)


class Batch:
    """Upstream's padded features: the target's time stands one past the history."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(9)
        column = torch.arange(NORM_LENGTH)
        shape = len(LENGTHS), NORM_LENGTH
        ids = torch.randint(1, NUM_ITEMS + 1, shape, generator=generator)
        times = torch.randint(0, 10**6, shape, generator=generator).cumsum(1)
        self.ids = ids * (column < LENGTHS[:, None])
        self.times = times * (column <= LENGTHS[:, None])
        self.jagged = JaggedBatch.from_padded(
            self.ids,
            self.times,
            self.times.gather(1, LENGTHS[:, None]).squeeze(1),
            torch.zeros_like(self.ids),
        )


BATCH = Batch()


def upstream_vectors(model: nn.Module) -> Tensor:
    """(L, K) vectors of the real tokens."""
    padded = model(
        past_lengths=LENGTHS,
        past_ids=BATCH.ids,
        past_embeddings=model.get_item_embeddings(BATCH.ids),
        past_payloads={"timestamps": BATCH.times},
    )
    return padded[BATCH.ids != 0]


def loaded(theirs: nn.Module, impl: str, **configuration: Any) -> CrossDomainHSTU:
    ours = our_model(impl, **configuration)
    assert ours.load_hstu(dict(theirs.state_dict())) == []
    return ours


@every_configuration
def test_outputs_of_the_reference_are_bit_equal(configuration: dict[str, Any]) -> None:
    theirs = upstream_model(**configuration)
    ours = loaded(theirs, "reference", **configuration)
    assert torch.equal(ours(BATCH.jagged), upstream_vectors(theirs))


@every_configuration
def test_outputs_of_eager_agree(configuration: dict[str, Any]) -> None:
    theirs = upstream_model(**configuration)
    ours = loaded(theirs, "eager", **configuration)
    torch.testing.assert_close(ours(BATCH.jagged), upstream_vectors(theirs), rtol=0, atol=1e-6)


@every_configuration
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradients_agree(configuration: dict[str, Any], impl: str) -> None:
    theirs = upstream_model(**configuration)
    ours = loaded(theirs, impl, **configuration)
    direction = torch.randn(int(LENGTHS.sum()), WIDTH)
    (ours(BATCH.jagged) * direction).tanh().sum().backward()
    (upstream_vectors(theirs) * direction).tanh().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        exact = expected[name].grad
        assert parameter.grad is not None
        assert exact is not None
        assert (parameter.grad - exact).norm() <= 2e-5 * exact.norm(), name


def test_parameter_names_are_upstreams() -> None:
    theirs = {name: value.shape for name, value in upstream_model().named_parameters()}
    ours = {name: value.shape for name, value in our_model().named_parameters()}
    assert ours == theirs


def test_a_checkpoint_with_the_prefix_of_ddp_loads() -> None:
    theirs = upstream_model()
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    ours = our_model("reference")
    assert ours.load_hstu(state) == []
    assert torch.equal(ours(BATCH.jagged), upstream_vectors(theirs))


def test_a_checkpoint_is_extended_without_a_change() -> None:
    theirs = upstream_model()
    ours = our_model("reference", tape=True, ddsr=True, target_domain_embedding=True)
    left = ours.load_hstu(dict(theirs.state_dict()))
    assert {name.split(".")[0] for name in left} == {"_tape", "_target_domain_emb", "_hstu"}
    assert torch.equal(ours(BATCH.jagged), upstream_vectors(theirs))
