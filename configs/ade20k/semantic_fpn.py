"""Semantic segmentation of ADE20K by Semantic-FPN with ViT-T, as MAE-Lite has it.

python -m tinymim_jax run --config=configs/ade20k/semantic_fpn.py:init=runs/mae_lite/d2_mae_rpe_finetuned,rpe,data=PATH --dry_run

Options: init=PATH, weights: a stage's folder or a checkpoint of others (default: none, from scratch); rpe: these have a bias by
distance in their attention, which is taken along; data=PATH, ADEChallengeData2016 as it is distributed.
Cost: not measured.
Expected: mIoU 42.8 from D2-MAE fine-tuned for 1000 epochs with a bias by distance, 41.5 from DeiT-T fine-tuned so, 39.0 from
D2-MAE and 38.0 from DeiT-T.
"""

from tinymim_jax.experiment import recipes, segmentation
from tinymim_jax.experiment.config import Config, Init


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, init="", rpe=False, data="ADEChallengeData2016")
    init = segmentation.weights(Init(path=o["init"]), with_distances=o["rpe"]) if o["init"] else None
    return Config("semantic_fpn", {"semantic_fpn": segmentation.semantic_fpn(init, o["data"])})
