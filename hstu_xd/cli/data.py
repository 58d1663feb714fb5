"""Commands that write a prepared store: prepare and synth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_xd.cli.run_options import say_next
from hstu_xd.errors import InputError


def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Log files (CSV, TSV, Parquet, JSON lines, .inter; also .gz), or NAME=PATH to "
            "give all events of a file one domain.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[  # the option's name is part of the command line's contract
        str,
        typer.Option(help="File format: auto, csv, amazon-ratings, amazon-reviews or recbole."),
    ] = "auto",
    user_col: Annotated[str | None, typer.Option(help="Column of the user id.")] = None,
    item_col: Annotated[str | None, typer.Option(help="Column of the item id.")] = None,
    domain_col: Annotated[str | None, typer.Option(help="Column of the domain.")] = None,
    time_col: Annotated[str | None, typer.Option(help="Column of the time.")] = None,
    order_col: Annotated[
        str | None, typer.Option(help="Column that orders events of one time (else a hash does).")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Names of all columns of files without a header: user,item,rating,time."),
    ] = None,
    time_unit: Annotated[
        str,
        typer.Option(
            help="What times are: auto (by plausibility), s, ms, us, ns, min, h, d, YYYYMMDD, "
            "YYYYMMDDhh, YYYYMMDDhhmm, YYYYMMDDhhmmss or iso."
        ),
    ] = "auto",
    quote: Annotated[
        str,
        typer.Option(help="Double quotes in delimited text: auto, double, none or backslash."),
    ] = "auto",
    drop_repeats: Annotated[
        str | None,
        typer.Option(
            help="Drop events that repeat another of the same user and item: exact (in the same "
            "second), or a number of seconds."
        ),
    ] = None,
    prefix_items: Annotated[
        bool,
        typer.Option("--prefix-items", help="Put the domain before every item's id (domain:id)."),
    ] = False,
    exact_ids: Annotated[
        bool,
        typer.Option("--exact-ids", help="Keep spaces at the ends of ids, and 12.0 beside 12."),
    ] = False,
    skip_faulty: Annotated[
        bool,
        typer.Option(
            "--skip-faulty", help="Leave out faulty lines and list them in faulty_lines.csv."
        ),
    ] = False,
    min_user: Annotated[
        int, typer.Option(help="Fewest events of a user in a domain (k-core).")
    ] = 0,
    min_item: Annotated[int, typer.Option(help="Fewest events of an item.")] = 0,
    min_user_total: Annotated[
        int, typer.Option(help="Fewest events of a user over all domains (k-core).")
    ] = 0,
    event_cols: Annotated[
        str | None,
        typer.Option(help="Columns to keep as fields of the events: on_discount,store."),
    ] = None,
    item_features: Annotated[
        Path | None,
        typer.Option(help="Parquet or CSV file with one row an item, for --levels."),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Columns of the item features that are levels of a taxonomy, finest first: "
            "type,category,department."
        ),
    ] = None,
    write_upstream: Annotated[
        bool,
        typer.Option(
            "--write-upstream",
            help="Also write sasrec_format.csv and item_domains.csv, which generative-recommenders "
            "reads.",
        ),
    ] = False,
    append: Annotated[
        Path | None,
        typer.Option(
            "--append",
            metavar="STORE",
            help="Read only what is new, and write STORE with it: the same bytes as reading all.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing store.")] = False,
) -> None:
    """Read interaction logs and write a prepared store.

    The store holds histories, the catalogue of items and a manifest with counts and hashes.
    """
    from hstu_xd.data.append import append_logs
    from hstu_xd.data.encode import IdOptions
    from hstu_xd.data.filters import Filters
    from hstu_xd.data.prepare import prepare_logs
    from hstu_xd.data.sources.columns import ColumnOptions
    from hstu_xd.data.statistics import print_summary
    from hstu_xd.data.taxonomy import FeatureOptions

    if levels is not None and item_features is None:
        raise InputError(f"--levels {levels}: name the file they are in with --item-features")
    features = None
    if item_features is not None:
        features = FeatureOptions(item_features, _listed(levels, "--levels"), item_col)
    notes: list[str] = []
    warnings: list[str] = []
    filters = Filters(min_user=min_user, min_item=min_item, min_user_total=min_user_total)
    reading: dict[str, Any] = {
        "file_format": format,
        "columns": ColumnOptions(
            user=user_col,
            item=item_col,
            domain=domain_col,
            time=time_col,
            order=order_col,
            names=None if columns is None else tuple(columns.split(",")),
            fields=_listed(event_cols, "--event-cols"),
        ),
        "time_unit": time_unit,
        "quote": quote,
        "write_upstream": write_upstream,
        "force": force,
        "tell": notes.append,
        "warn": warnings.append,
    }
    if append is not None:
        _refuse_with_append(
            {
                "--drop-repeats": drop_repeats,
                "--prefix-items": prefix_items,
                "--exact-ids": exact_ids,
                "--skip-faulty": skip_faulty,
                str(filters): str(filters),
                "--event-cols": event_cols,
                "--item-features": item_features,
            }
        )
        manifest = append_logs(inputs, append, out, **reading)
    else:
        manifest = prepare_logs(
            inputs,
            out,
            ids=IdOptions(exact_ids, prefix_items, skip_faulty),
            drop_repeats=drop_repeats,
            filters=filters,
            features=features,
            **reading,
        )
    print_summary(out, manifest, notes=notes, warnings=warnings)
    if append is not None:
        say_next(["train", "--data", out, "--continue-from", "RUN", "--out", "NEXT_RUN"])
    else:
        _say_next(out)


def _refuse_with_append(given: Mapping[str, object]) -> None:
    """Refuse options that a store has been prepared with or without, and cannot be given later.

    Raises:
        InputError: names the first.
    """
    option = next((option for option, value in given.items() if value), None)
    if option is not None:
        raise InputError(
            f"{option} does not go with --append, which reads as its store was read; prepare all "
            "logs together"
        )


def _listed(text: str | None, option: str) -> tuple[str, ...]:
    """Split a list of columns at its commas.

    Raises:
        InputError: an empty name, or one that comes twice.
    """
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    wrong = next((name for name in names if not name or names.count(name) > 1), None)
    if wrong is not None:
        state = f"names {wrong!r} twice" if wrong else "holds an empty name"
        raise InputError(f"{option} {text!r} {state}; name every column once, with commas between")
    return names


def synth(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    users: Annotated[int, typer.Option(help="Number of users.")] = 2000,
    domains: Annotated[int, typer.Option(help="Number of domains.")] = 5,
    items_per_domain: Annotated[int, typer.Option(help="Number of items in each domain.")] = 400,
    skew: Annotated[
        float,
        typer.Option(help="Imbalance: 0 for equal domains; near 1 the first has nearly all."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal logs.")] = 0,
    mean_length: Annotated[float, typer.Option(help="Mean number of events of a user.")] = 40.0,
    baskets: Annotated[
        bool,
        typer.Option(
            "--baskets",
            help="Shoppers with habits, a taxonomy and deals, for requests and rank; with "
            "--mean-length 300 and more.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing store.")] = False,
) -> None:
    """Write a prepared store of synthetic users.

    What a user does in one domain tells about the others, so that models can be compared on it.
    """
    from hstu_xd.data.statistics import print_summary
    from hstu_xd.data.synthetic import SynthOptions, synthesize
    from hstu_xd.data.synthetic_baskets import synthesize_baskets

    options = SynthOptions(
        users=users,
        domains=domains,
        items_per_domain=items_per_domain,
        skew=skew,
        seed=seed,
        mean_length=mean_length,
    )
    make = synthesize_baskets if baskets else synthesize
    print_summary(out, make(out, options, force=force))
    _say_next(out)


def _say_next(store: Path) -> None:
    say_next(
        ["train", "--data", store, "--gin_config_file", "FILE.gin", "--out", "RUN"],
        ["ablate", "--data", store, "--out", "RUNS"],
    )
