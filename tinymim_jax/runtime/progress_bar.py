"""Bars that show how far long work is, its rate and when it ends."""

import sys
from typing import Any

import tqdm


def bar(title: str, total: int, unit: str, **options: Any) -> tqdm.tqdm:
    """tqdm's, drawn often on a terminal and every ten seconds in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10
    return tqdm.tqdm(desc=title, total=total, unit=unit, mininterval=interval, **options)
