"""Evaluators: what is measured of a stage."""

import jax

from tinymim_jax.evals.classification import Classification
from tinymim_jax.evals.contract import Evaluator
from tinymim_jax.evals.probes import Knn, Logistic
from tinymim_jax.evals.robustness import Corruptions
from tinymim_jax.experiment import config

EVALS = {"classification": Classification, "knn": Knn, "logistic": Logistic, "corruptions": Corruptions}


def make_evaluator(cfg: config.Eval, mesh: jax.sharding.Mesh) -> Evaluator:
    """The evaluator that `cfg` describes, its data opened."""
    if cfg.kind not in EVALS:
        raise ValueError(f"unknown eval {cfg.kind!r}; choose one of {', '.join(EVALS)}")
    return EVALS[cfg.kind](cfg, mesh)
