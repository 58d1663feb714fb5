"""Commands over many runs: ablate, tune, compare, report and demo."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hstu_xd.cli.run_options import (
    AllowImports,
    Candidates,
    ExcludeSeen,
    Ks,
    Ties,
    TrackerNames,
    Verify,
    protocol_changes,
    say_next,
)
from hstu_xd.cores import usable_cores

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="Folders written by train or rank, or folders of such (as ablate writes them). "
        "The first variant is what the others are compared with.",
    ),
]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    allow_mixed_data: Annotated[
        bool,
        typer.Option("--allow-mixed-data", help="Accept runs on different data, a section each."),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="The prepared folder, if it has moved since training.")
    ] = None,
    skip_lists: Annotated[
        bool,
        typer.Option(
            "--skip-lists",
            help="Ask no model for its test users' lists, which takes about as long as measuring "
            "their test again; the page then says nothing of popularity and sharpness.",
        ),
    ] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Write a page of figures and tables about runs.

    It shows training curves, test metrics, domains, targets that switch the domain, popularity
    bias, and the data; of runs on several logs, the logs side by side.
    """
    from hstu_xd.experiments.report.page import write_report

    page = write_report(
        runs,
        out,
        force=force,
        allow_mixed_data=allow_mixed_data,
        data=data,
        lists=not skip_lists,
        allow_imports=allow_imports,
        announce=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"wrote {page} and {len(list(out.glob('*.png')))} figures beside it")


def ablate(
    data: Annotated[Path, typer.Option("--data", help="Prepared store, or requests to rank for.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of runs and table; may be continued.")],
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            help="Names and gin files of variants, a,mine.gin; requests are ranked by gin files. "
            "[default: all]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds: 1, 2, ...")] = 3,
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option("--gin_config_file", help="Settings that all share; repeat to layer files."),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help="One more setting; repeat for several."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at a time. [default: one per core]")
    ] = None,
    verify: Verify = False,
    tracker: TrackerNames = None,
) -> None:
    """Train variants under several seeds and compare them.

    Prints the mean and the spread of their test metrics as a Markdown table. Ctrl-C or SIGTERM
    stops the trainings, which save; the same command goes on.
    """
    from hstu_xd.experiments.ablation import ablate as run_ablation
    from hstu_xd.experiments.variants import parse_variants

    table = run_ablation(
        data,
        parse_variants(variants),
        range(1, seeds + 1),
        out,
        files=gin_config_file or [],
        bindings=gin_bindings or [],
        jobs=jobs or usable_cores(),
        verify=verify,
        announce=lambda line: typer.echo(line, err=True),
        trackers=tracker or (),
    )
    typer.echo(table, nl=False)
    say_next(["compare", out], ["report", out, "--out", "FOLDER"], err=True)


def tune(
    data: Annotated[Path, typer.Option("--data", help="Prepared store, or requests to rank for.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the search; may be continued.")],
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Trials of each variant, those done included.")
    ],
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            help="Names and gin files of variants, a,mine.gin. [default: the recipe as it is]",
        ),
    ] = None,
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gin_config_file",
            help="The recipe, and in xd_tune.space what is tried; repeat to layer files.",
        ),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help="One more setting; repeat for several."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trials at a time.")] = 1,
) -> None:
    """Search settings on validation, as long for every variant.

    Needs Optuna. The test split stays unread. Ctrl-C or SIGTERM stops the search; the same command
    goes on, and with more trials it searches further. It writes trials.json and best.gin, which
    train or rank takes; each variant has a best.gin of its own.
    """
    from hstu_xd.experiments.tuning import tune as run_search
    from hstu_xd.experiments.variants import parse_variants

    table = run_search(
        data,
        parse_variants(variants),
        trials,
        out,
        files=gin_config_file or [],
        bindings=gin_bindings or [],
        jobs=jobs,
        announce=lambda line: typer.echo(line, err=True),
    )
    typer.echo(table, nl=False)


def compare(
    runs: Runs,
    split: Annotated[
        str, typer.Option("--split", help="Split of the events: valid or test.")
    ] = "test",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="The prepared folder, of ranking runs the requests, if it has moved."
        ),
    ] = None,
    exclude_seen: ExcludeSeen = None,
    candidates: Candidates = None,
    ties: Ties = None,
    ks: Ks = None,
    verify: Verify = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Compare variants user by user.

    Prints the differences on the same users, with their standard errors over users: of retrieval
    runs on held-out events, of ranking runs on the candidates of their requests.
    """
    from hstu_xd.experiments.comparison import pair_runs, paired_table

    found = pair_runs(
        runs,
        split=split,
        data=data,
        changes=protocol_changes(exclude_seen, candidates, ties, ks),
        verify=verify,
        allow_imports=allow_imports,
        announce=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        typer.echo(paired_table(found), nl=False)


# Small enough for the time limit, large enough for the planted structure to show.
_RECIPE = (
    "xd_encoder.dqk = 16",
    "xd_encoder.dv = 16",
    "xd_encoder.linear_dropout_rate = 0.4",
    "xd_train.item_embedding_dim = 64",
    "xd_train.dropout_rate = 0.4",
    "xd_train.weight_decay = 1e-3",
    "xd_train.num_epochs = 12",
    "xd_train.local_batch_size = 64",
    "xd_train.num_warmup_steps = 50",
    "xd_train.learning_rate = 2e-3",
    "xd_train.num_negatives = 256",
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of everything the demo writes; new.")
    ] = Path("hstu-xd-demo"),
) -> None:
    """Train HSTU and the full model on synthetic data.

    Takes about three minutes on two cores and ends with a report that compares them.
    """
    from hstu_xd.data.synthetic import SynthOptions, synthesize
    from hstu_xd.errors import InputError
    from hstu_xd.experiments.ablation import ablate
    from hstu_xd.experiments.report.page import write_report

    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{out} exists; remove it or give another --out") from None
    data, runs, page = out / "data", out / "runs", out / "report"
    typer.echo("1/3 synthetic log: 2,000 users, 4 domains that tell about each other")
    synthesize(data, SynthOptions(users=2000, domains=4, items_per_domain=300))
    typer.echo("2/3 training HSTU and the cross-domain model")
    table = ablate(
        data,
        ("hstu", "all"),
        (1,),
        runs,
        bindings=_RECIPE,
        jobs=min(2, usable_cores()),
        announce=lambda line: typer.echo(f"    {line}"),
    )
    typer.echo("3/3 report")
    index = write_report([runs], page)
    typer.echo(f"\n{table}")
    for label, path in (("data", data), ("runs", runs), ("report", index)):
        typer.echo(f"{label:8s}{path}")
