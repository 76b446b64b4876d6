"""TinyMIM's study of targets, inputs, drop path and chains: its Tables 5 to 8 and 10 to 13, row by row.

Base (section 4.2): MAE-L teaches B by QK and VV relations of block 18 of 24; raw images, 100 epochs, drop path 0, 0.1.
A row is a pre-trained model, which is then fine-tuned; rows of several tables that are one and the same are trained
once. What a preset (configs/*/study.py) knows is how long and on what its models are trained.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from tinymim_jax.experiment.config import (
    ClassToken,
    Compare,
    Config,
    Decoder,
    Feature,
    Init,
    Reconstruction,
    Relation,
    Stage,
)
from tinymim_jax.runtime.errors import InputError

DEPTH = 24  # blocks of the published teacher, in which the tables count
BLOCK = 18  # the one whose tensors are matched
SUPERVISED, MAE = "supervised", "mae"
TEACHER_SIZE = {"base": "large", "small": "base", "tiny": "small"}  # of the chain


@dataclasses.dataclass(frozen=True)
class Preset:
    """The stages that a study is made of, by the name of a size, at one scale."""

    mae: Callable[[str], Stage]  # size
    distill: Callable[[str, Init, int], Stage]  # size, teacher, epochs; its targets and drop path are the row's
    finetune: Callable[[str, str | None, int], Stage]  # size, stage to begin with (None: scratch), epochs of that
    depth: dict[str, int]  # blocks
    heads: Callable[[str], int]  # of the relations that a teacher of this size gives
    teacher: str = ""  # the path of a trained MAE-L; "": it is the first stage


class Pretrained(NamedTuple):
    """A model as the tables have it: what is fine-tuned, or a teacher."""

    size: str
    how: str = "relation"  # SUPERVISED, MAE or one of VARIANTS
    teacher: Optional["Pretrained"] = None  # of a variant
    epochs: int = 100

    @property
    def name(self) -> str:
        """The name of its stage."""
        origin = "" if self.teacher is None or self.is_chained() else f"_from_{self.teacher.name}"
        return f"{self.how}_{self.size[0]}{origin}" + ("_300" if self.epochs == 300 else "")

    def is_chained(self) -> bool:
        """Whether its teacher is the one that it has in a chain from MAE-L."""
        return self.teacher == (MAE_L if self.size == "base" else chain(TEACHER_SIZE[self.size], self.how, self.epochs))


class Row(NamedTuple):
    """A row of a table: a model, and the paper's top-1 after its fine-tuning."""

    model: Pretrained
    paper: float


MAE_L = Pretrained("large", MAE)


def chain(size: str, how: str = "relation", epochs: int = 100) -> Pretrained:
    """A model whose teachers were trained like itself, up to MAE-L."""
    teacher = MAE_L if size == "base" else chain(TEACHER_SIZE[size], how, epochs)
    return Pretrained(size, how, teacher, epochs)


class Facts(NamedTuple):
    """What a variant is told: the teacher's usual block, its last one, the heads of its relations; a decoder."""

    block: int
    last: int
    heads: int
    decoder: Decoder  # of the student's own MAE


Change = Callable[[Stage, Facts], None]


def _relations(block: int | None = None, **fields: Any) -> Change:
    """Relations of `block` of the published MAE-L, or of the usual one."""

    def change(stage: Stage, facts: Facts) -> None:
        chosen = facts.block if block is None else math.ceil(block * facts.last / DEPTH)
        stage.model.last_block_heads = facts.heads
        stage.task.targets = {"relation": Relation(chosen, stage.model.depth, heads=facts.heads, **fields)}

    return change


def _others(kind: type, last: bool = False, **fields: Any) -> Change:
    """Targets that need no heads like the teacher's, of the usual block or of the last."""

    def change(stage: Stage, facts: Facts) -> None:
        target = kind(facts.last if last else facts.block, stage.model.depth, **fields)
        stage.task.targets, stage.model.last_block_heads = {target.kind: target}, None

    return change


