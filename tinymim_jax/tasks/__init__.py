"""Tasks: the code of a stage, by the `kind` of their configs."""

from tinymim_jax.tasks.classify import Classify
from tinymim_jax.tasks.distill import Distill
from tinymim_jax.tasks.mae import Mae

TASKS = {"mae": Mae, "distill": Distill, "classify": Classify}
