"""Commands around upstream codebases, and doctor, which looks at all of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from hstu_xd.errors import InputError


def init(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A generative-recommenders checkout; any folder for --examples."
        ),
    ],
    examples: Annotated[
        bool,
        typer.Option(
            "--examples",
            help="Copy this package's examples, recipes and constraints.txt into DIR instead.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of the same name in DIR.")
    ] = False,
) -> None:
    """Copy the gin files for upstream's trainer into DIR/gin/."""
    if examples:
        _copy_examples(folder, force=force)
        return
    from hstu_xd.plugins.gr.research.gin_files import copy_gin_files

    files = copy_gin_files(folder, force=force)
    _say_written(folder, files)
    first = next((file for file in files if "xd" in file), next(iter(files)))
    typer.echo(
        f"next, in {folder}, once the file's train_fn.dataset_name names your prepared data:\n"
        f"  python main.py --gin_config_file={first}   # with a GPU\n"
        f"  hstu-xd upstream-train --gin_config_file {first}   # on a CPU"
    )


def _copy_examples(folder: Path, *, force: bool) -> None:
    """Copy the examples into a folder, which is made if there is none."""
    from hstu_xd.files import copy_files, example_files

    files = example_files()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give one to copy the examples into")
    folder.mkdir(parents=True, exist_ok=True)
    _say_written(folder, copy_files(files, folder, force=force))
    typer.echo(f"next, in {folder}:\n  python examples/own_model.py")


def _say_written(folder: Path, files: Mapping[str, bool]) -> None:
    for file, written in files.items():
        typer.echo(f"{'wrote' if written else 'kept '} {folder / file}")


def patch(
    check: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Checkout to check, unchanged."),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Checkout to patch; all or none apply."),
    ] = None,
) -> None:
    """Check or apply the patches for an upstream checkout."""
    from hstu_xd.plugins.source_patches import APPLIED, REFUSED, apply_patches, inspect_tree

    root = check or apply
    if root is None or (check and apply):
        raise InputError("give --check PATH or --apply PATH, one of the two")
    if check:
        tree = inspect_tree(root)
        typer.echo(f"state: {tree.state}")
        if tree.state == REFUSED:
            raise InputError(f"{root}: {tree.reason}")
    else:
        tree = apply_patches(root)
        typer.echo(f"state: {APPLIED}")
    typer.echo(f"codebase: {tree.codebase} at {tree.commit[:7]}")
    for word, patches in (
        ("already there", tree.applied),
        ("would add" if check else "added", tree.missing),
    ):
        for each in patches:
            typer.echo(f"{word}: {each.name} ({', '.join(each.blobs)})")
    if apply and tree.missing:
        files = " ".join(path for each in tree.missing for path in each.blobs)
        typer.echo(f"undo: git -C {root} checkout -- {files}")


def upstream_train(
    gin_config_file: Annotated[
        Path, typer.Option("--gin_config_file", help="File of settings, as for upstream's main.py.")
    ],
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option(
            "--gin_bindings",
            help='Setting, "train_fn.num_epochs = 1"; repeat for several.',
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Processes on a CPU; each GPU has its own."),
    ] = 1,
    master_port: Annotated[
        int, typer.Option("--master_port", help="Port of the process group; 0 takes any free one.")
    ] = 0,
) -> None:
    """Train with generative-recommenders' own train_fn.

    Runs on the CPU where there is no GPU.
    """
    from hstu_xd.plugins.gr.research.upstream_trainer import upstream_train as run_training

    run_training(gin_config_file, gin_bindings or [], processes=processes, port=master_port)


def upstream_evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A file of upstream's ckpts folder.")],
    gin_config_file: Annotated[
        Path, typer.Option("--gin_config_file", help="File of settings that it was trained with.")
    ],
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help="Setting of the training; repeat for several."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Split to rank: upstream, valid or test.")
    ] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank held-out events with a checkpoint of upstream."""
    from hstu_xd.plugins.gr.research.upstream_trainer import upstream_evaluate as run_evaluation

    metrics = run_evaluation(gin_config_file, checkpoint, gin_bindings or [], split=split)
    if as_json:
        typer.echo(json.dumps(metrics))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        typer.echo(f"{name.ljust(width)}  {100 * value:6.2f} %")


def rec_dataset(
    data: Annotated[Path, typer.Argument(metavar="STORE", help="Prepared store.")],
    out: Annotated[
        Path,
        typer.Option("--out", help="CSV to write, ../dataset/NAME.csv for --dataset NAME."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a prepared store as HLLM and PerSRec read it."""
    from hstu_xd.plugins.rec.export import write_interactions

    count = write_interactions(data, out, force=force)
    typer.echo(
        f"wrote {out} ({count:,} events)\n"
        f"next, in the checkout's code folder: python -m hstu_xd.plugins.rec ... "
        f"--dataset {out.stem} --item_domain_path {data}"
    )


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Report what is installed, found and going to run.

    Names versions, the upstream codebases that are found, and the attention that will run.
    """
    from hstu_xd.doctor import examine, render

    report = examine()
    typer.echo(json.dumps(report) if as_json else render(report))
