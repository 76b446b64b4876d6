"""Semantic segmentation of ADE20K by UPerNet, as TinyMIM has it.

python -m tinymim_jax run --config=configs/ade20k/upernet.py:size=b,init=runs/imagenet/distill_b,data=PATH --dry_run

Options: size=b|s|t|t_star (default: b); init=PATH, weights: a stage's folder or a checkpoint of others (default: none, from
scratch); data=PATH, ADEChallengeData2016 as it is distributed (default: ADEChallengeData2016); mae: the weights are MAE's own, for
which the original has layer decay 0.65, and reached 48.15.
Cost: the original took 0.47 s a step of 16 crops on 8 GPUs, 21 hours; not measured here.
Expected: mIoU 52.2 (B), 48.4 (S), 44.0 (T), 45.0 (T*). Of B the original logged at 16,000, 32,000, ... steps 48.15, 49.51,
50.49, 50.36, 50.76, 51.66, 51.83, 52.06, 52.20 and 52.47, and as a mean of 50 steps a loss of the head (of the auxiliary one,
times 0.4) of 3.899 (1.599) at 50 steps, 1.067 (0.680) at 1,000, 0.596 (0.298) at 5,000 and 0.492 (0.250) at 10,000. A run
that is a point away is within what others report.
"""

from tinymim_jax.experiment import recipes, segmentation
from tinymim_jax.experiment.config import Config, Init

SIZES = {"b": "base", "s": "small", "t": "tiny", "t_star": "t_star"}


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, size="b", init="", data="ADEChallengeData2016", mae=False)
    size = recipes.choose(SIZES, o["size"])
    init = segmentation.weights(Init(path=o["init"])) if o["init"] else None
    stage = segmentation.upernet(size, init, o["data"])
    stage.optim.layer_decay = 0.65 if o["mae"] else stage.optim.layer_decay
    return Config(f"upernet_{o['size']}", {f"upernet_{o['size']}": stage})
