"""The encoder by its name, with the sizes that gin binds."""

import gin

from .hstu import HSTU


@gin.configurable
def hstu_encoder(
    max_sequence_length, max_output_length, embedding_module, similarity_module,
    input_preproc_module, output_postproc_module, activation_checkpoint, verbose,
    num_blocks=2, num_heads=1, dqk=64, dv=64, linear_dropout_rate=0.0, attn_dropout_rate=0.0,
    normalization="rel_bias", linear_config="uvqk", linear_activation="silu",
    concat_ua=False, enable_relative_attention_bias=True,
):  # fmt: skip
    return HSTU(
        max_sequence_length, max_output_length, embedding_module.item_embedding_dim,
        num_blocks, num_heads, dv, dqk, normalization, linear_config, linear_activation,
        linear_dropout_rate, attn_dropout_rate, embedding_module, similarity_module,
        input_preproc_module, output_postproc_module, enable_relative_attention_bias,
        concat_ua, verbose,
    )  # fmt: skip


@gin.configurable
def get_sequential_encoder(
    module_type, max_sequence_length, max_output_length, embedding_module, interaction_module,
    input_preproc_module, output_postproc_module, verbose, activation_checkpoint=False,
):  # fmt: skip
    assert module_type == "HSTU", module_type
    return hstu_encoder(
        max_sequence_length, max_output_length, embedding_module, interaction_module,
        input_preproc_module, output_postproc_module, activation_checkpoint, verbose,
    )  # fmt: skip
