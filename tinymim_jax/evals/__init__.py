"""Evaluators: what is measured of a stage, by the `kind` of their configs."""

from tinymim_jax.evals.classification import Classification
from tinymim_jax.evals.probes import Knn, Logistic
from tinymim_jax.evals.robustness import Corruptions
from tinymim_jax.evals.segmentation import Segmentation

EVALS = {
    "classification": Classification,
    "knn": Knn,
    "logistic": Logistic,
    "corruptions": Corruptions,
    "segmentation": Segmentation,
}
