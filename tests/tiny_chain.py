"""A chain of seconds on the embedded digits, for runs in processes of their own: steps=N, fsdp=N, every=N, workers=N,
resident."""

from tests import conftest
from tinymim_jax.experiment import recipes
from tinymim_jax.experiment.config import Config, Mesh
from tinymim_jax.runtime import sharding

sharding.FSDP_MIN_SIZE = 64  # so that small arrays are split too


def get_config(arg: str = "") -> Config:
    o = recipes.options(arg, steps="4", fsdp="1", every="2", workers="0", resident=False)
    stages = conftest.tiny_chain().stages
    for stage in stages.values():
        stage.run.steps, stage.run.checkpoint_every, stage.run.keep = int(o["steps"]), int(o["every"]), 3
        stage.run.eval_every = int(o["every"]) + 1
        stage.data.workers = int(o["workers"])
        if o["resident"]:
            stage.data.resident, stage.data.rand_augment = True, ""
    stages["finetune"].optim.ema = 0.9
    return Config("tiny", stages, mesh=Mesh(fsdp=int(o["fsdp"])))
