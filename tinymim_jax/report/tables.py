"""Tables of a workdir's results."""

import re
from typing import Any

from rich.console import Console
from rich.table import Table


def text(results: dict[str, Any]) -> str:
    """The metrics of each stage, then each comparison, as text for a terminal."""
    tables = [Table("stage", "loss", "evaluations", title=results["config"])]
    for name, metrics in results["stages"].items():
        shown = {k: v for k, v in metrics.items() if "/" in k and not re.match(r"replica\d+/|.*/images$", k)}
        evals = ", ".join(f"{k} {v:.2f}" for k, v in shown.items())
        tables[0].add_row(name, f"{metrics['loss']:.4f}" if "loss" in metrics else "-", evals)
    for title, compared in results["compare"].items():
        paper, ranks = compared.get("paper", {}), compared.get("rank_correlation")
        caption = None if ranks is None else f"rank correlation with the paper: {ranks:.2f}"
        columns = ["", "mean", "std. error", "runs", *(["paper"] if paper else [])]
        tables.append(Table(*columns, title=f"{title} ({compared['metric']})", caption=caption))
        for label, row in compared["rows"].items():
            error = "-" if row["stderr"] is None else f"{row['stderr']:.2f}"
            published = [f"{paper[label]:.1f}" if label in paper else ""] if paper else []
            tables[-1].add_row(label, f"{row['mean']:.2f}", error, str(len(row["values"])), *published)
    console = Console(width=110, color_system=None)  # of standard output, whose characters it keeps to
    with console.capture() as captured:
        console.print(*tables)
    return captured.get()