def _drop_path(teacher_rate: float, rate: float) -> Change:
    def change(stage: Stage, facts: Facts) -> None:
        _relations()(stage, facts)
        stage.task.teacher_drop_path, stage.model.drop_path = teacher_rate, rate

    return change


def _masked(before: Change, reconstruct: bool = False) -> Change:
    """75 % of the patches hidden from both; and restored by a decoder like that of the student's own MAE."""

    def change(stage: Stage, facts: Facts) -> None:
        before(stage, facts)
        stage.task.mask_ratio = 0.75
        if reconstruct:
            stage.task.targets["reconstruction"] = Reconstruction(stage.model.depth, facts.decoder)

    return change


ALL = ("qq", "kk", "vv")
VARIANTS: dict[str, Change] = {
    "relation": _relations(),
    "relation_no_softmax": _relations(softmax=False),
    "relation_qq_kk_vv": _relations(relations=ALL),
    "relation_qq_kk_vv_no_softmax": _relations(relations=ALL, softmax=False),
    **{f"relation_block_{block}": _relations(block) for block in (12, 15, 21, 24)},
    "relation_masked": _masked(_relations()),
    "relation_masked_rec": _masked(_relations(), reconstruct=True),
    **{f"relation_drop_{t}_{s}": _drop_path(t, s) for t, s in ((0, 0), (0, 0.2), (0, 0.3), (0.1, 0.1))},
    "cls": _others(ClassToken),
    "cls_rec": _masked(_others(ClassToken), reconstruct=True),
    "output": _others(Feature, last=True),
    "ffn": _others(Feature, tensors=("mlp_out",)),
    "ffn_residual": _others(Feature, tensors=("out",)),
    "attention": _others(Feature, tensors=("attn_out",)),
    "attention_residual": _others(Feature, tensors=("mid",)),
    "qkv": _others(Feature, tensors=("q", "k", "v")),
}


def _base(**papers: float) -> dict[str, Row]:
    return {name: Row(chain("base", name), paper) for name, paper in papers.items()}


def _tables(long: int) -> dict[int, dict[str, Row]]:
    """By number; `long` is what 300 epochs are called."""
    base, mae = chain("base"), Row(Pretrained("base", MAE), 83.6)
    strategies = {SUPERVISED: (72.2, 79.9, 81.2), MAE: (71.6, 80.6, 83.6), "cls": (70.6, 79.6, 82.6),
                  "qkv": (73.4, 80.8, 83.8), "relation": (75.8, 83.0, 85.0)}  # fmt: skip
    from_mae_b = Pretrained("small", teacher=mae.model)
    return {
        5: {MAE: mae, **_base(cls=80.6, cls_rec=82.1)},
        6: _base(output=83.7, ffn=84.2, ffn_residual=81.8, attention=84.1, attention_residual=81.3, qkv=84.3),
        7: {MAE: mae, **_base(relation_qq_kk_vv_no_softmax=84.4, relation_qq_kk_vv=84.5, relation_no_softmax=84.4,
                              relation=84.6)},
        8: {
            f"{how}_{size[0]}": Row(chain(size, how, long) if how in VARIANTS else Pretrained(size, how), paper)
            for i, size in enumerate(("tiny", "small", "base"))
            for how, paper in ((how, papers[i]) for how, papers in strategies.items())
        },
        10: {
            f"block_{block}": Row(base if block == BLOCK else chain("base", f"relation_block_{block}"), paper)
            for block, paper in ((12, 83.6), (15, 84.1), (18, 84.6), (21, 84.8), (24, 84.4))
        },
        11: {
            "s_from_mae_b": Row(from_mae_b, 82.3),
            "s_from_mae_l": Row(Pretrained("small", teacher=MAE_L), 82.1),
            "s_from_b": Row(chain("small"), 82.6),
            "t_from_mae_s": Row(Pretrained("tiny", teacher=Pretrained("small", MAE)), 74.1),
            "t_from_mae_b": Row(Pretrained("tiny", teacher=mae.model), 74.4),
            "t_from_s": Row(Pretrained("tiny", teacher=from_mae_b), 75.0),
        },
        12: _base(relation=84.6, relation_masked=83.9, relation_masked_rec=84.0),
        13: _base(**{"relation_drop_0_0": 84.3, "relation": 84.6, "relation_drop_0_0.2": 84.3,
                     "relation_drop_0_0.3": 84.1, "relation_drop_0.1_0.1": 83.9}),
    }  # fmt: skip


