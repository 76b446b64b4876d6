"""TinyMIM's study of targets, inputs and drop path: each row of a table as a change of one distillation.

Base (section 4.2): MAE-L teaches B by QK and VV relations of block 18 of 24; raw images, 100 epochs, drop path 0, 0.1.
Not in here: the rows with pixel reconstruction (Tables 5 and 12) and the chains (Tables 8, 9 and 11).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tinymim_jax.experiment.config import ClassToken, Compare, Feature, Relation, Stage
from tinymim_jax.runtime.errors import InputError

DEPTH = 24  # blocks of the published teacher, in which the tables count
BLOCK = 18  # the one whose tensors are matched


class Row(NamedTuple):
    """A row: the paper's top-1 after fine-tuning, and what it changes of the stage, given the teacher's depth."""

    paper: float
    change: Callable[[Stage, int], None]


def _relations(block: int = BLOCK, **fields: Any) -> Callable[[Stage, int], None]:
    def change(stage: Stage, depth: int) -> None:
        stage.task.targets = {"relation": Relation(_scaled(block, depth), stage.model.depth, **fields)}

    return change


def _others(kind: type, block: int = BLOCK, **fields: Any) -> Callable[[Stage, int], None]:
    """Targets that need no heads like the teacher's."""

    def change(stage: Stage, depth: int) -> None:
        target = kind(_scaled(block, depth), stage.model.depth, **fields)
        stage.task.targets, stage.model.last_block_heads = {target.kind: target}, None

    return change


def _scaled(block: int, depth: int) -> int:
    return math.ceil(block * depth / DEPTH)


def _drop_path(teacher: float, student: float) -> Callable[[Stage, int], None]:
    def change(stage: Stage, depth: int) -> None:
        stage.task.teacher_drop_path, stage.model.drop_path = teacher, student

    return change


def _masked(stage: Stage, depth: int) -> None:
    stage.task.mask_ratio = 0.75


def _same(stage: Stage, depth: int) -> None:
    pass


ALL = ("qq", "kk", "vv")
TABLES = {
    5: {"cls": Row(80.6, _others(ClassToken))},
    6: {
        "output": Row(83.7, _others(Feature, DEPTH)),
        "ffn": Row(84.2, _others(Feature, tensors=("mlp_out",))),
        "ffn_residual": Row(81.8, _others(Feature, tensors=("out",))),
        "attention": Row(84.1, _others(Feature, tensors=("attn_out",))),
        "attention_residual": Row(81.3, _others(Feature, tensors=("mid",))),
        "qkv": Row(84.3, _others(Feature, tensors=("q", "k", "v"))),
    },
    7: {
        "qq_kk_vv": Row(84.4, _relations(relations=ALL, softmax=False)),
        "qq_kk_vv_softmax": Row(84.5, _relations(relations=ALL)),
        "qk_vv": Row(84.4, _relations(softmax=False)),
        "qk_vv_softmax": Row(84.6, _same),
    },
    10: {
        f"block_{block}": Row(paper, _relations(block))
        for block, paper in ((12, 83.6), (15, 84.1), (18, 84.6), (21, 84.8), (24, 84.4))
    },
    12: {"raw": Row(84.6, _same), "masked": Row(83.9, _masked)},
    13: {
        f"teacher_{teacher}_student_{student}": Row(paper, _drop_path(teacher, student))
        for teacher, student, paper in ((0, 0, 84.3), (0, 0.1, 84.6), (0, 0.2, 84.3), (0, 0.3, 84.1), (0.1, 0.1, 83.9))
    },
}


def compared(table: str, chosen: dict[str, Row]) -> dict[str, Compare]:
    """The paper's values of the `chosen` rows beside those of stages ROW_finetuned."""
    stages = {name: (f"{name}_finetuned",) for name in chosen}
    paper = {name: row.paper for name, row in chosen.items()}
    return {f"TinyMIM, Table {table}": Compare("val/top1", stages, paper)}


def rows(table: str, row: str = "") -> dict[str, Row]:
    """The rows of a table, or the one that is named; raises InputError that lists what there is."""
    if table not in map(str, TABLES):
        raise InputError(f"config option table={table}: unknown; choose one of {', '.join(map(str, TABLES))}")
    found = TABLES[int(table)]
    if row and row not in found:
        raise InputError(f"config option row={row}: unknown in table {table}; choose one of {', '.join(found)}")
    return {row: found[row]} if row else found
