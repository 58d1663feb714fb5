"""The plug-in for generative-recommenders' production path (dlrm_v3): its declaration as a host.

``python -m hstu_xd.plugins.dlrm_v3 --gin_config_file FILE --mode train-eval`` runs upstream's
trainer; ``import hstu_xd.plugins.dlrm_v3.activated`` is the first line of such a file.
"""

from dataclasses import replace

from hstu_xd.plugins.gr import GENERATIVE_RECOMMENDERS
from hstu_xd.plugins.host import Host, Library

# File below generative_recommenders -> object -> hashes of its source.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "dlrm_v3/train/train_ranker.py": {
        "_main_func": ("8a447d5c4abff007",),
        "get_args": ("f321303059ea8922",),
        "main": ("114f4f028ebed28b",),
    },
    "dlrm_v3/train/utils.py": {
        "setup": ("33849a0c5d50c2b6",),
        "HammerToTorchDataset": ("cd02db2c0e2d01b8",),
        "ChunkDistributedSampler": ("26d8d62bed296513",),
        "make_model": ("ce30e1c999b2c7f2",),
        "make_optimizer_and_shard": ("e9e6eaa7f0628ddf",),
        "make_train_test_dataloaders": ("208a8871c997b1eb",),
        "train_loop": ("c31060a09f23fd8d",),
        "eval_loop": ("c7940a71730faf86",),
        "train_eval_loop": ("bbea3d8f78901290",),
    },
    "dlrm_v3/configs.py": {
        "get_hstu_configs": ("f65e7504e998142b",),
        "get_embedding_table_config": ("6e6e2e01b7172e52",),
    },
    "dlrm_v3/datasets/dataset.py": {
        "Samples": ("0a3ec93b3aeb3ca7",),
        "collate_fn": ("666ed21a6a2178ed",),
        "Dataset": ("c0fb927310473387",),
    },
    "dlrm_v3/utils.py": {
        "MetricsLogger": ("763d213ba426d7da",),
        "get_dataset": ("ae4bf1d7f9635064",),
    },
    "dlrm_v3/checkpoint.py": {
        "save_dmp_checkpoint": ("e0d6229d5d15372e",),
        "load_sparse_checkpoint": ("e00decd851f93e00",),
        "load_dmp_checkpoint": ("7bd44f7a4c5e3b9f",),
    },
    "modules/dlrm_hstu.py": {
        "DlrmHSTUConfig": ("133d26979d093a3b",),
        "DlrmHSTU": ("be29034510a97408",),
    },
    "modules/hstu_transducer.py": {
        "HSTUTransducer": ("7251fb1fbf4dde95",),
    },
    "modules/preprocessors.py": {
        "ContextualPreprocessor": ("6305547ac23e3725",),
    },
    "modules/stu.py": {
        "STULayer": ("db4db8d30683f623",),
        "STUStack": ("7d7126a141c68c03",),
    },
    "ops/hstu_compute.py": {
        "hstu_compute_uqvk": ("ed8b3af75d613c2f",),
        "hstu_compute_output": ("a9d81d34a21a7975",),
        "hstu_preprocess_and_attention": ("02454a0ea75ae656",),
    },
    "ops/pytorch/pt_hstu_attention.py": {
        "pytorch_hstu_mha": ("81da63ffa0c18126",),
    },
    "modules/multitask_module.py": {
        "TaskConfig": ("47abbc39b55d5a48",),
    },
}

HOST = Host(
    name="dlrm_v3",
    title="dlrm_v3",
    verdict_title="dlrm_v3",
    declared_in=__name__,
    package="generative_recommenders",
    # The same repository at the commits whose production path was verified.
    codebases=(replace(GENERATIVE_RECOMMENDERS, commits=("db1bf8f",)),),
    sources=SOURCES,
    rebindings=f"{__name__}.dlrm_rebindings:REBINDINGS",
    cpu_rebindings=f"{__name__}.cpu_worker:cpu_rebindings",
    cpu_command="python -m hstu_xd.plugins.dlrm_v3",
    markers=("generative_recommenders/dlrm_v3/train/train_ranker.py",),
    needs=("fbgemm_gpu", "torchrec"),
    libraries=(
        Library("torchrec", "upstream asks for it; 1.9.2 was verified", at_least="1.1"),
        Library(
            "torchmetrics",
            "upstream's log of metrics fails with 1.9",
            at_least="1.0.3",
            below="1.0.4",
        ),
        Library(
            "triton",
            "upstream's kernels call tl.make_block_ptr, which later ones refuse",
            below="3.8",
            on_gpu=True,
        ),
    ),
)