def rows(table: str, row: str = "", long: int = 300) -> dict[str, dict[str, Row]]:
    """The rows of a table, by its number, those of "all", or the one that is named, of the tables that have it.

    `long` is 100 where a preset trains all models equally long. Raises InputError that lists what there is.
    """
    tables = {str(number): found for number, found in _tables(long).items()}
    if table != "all" and table not in tables:
        raise InputError(f"config option table={table}: unknown; choose one of {', '.join(tables)}, all")
    chosen = tables if table == "all" else {table: tables[table]}
    if row:
        found = {number: {row: own[row]} for number, own in chosen.items() if row in own}
        names = ", ".join(dict.fromkeys(name for own in chosen.values() for name in own))
        if not found:
            raise InputError(f"config option row={row}: unknown in table {table}; choose one of {names}")
        return found
    return chosen


def stages(preset: Preset, chosen: dict[str, dict[str, Row]]) -> dict[str, Stage]:
    """What has to be trained for these rows, teachers first, each model and its fine-tuning once."""
    found: dict[str, Stage] = {}
    for row in (row for own in chosen.values() for row in own.values()):
        _add(found, preset, row.model)
        if row.model.how != SUPERVISED:
            tuned = preset.finetune(row.model.size, row.model.name, row.model.epochs)
            found.setdefault(f"{row.model.name}_finetuned", tuned)
    return found


def _add(found: dict[str, Stage], preset: Preset, model: Pretrained) -> None:
    if model.name in found or (model == MAE_L and preset.teacher):
        return
    if model.how == MAE:
        found[model.name] = preset.mae(model.size)
    elif model.how == SUPERVISED:
        found[model.name] = preset.finetune(model.size, None, model.epochs)
    else:
        _add(found, preset, model.teacher)
        is_given = model.teacher == MAE_L and preset.teacher
        init = Init(path=preset.teacher) if is_given else Init(model.teacher.name)
        stage, size = preset.distill(model.size, init, model.epochs), model.teacher.size
        last = preset.depth[size]
        block = math.ceil(BLOCK * last / DEPTH) if size == "large" else last
        decoder = preset.mae(model.size).task.decoder
        VARIANTS[model.how](stage, Facts(block, last, preset.heads(size), decoder))
        stage.run.data_name = "study"  # so that rows differ in nothing else, and can share a teacher's pass
        found[model.name] = stage


def experiment(name: str, preset: Preset, chosen: dict[str, dict[str, Row]]) -> Config:
    """What these rows are made of, and their tables; a stage that would do all that an earlier one does is that one."""
    found, tables = stages(preset, chosen), compared(chosen)
    same: dict[str, str] = {}
    kept: dict[str, Stage] = {}
    for own, stage in found.items():
        for _, init in stage.inits():
            init.stage = same.get(init.stage, init.stage)
        same[own] = next((other for other, one in kept.items() if one == stage), own)
        kept.setdefault(same[own], stage)
    for table in tables.values():
        table.rows = {label: tuple(same[stage] for stage in row) for label, row in table.rows.items()}
    return Config(name, kept, compare=tables)


def compared(chosen: dict[str, dict[str, Row]]) -> dict[str, Compare]:
    """A table of ours beside each of the paper's."""
    found = {}
    for number, own in chosen.items():
        models = {name: row.model for name, row in own.items()}
        trained = {name: (m.name + "_finetuned" * (m.how != SUPERVISED),) for name, m in models.items()}
        papers = {name: row.paper for name, row in own.items()}
        found[f"TinyMIM, Table {number}"] = Compare("val/top1", trained, papers)
    return found
