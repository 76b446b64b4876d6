"""What a student is made to match, by the `kind` of the targets' configs."""

from tinymim_jax.tasks.targets.attention_logits import AttentionLogits
from tinymim_jax.tasks.targets.class_token import ClassToken
from tinymim_jax.tasks.targets.feature import Feature
from tinymim_jax.tasks.targets.reconstruction import Reconstruction
from tinymim_jax.tasks.targets.relation import Relation

TARGETS = {
    "relation": Relation,
    "feature": Feature,
    "class_token": ClassToken,
    "attention_logits": AttentionLogits,
    "reconstruction": Reconstruction,
}
