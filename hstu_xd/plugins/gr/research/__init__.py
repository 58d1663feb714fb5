"""The plug-in for generative-recommenders' research trainer: its declaration as a host."""

from hstu_xd.plugins.gr import GENERATIVE_RECOMMENDERS
from hstu_xd.plugins.host import Host

# File below generative_recommenders -> object -> hashes of its source; the verified commits hold
# the same objects or one of two versions of them.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "research/trainer/train.py": {
        "setup": ("221d72542cdccc1e",),
        "train_fn": ("b3d43fe2df08fe86", "c0d7666c3ca478ec"),
    },
    "research/trainer/data_loader.py": {
        "create_data_loader": ("b5849021c22c2452",),
    },
    "research/data/reco_dataset.py": {
        "RecoDataset": ("b8da073db3ff1656",),
        "get_reco_dataset": ("362b6e4e76b5fbd3",),
    },
    "research/data/dataset.py": {
        "DatasetV2": ("4f86338fef768a7c", "baa9337696b1547e"),
    },
    "research/data/eval.py": {
        "EvalState": ("d917c97250a38f2f",),
        "get_eval_state": ("7daa2c251d73f0e6",),
        "eval_metrics_v2_from_tensors": ("51f5d2a9e4686cd6",),
        "add_to_summary_writer": ("8b5d975db5fae523",),
    },
    "research/modeling/sequential/hstu.py": {
        "RelativeBucketedTimeAndPositionBasedBias": ("6a77248e1712fab5",),
        "SequentialTransductionUnitJagged": ("d782a32602fb73cd",),
        "HSTUJagged": ("ab193b13cf2f2ee3",),
        "HSTU": ("5252dd82beb98c3e",),
    },
    "research/modeling/sequential/encoder_utils.py": {
        "hstu_encoder": ("b2aada4f9bafb2ed",),
        "get_sequential_encoder": ("f2920c304f2b37a4",),
    },
    "research/modeling/sequential/features.py": {
        "SequentialFeatures": ("b76f0c23b4cf66c7",),
        "movielens_seq_features_from_row": ("9db73f4a727b62ab",),
    },
    "research/modeling/sequential/input_features_preprocessors.py": {
        "LearnablePositionalEmbeddingInputFeaturesPreprocessor": ("091367ecf532ab68",),
    },
    "research/modeling/sequential/autoregressive_losses.py": {
        "NegativesSampler": ("dd2fef593267eab5",),
        "LocalNegativesSampler": ("73b655399a915d1c",),
        "InBatchNegativesSampler": ("c98f3766eade4dcc",),
    },
    "research/modeling/sequential/losses/sampled_softmax.py": {
        "SampledSoftmaxLoss": ("237477deb4b59d69",),
    },
    "research/modeling/similarity_module.py": {
        "SequentialEncoderWithLearnedSimilarityModule": ("de2947de367f594e",),
    },
}

HOST = Host(
    name="generative_recommenders",
    title="generative_recommenders",
    verdict_title="upstream",
    declared_in=__name__,
    package="generative_recommenders",
    codebases=(GENERATIVE_RECOMMENDERS,),
    sources=SOURCES,
    rebindings=f"{__name__}.upstream_rebindings:REBINDINGS",
    cpu_rebindings=f"{__name__}.upstream_trainer:cpu_rebindings",
    cpu_command="hstu-xd upstream-train",
    markers=GENERATIVE_RECOMMENDERS.markers,
    needs=("fbgemm_gpu",),
)
