"""Tables of a workdir's results."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils.epath import Path
from rich.console import Console
from rich.table import Table

from tinymim_jax.evals.relation_agreement import HEAD
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.markdown import table
from tinymim_jax.runtime.metric_log import write_whole
from tinymim_jax.training import chain


def text(results: dict[str, Any]) -> str:
    """The metrics of each stage, then each comparison, as text for a terminal."""
    tables = [Table("stage", "loss", "evaluations", title=results["config"])]
    for name, metrics in results["stages"].items():
        shown = measured(metrics)
        loss = shown.pop("loss", "-")
        tables[0].add_row(name, loss, ", ".join(f"{k} {v}" for k, v in shown.items()))
    for title, compared in results["compare"].items():
        heading, *rows = cells(compared)
        tables.append(Table(*heading, title=f"{title} ({compared['metric']})", caption=agreement(compared)))
        for row in rows:
            tables[-1].add_row(*row)
    console = Console(
        width=110, color_system=None, markup=False, emoji=False
    )  # keeps to the characters of standard output
    with console.capture() as captured:
        console.print(*tables)
    return captured.get()


def measured(metrics: Mapping[str, float]) -> dict[str, str]:
    """The loss of a stage and what its evaluations have found; of several replicas mean ± standard error."""
    found = {"loss": f"{metrics['loss']:.4f}"} if "loss" in metrics else {}
    for name, value in metrics.items():
        if "/" in name and not (HEAD.fullmatch(name) or re.match(r"replica\d+/|.*/images$", name)):
            error = chain.summary(chain.values_of(metrics, name))["stderr"]
            found[name] = f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")
    return found


def write(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """The comparisons as WORKDIR/report/tables.md; returns the files, none if there are none."""
    if not results["compare"]:
        return []
    path = workdir / "report" / "tables.md"
    storage.make(path.parent)
    write_whole(path, markdown(results))
    return [path]


def markdown(results: dict[str, Any]) -> str:
    """Each comparison as Markdown."""
    parts = []
    for title, compared in results["compare"].items():
        heading, *rows = cells(compared)
        said = [verdict] if (verdict := agreement(compared)) else []
        parts += [f"## {title} ({compared['metric']})", table(heading, rows), *said]
    return "\n\n".join([f"# {results['config']}", *parts]) + "\n"


def cells(compared: dict[str, Any]) -> Iterator[list[str]]:
    """A heading, and a row for each of a comparison; with a paper's value, and the places in both orders."""
    paper, rows = compared.get("paper", {}), compared["rows"]
    ours = {name: one["mean"] for name, one in rows.items() if name in paper}
    yield ["", "mean", "std. error", "runs", *(["place", "paper", "its place"] if paper else [])]
    for label, row in rows.items():
        error = "-" if row["stderr"] is None else f"{row['stderr']:.2f}"
        shown = [label, f"{row['mean']:.2f}", error, str(len(row["values"]))]
        if paper:
            shown += [place(label, ours), f"{paper[label]:.1f}", place(label, paper)] if label in paper else [""] * 3
        yield shown


def place(label: str, values: dict[str, float]) -> str:
    """1 for the best; equal ones share theirs."""
    return str(1 + sum(value > values[label] for value in values.values()))


def agreement(compared: dict[str, Any]) -> str | None:
    """How far ours and the paper's order agree; None where there is none."""
    if "rank_correlation" not in compared:
        return None
    said = f"rank correlation with the paper: {compared['rank_correlation']:.2f}"
    if "clear" not in compared or all(row["stderr"] is None for row in compared["rows"].values()):
        return f"{said}; of single runs nothing tells whether a difference is more than chance"
    if not compared["clear"]:
        return f"{said}; no pair of rows differs by more than twice its standard error"
    agreed = f"{compared['agree']} of the {compared['clear']} pairs that differ by more than twice their standard error"
    against = ", ".join(f"{better} > {worse}" for better, worse in compared["contradicted"])
    return f"{said}; {agreed} are in its order" + (f"; not so: {against}" if against else "")
