"""Other ways to teach a small ViT on scanned digits: targets of one's own choice, D2-MAE, MoCo v3; a file to start from.

python -m tinymim_jax run --config=configs/digits/targets.py --workdir=runs/targets

One MAE-L teaches four students of one shape: by relations (TinyMIM), by features and relations of two blocks at once,
by D2-MAE, and, without a teacher, by MoCo v3. What each has learnt is measured by kNN on frozen features.
Cost: not measured undisturbed; minutes on two cores. Expected: no published number.
"""

import dataclasses

from tinymim_jax.experiment import config_file, recipes
from tinymim_jax.experiment.config import (
    AttentionLogits,
    Compare,
    Config,
    Distill,
    Feature,
    Init,
    Moco,
    Reconstruction,
    Relation,
    Stage,
)


def get_config(arg: str = "") -> Config:
    recipes.options(arg)
    chain = config_file.beside(__file__, "chain.py").stages
    teacher, student, decoder = Init("mae_l"), chain["distill_b"], chain["mae_l"].task.decoder
    plain = dataclasses.replace(student.model, last_block_heads=None)

    def taught(task: Distill | Moco, **model: object) -> Stage:
        return dataclasses.replace(student, task=task, model=dataclasses.replace(plain, **model))

    several = {
        "late": Relation(teacher_block=4, student_block=4, relations=("qk", "vv"), relation_heads=8),
        "early": Relation(teacher_block=2, student_block=2, relations=("qq", "kk"), relation_heads=8, weight=0.5),
        "output": Feature(teacher_block=4, student_block=4, tensors=("out",), weight=0.1),
    }
    d2_mae = {
        "pixels": Reconstruction(student_block=3, decoder=decoder),
        "attention": AttentionLogits(teacher_block=4, student_block=4),
    }
    stages = {
        "mae_l": chain["mae_l"],
        "relations": student,
        "several": taught(Distill(teacher, several)),
        "d2_mae": taught(Distill(teacher, d2_mae, color_jitter=0.0, mask_ratio=0.75)),
        "moco": taught(Moco(dim=32, hidden=128), weight_init="moco"),
    }
    stages["moco"].data = dataclasses.replace(student.data, resident=False)
    rows = {name: (name,) for name in stages}
    return Config("targets", stages, compare={"frozen features": Compare("knn/top1_k10", rows)})
