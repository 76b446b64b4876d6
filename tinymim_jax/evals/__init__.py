"""Evaluators: what is measured of a stage, by the `kind` of their configs."""

from tinymim_jax.evals.attention_span import AttentionSpan
from tinymim_jax.evals.classification import Classification
from tinymim_jax.evals.probes import Knn, Logistic
from tinymim_jax.evals.relation_agreement import RelationAgreement
from tinymim_jax.evals.robustness import Corruptions
from tinymim_jax.evals.segmentation import Segmentation
from tinymim_jax.evals.similarity import Cka
from tinymim_jax.evals.spectrum import NearestImages, Spectrum

EVALS = {
    "classification": Classification,
    "knn": Knn,
    "logistic": Logistic,
    "corruptions": Corruptions,
    "segmentation": Segmentation,
    "cka": Cka,
    "attention": AttentionSpan,
    "relation": RelationAgreement,
    "spectrum": Spectrum,
    "neighbours": NearestImages,
}
