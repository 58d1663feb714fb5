"""Record what the code computes and writes, for the tests beside this file to repeat.

    OMP_NUM_THREADS=1 python tests/unchanged/record.py [--rows]

All was recorded last at commit f299c24. With --rows only the rows of trainings are recorded, and
the old files stay: where a training rounds otherwise. Record again only where numbers or formats
are meant to change, with one thread on a CPU, and say in the commit what changed and why.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import answers
from recordings import (
    ANSWERS,
    CONDITIONS,
    EPOCHS,
    EVENTS,
    LOG,
    RECIPES,
    RECORDED,
    RUNS,
    STORE,
    TRAINING,
    ask,
    bindings,
    conditions,
    rows_of,
    train_words,
)

# The stopped run ends behind this checkpoint: within its second epoch.
STOPPED = ("xd_train.checkpoint_every = 3",)
STOPPED_AT_CHECKPOINT = 3


def main() -> None:
    """Write everything below recorded/ but the user's files, which are written by hand."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if "--rows" in sys.argv:
        shutil.rmtree(TRAINING)
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)
            record_training()
            record_resumed_rows()
        return
    for old in (STORE, RUNS, TRAINING):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        record_training()
        record_runs()
        record_events()
        os.chdir(answers.ROOT)
    CONDITIONS.write_text(json.dumps(conditions(), indent=1) + "\n")
    ANSWERS.write_text(json.dumps(answers.answers(), indent=1) + "\n")


def record_training() -> None:
    """Train every recipe; of each run only metrics.jsonl is kept, and of the store its hashes."""
    run_as_typed("synth", "--out", "log", *LOG)
    TRAINING.mkdir(parents=True)
    hashes = json.loads(Path("log/manifest.json").read_text())["hashes"]
    (TRAINING / "log.json").write_text(json.dumps(hashes, indent=1) + "\n")
    for recipe in RECIPES:
        out = Path("trained") / recipe
        run_as_typed(*train_words(Path("log"), out, bindings(recipe, epochs=EPOCHS)))
        shutil.copyfile(out / "metrics.jsonl", TRAINING / f"{recipe}.jsonl")


def record_resumed_rows() -> None:
    """Go on with the stopped run as it is, and keep the rows."""
    shutil.copytree(RUNS / "stopped", "stopped")
    ask("train", "--data", STORE, "--out", "stopped", "--resume")
    shutil.copyfile("stopped/metrics.jsonl", RECORDED / "stopped_and_resumed.jsonl")


def record_runs() -> None:
    """Write a store, two finished runs and one that was stopped."""
    size = ("--users", "60", "--domains", "3", "--items-per-domain", "20", "--mean-length", "20")
    run_as_typed("synth", "--out", "store", *size)
    # The second is named by hand: by itself it takes the first one's name.
    for recipe, named in (("all", ()), ("all+tokens", ("--name", "all+tokens"))):
        words = train_words(Path("store"), Path(recipe), bindings(recipe, epochs=1))
        run_as_typed(*words, *named)
    words = train_words(Path("store"), Path("stopped"), (*bindings("all", epochs=EPOCHS), *STOPPED))
    with stops_after_checkpoint(STOPPED_AT_CHECKPOINT):
        run_as_typed(*words, code=1)
    whole = train_words(Path("store"), Path("whole"), (*bindings("all", epochs=EPOCHS), *STOPPED))
    run_as_typed(*whole)
    shutil.copytree("store", STORE)
    for name in ("all", "all+tokens", "stopped"):
        # TensorBoard's files name the machine, and nothing of this package reads them.
        shutil.copytree(name, RUNS / name, ignore=shutil.ignore_patterns("tensorboard"))
        file = RUNS / name / "run.json"
        facts = json.loads(file.read_text())
        facts["data"] = "store"
        file.write_text(json.dumps(facts, indent=1) + "\n")
    # Only a stopped run needs its resumable state here, and one that finished, to be resumed.
    (RUNS / "all+tokens" / "last.safetensors").unlink()
    assert len(rows_of(Path("stopped"))) == 2, "not stopped within the second epoch"
    shutil.copyfile("whole/metrics.jsonl", RECORDED / "stopped_and_resumed.jsonl")


def record_events() -> None:
    """Let a service log events of two users, and of one who is then forgotten."""
    liked = answers.recommend("all", "u00007", "films")["items"]
    start = 1_900_000_000
    rows = [
        {"user": user, "item": row["item"], "timestamp": start + 60 * place}
        for user in ("new", "u00007", "u00001")
        for place, row in enumerate(liked)
    ]
    EVENTS.unlink(missing_ok=True)
    with answers.service(RUNS / "all", EVENTS) as ask_service:
        assert ask_service("POST", "/v1/events", {"events": rows}) == {"accepted": len(rows)}
        assert ask_service("DELETE", "/v1/users/u00001") == {"forgotten": True}


def run_as_typed(*words: str, code: int = 0) -> None:
    """Run a command so that what it notes of itself is what a user would have typed."""
    sys.argv = ["hstu-xd", *words]
    if code:
        with contextlib.suppress(AssertionError):
            ask(*words)
    else:
        ask(*words)


@contextlib.contextmanager
def stops_after_checkpoint(last: int) -> Iterator[None]:
    """Interrupt the training behind the given number of its resumable states."""
    replace, written = Path.replace, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal written
        done = replace(self, target)
        written += Path(target).name == "last.safetensors"
        if written == last:
            raise KeyboardInterrupt
        return done

    Path.replace = counted  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Path.replace = replace  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
