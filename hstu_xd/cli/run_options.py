"""What commands on runs share: options, what they mean for a kind of run, and what follows."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_xd.errors import InputError

AllowImports = Annotated[
    bool,
    typer.Option(
        "--allow-imports",
        help="Import, and so execute, the modules of your own that a run names; "
        "HSTU_XD_ALLOW_IMPORTS=1 says the same.",
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Compare the store's files with the hashes of its manifest."),
]
ExcludeSeen = Annotated[
    bool | None,
    typer.Option(
        "--exclude-seen/--include-seen",
        help="Items that a user has met are no candidates, or are. [default: as the run was "
        "trained, xd_evaluate.exclude_seen]",
    ),
]

Candidates = Annotated[
    str | None,
    typer.Option(
        "--candidates",
        metavar="domain|all|N",
        help="Whom a target is ranked among: all items of its domain, those of all domains, or in "
        "exact expectation N random ones of its domain. [default: as the run was trained]",
    ),
]
Ties = Annotated[
    str | None,
    typer.Option(
        "--ties",
        metavar="against|favour",
        help="Equal scores count against the target, or for it. [default: as the run was trained]",
    ),
]
Ks = Annotated[
    str | None,
    typer.Option(
        "--ks",
        metavar="K,K,...",
        help="Every k of hr@k and ndcg@k. [default: as the run was trained]",
    ),
]

TrackerNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="tensorboard|mlflow|wandb",
        help="Where settings, metrics and results are shown; repeat for several. A resumed run "
        "goes on where it was. [default: tensorboard]",
    ),
]


def retrieval_options(
    exclude_seen: bool | None, candidates: str | None, ties: str | None, ks: str | None
) -> dict[str, object]:
    """Return what was given for the options that change a protocol, by their names."""
    seen = "--exclude-seen" if exclude_seen else "--include-seen"
    given = {"--candidates": candidates, "--ties": ties, "--ks": ks}
    return {seen: exclude_seen is not None, **given}


def protocol_changes(
    exclude_seen: bool | None, candidates: str | None, ties: str | None, ks: str | None
) -> dict[str, Any]:
    """Read the options that change a protocol; None changes nothing.

    Raises:
        InputError: no numbers where some are needed.
    """
    cutoffs = None
    if ks is not None:
        try:
            cutoffs = tuple(sorted({int(k) for k in ks.split(",")}))
        except ValueError:
            raise InputError(f"--ks {ks}: numbers with commas are needed, 5,10,50") from None
    is_number = re.fullmatch(r"-?\d+", candidates or "")
    return {
        "exclude_seen": exclude_seen,
        "candidates": int(candidates) if candidates and is_number else candidates,
        "ties": ties,
        "ks": cutoffs,
    }


def is_ranking(run: Path, retrieval_only: Mapping[str, object]) -> bool:
    """Tell a ranking run from a retrieval run, and refuse options that it gives no meaning.

    Args:
        run: the run folder.
        retrieval_only: options that a ranking run has no use for, each with what was given for it.

    Raises:
        InputError: not a run folder, or such an option for a ranking run.
    """
    from hstu_xd.evaluation.protocol import RANKING
    from hstu_xd.training.run_facts import kind_of, read_run

    if kind_of(read_run(run)) != RANKING:
        return False
    given = [name for name, value in retrieval_only.items() if value not in (None, False)]
    if given:
        raise InputError(
            f"{run} is a ranking run, of candidates that its requests name: {', '.join(given)} has "
            "no meaning there; leave it out"
        )
    return True


def say_next(*commands: Sequence[str | Path], err: bool = False) -> None:
    """Name the commands that go on from here; words in capitals are for the reader to choose.

    Args:
        commands: the words of each, after the program's name.
        err: print to stderr, where stdout holds a document.
    """
    typer.echo("next:", err=err)
    for words in commands:
        typer.echo("  " + shlex.join(["hstu-xd", *map(str, words)]), err=err)
