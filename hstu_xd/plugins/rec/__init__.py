"""The plug-in for HLLM and PerSRec (package ``REC``): its declaration as a host.

``python -m hstu_xd.plugins.rec`` runs their run.py with ``model: HSTU_XD`` and ``HLLM_XD`` known,
and in PerSRec ``PersonalizedHSTU_XD`` and ``PersonalizedHLLM_XD``.
"""

from hstu_xd.plugins.host import NOT_THERE, Codebase, Host

# PerSRec is a fork of HLLM and has all its files.
PERSREC = Codebase(
    name="persrec",
    repository="facebookresearch/PerSRec",
    commits=("7525e6b",),
    markers=("code/run.py", "code/REC/data/comm.py"),
)
HLLM = Codebase(
    name="hllm",
    repository="bytedance/HLLM",
    commits=("2deed17",),
    markers=("code/run.py", "code/REC/data/utils.py"),
)

# File below REC -> object -> hashes of its source, HLLM's and PerSRec's.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "model/IDNet/hstu.py": {
        "RelativeBucketedTimeAndPositionBasedBias": ("6a77248e1712fab5",),
        "_hstu_attention_maybe_from_cache": ("e9614eeb27c45256", "d9b1659eb3c4913c"),
        "SequentialTransductionUnitJagged": ("ac1d8deb56cfef02", "ad14eb536e8c1162"),
        "HSTUJagged": ("633ba011880fd0be", "bf3346fe01d03c88"),
        "HSTU": ("2da448a906b58f23", "574fe20370131ac5"),
        "PersonalizedHSTU": (NOT_THERE, "93cfe47c9c7a64a3"),
    },
    "model/basemodel.py": {
        "all_gather": ("c77cbceebb5a6e58",),
        "BaseModel": ("53f9acb73f51b08f",),
    },
    "data/utils.py": {
        "bulid_dataloader": ("a0e032c8a4a69080", "2448f26ed6dcbee9"),
    },
    "data/dataset/trainset.py": {
        "SEQTrainDataset": ("308761a481dac56d", "d70598c2c98464f1"),
        "TextSEQTrainDataset": ("d822a9e7965a2fee", "069bb5585e853f5d"),
    },
    "model/HLLM/hllm.py": {
        "HLLM": ("de7bb9235002f224", "350898457ce13ca7"),
        "PersonalizedHLLM": (NOT_THERE, "d0b05e87e1c7e9ff"),
    },
    "model/HLLM/modeling_llama.py": {
        "LlamaAttention": ("a9db6ef75d82e03a", "468545414fec5898"),
        "LlamaDecoderLayer": ("188830fd0b7b1246",),
        "LlamaModel": ("89c78d649c7777b6", "974479d3748cf5ab"),
        "LlamaForCausalLM": ("903ea8b910c4c69a",),
    },
    "model/HLLM/modeling_mistral.py": {
        "MistralAttention": ("81308d07b43785f9",),
        "MistralDecoderLayer": ("855d4088f5363723",),
        "MistralModel": ("ad24bb14e49b209d",),
    },
    "data/dataset/evalset.py": {
        "SeqEvalDataset": ("a4172bd731f408e9", "94c952f1515c77d9"),
    },
    "data/dataset/collate_fn.py": {
        "seq_eval_collate": ("6b16cd2fc580c179", "eac1cc70e80f65bf"),
        "customize_rmpad_collate": ("8628addab0665e02",),
    },
    "evaluator/evaluator.py": {
        "Evaluator": ("31f5de3791a0ab89",),
    },
    "evaluator/collector.py": {
        "DataStruct": ("51e70e979595bc61",),
        "Collector": ("de29503dc8c19e52",),
    },
    "trainer/trainer.py": {
        "Trainer": ("395b7697acf7c4a1", "7c0ece58c4ed69b9"),
    },
    "utils/utils.py": {
        "get_model": ("e7ed02c98668ba9b", "03cbbae0fdbfd4c6"),
    },
}

HOST = Host(
    name="rec",
    title="REC",
    verdict_title="REC",
    declared_in=__name__,
    package="REC",
    codebases=(PERSREC, HLLM),
    sources=SOURCES,
    rebindings=f"{__name__}.rec_rebindings:REBINDINGS",
    cpu_rebindings=f"{__name__}.rec_rebindings:cpu_rebindings",
    markers=("run.py", "REC/data/utils.py", "REC/trainer/trainer.py"),
    start_folder="code",
    in_place=True,
    # Imported by REC's trainer, HLLM's HSTU and HLLM's LLMs.
    dispensable={
        "deepspeed": {},
        "fbgemm_gpu": {},
        "flash_attn": {"bert_padding": ("index_first_axis", "pad_input", "unpad_input")},
    },
)
