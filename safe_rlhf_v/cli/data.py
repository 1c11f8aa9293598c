"""Commands on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safe_rlhf_v.cli.common import plain, show
from safe_rlhf_v.command_line import App

app = App(no_args_is_help=True, help="Make, check and describe preference data.")
Source = Annotated[
    str,
    typer.Argument(help="Folder with data/<category>/<split>.parquet or <split>.jsonl, one such file, or a hub id."),
]
Split = Annotated[str, typer.Option(help="Split to read.")]
Columns = Annotated[str | None, typer.Option(help="Column map, by name or .yaml file, for other column names.")]


@app.command("picture-world")
def picture_world(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to, in the layout of BeaverTails-V.")],
    train: Annotated[int, typer.Option(min=1, help="Training pairs.")] = 12_000,
    evaluation: Annotated[int, typer.Option(min=1, help="Evaluation pairs.")] = 600,
    seed: Annotated[int, typer.Option(help="Equal seeds write equal data.")] = 0,
    pictures: Annotated[
        Path | None, typer.Option(help="Your own pictures of the objects, OBJECT/STYLE.png, in place of drawn ones.")
    ] = None,
    held_out_style: Annotated[str | None, typer.Option(help="Style kept for evaluation; the last by name.")] = None,
) -> None:
    """Draw a world of pictures and questions whose true helpfulness and harm are known.

    Example: safe-rlhf-v data picture-world --out runs/world --train 1000 --evaluation 200
    """
    from beavertails_v.picture_world import write

    write(out, train=train, evaluation=evaluation, seed=seed, pictures=pictures, held_out_style=held_out_style)
    plain(f"written: {out}")


@app.command()
def check(
    source: Source,
    split: Annotated[str | None, typer.Option(help="Split to read; without it every split of a folder.")] = None,
    columns: Columns = None,
    report: Annotated[Path | None, typer.Option(help="Write every faulty row to this .jsonl.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if any row is left out.")] = False,
) -> None:
    """Read every row and picture; say which rows are left out and why.

    Example: safe-rlhf-v data check my_data --report faults.jsonl
    """
    from beavertails_v.locate import splits
    from beavertails_v.quality import check_split
    from beavertails_v.report import write_reports

    outcomes = [check_split(source, name, columns) for name in ([split] if split else splits(source))]
    reports = [found for found, _ in outcomes if found is not None]
    if report is not None:
        write_reports(reports, report)
        plain(f"written: {report}")
    for found in reports:
        _summarise(found)
    if faults := [error for _, error in outcomes if error is not None]:
        raise faults[0]
    if strict and any(found.dropped for found in reports):
        raise typer.Exit(1)


def _summarise(report: Any) -> None:
    plain(report.summary())
    if report.unused:
        plain(f"  columns that are carried along and not used: {', '.join(report.unused)}")


@app.command()
def leakage(
    source: Source,
    train: Annotated[str, typer.Option(help="Training split.")] = "train",
    evaluation: Annotated[str, typer.Option(help="Evaluation split.")] = "evaluation",
    columns: Columns = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a picture or prompt is in both.")] = False,
) -> None:
    """Pictures, prompts and questions that stand in both splits.

    Example: safe-rlhf-v data leakage runs/world --strict
    """
    from beavertails_v import leakage as shared_by
    from beavertails_v import load_comparisons

    first, second = (
        load_comparisons(source, split, columns=columns, check_images="header") for split in (train, evaluation)
    )
    found = shared_by(first, second)
    plain(found.summary())
    if found.train_rows:
        plain(f"training rows to leave out: {list(found.train_rows[:20])}{' ...' * (len(found.train_rows) > 20)}")
    if strict and found.train_rows:
        raise typer.Exit(1)


@app.command()
def info(source: Source, split: Split = "train", columns: Columns = None) -> None:
    """How many pairs, of which categories, how safe, and whether preferences go with rates.

    Example: safe-rlhf-v data info runs/world --split evaluation
    """
    from beavertails_v import audit, load_comparisons

    data = load_comparisons(source, split, columns=columns, check_images="header")
    _summarise(data.report)
    found = audit(data)
    plain(found.summary())
    show("categories", dict(sorted(found.categories.items())))
    show("harmless rates", {f"rate {rate}": count for rate, count in sorted(found.harmless_rates.items())})
