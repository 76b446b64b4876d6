"""Tasks: the code of a stage, by the `kind` of their configs."""

from tinymim_jax.tasks.classify import Classify
from tinymim_jax.tasks.distill import Distill
from tinymim_jax.tasks.mae import Mae
from tinymim_jax.tasks.moco import Moco
from tinymim_jax.tasks.segment import Segment

TASKS = {"mae": Mae, "distill": Distill, "classify": Classify, "moco": Moco, "segment": Segment}
