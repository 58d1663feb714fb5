"""Which versions of generative-recommenders the plug-in was verified with, and how one is told.

A version counts as verified when the source of every object that the plug-in rebinds or builds on
equals that of a verified commit. Comments and white space do not count, so that a reformatted
checkout, or a later commit that leaves these objects alone, stays verified.
"""

import importlib.util
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hstu_xd.plugins.host import source_hashes

PACKAGE = "generative_recommenders"
RESEARCH = f"{PACKAGE}.research"

# Ends of the verified range and the commit in between; all three hold the same objects.
VERIFIED_COMMITS = {
    "44b62c6": "2025-02-06",
    "2e81fab": "2025-06-25",
    "db1bf8f": "2026-07-22",
}

# Module below generative_recommenders.research -> object -> hashes of its source's bare text.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "trainer.train": {
        "setup": ("221d72542cdccc1e",),
        "train_fn": ("b3d43fe2df08fe86", "c0d7666c3ca478ec"),
    },
    "trainer.data_loader": {
        "create_data_loader": ("b5849021c22c2452",),
    },
    "data.reco_dataset": {
        "RecoDataset": ("b8da073db3ff1656",),
        "get_reco_dataset": ("362b6e4e76b5fbd3",),
    },
    "data.dataset": {
        "DatasetV2": ("4f86338fef768a7c", "baa9337696b1547e"),
    },
    "data.eval": {
        "EvalState": ("d917c97250a38f2f",),
        "get_eval_state": ("7daa2c251d73f0e6",),
        "eval_metrics_v2_from_tensors": ("51f5d2a9e4686cd6",),
        "add_to_summary_writer": ("8b5d975db5fae523",),
    },
    "modeling.sequential.hstu": {
        "RelativeBucketedTimeAndPositionBasedBias": ("6a77248e1712fab5",),
        "SequentialTransductionUnitJagged": ("d782a32602fb73cd",),
        "HSTUJagged": ("ab193b13cf2f2ee3",),
        "HSTU": ("5252dd82beb98c3e",),
    },
    "modeling.sequential.encoder_utils": {
        "hstu_encoder": ("b2aada4f9bafb2ed",),
        "get_sequential_encoder": ("f2920c304f2b37a4",),
    },
    "modeling.sequential.features": {
        "SequentialFeatures": ("b76f0c23b4cf66c7",),
        "movielens_seq_features_from_row": ("9db73f4a727b62ab",),
    },
    "modeling.sequential.input_features_preprocessors": {
        "LearnablePositionalEmbeddingInputFeaturesPreprocessor": ("091367ecf532ab68",),
    },
    "modeling.sequential.autoregressive_losses": {
        "NegativesSampler": ("dd2fef593267eab5",),
        "LocalNegativesSampler": ("73b655399a915d1c",),
        "InBatchNegativesSampler": ("c98f3766eade4dcc",),
    },
    "modeling.sequential.losses.sampled_softmax": {
        "SampledSoftmaxLoss": ("237477deb4b59d69",),
    },
    "modeling.similarity_module": {
        "SequentialEncoderWithLearnedSimilarityModule": ("de2947de367f594e",),
    },
}


@dataclass(frozen=True)
class UpstreamStatus:
    """What is known of the generative_recommenders that Python would import here.

    Attributes:
        importable: a package of that name is on the path.
        error: why not, or what its files lack; empty when importable.
        path: folder of the package.
        commit: of the git checkout it lies in; empty when it lies in none.
        verified: every object the plug-in touches is as in a verified commit.
        problems: one line for each object that is not.
    """

    importable: bool
    error: str = ""
    path: str = ""
    commit: str = ""
    verified: bool = False
    problems: tuple[str, ...] = ()


def inspect_upstream() -> UpstreamStatus:
    """Look at the installed generative_recommenders without importing it."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError) as error:
        return UpstreamStatus(importable=False, error=str(error))
    if spec is None or not spec.submodule_search_locations:
        return UpstreamStatus(importable=False, error=f"no module named {PACKAGE}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    problems = source_problems(folder)
    return UpstreamStatus(
        importable=True,
        path=str(folder),
        commit=_commit(folder),
        verified=not problems,
        problems=problems,
    )


def source_problems(folder: Path) -> tuple[str, ...]:
    """Objects below a ``generative_recommenders`` folder that differ from the verified commits."""
    problems = []
    for module, objects in SOURCES.items():
        file = folder / "research" / Path(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            problems.append(f"{RESEARCH}.{module}: no such module")
            continue
        found = source_hashes(file.read_text(encoding="utf-8"))
        for name, expected in objects.items():
            if name not in found:
                problems.append(f"{RESEARCH}.{module}.{name}: not there")
            elif found[name] not in expected:
                problems.append(f"{RESEARCH}.{module}.{name}: its source is not a verified one")
    return tuple(problems)


def _commit(folder: Path) -> str:
    """Commit of the git checkout whose root holds the package; of no other repository around it."""
    lines = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
    if len(lines) != 2 or Path(lines[0]).resolve() != folder.resolve().parent:
        return ""
    return lines[1]


def _git(folder: Path, *arguments: str) -> list[str]:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []
