"""Encoders, by the `kind` of their configs; `contract.Encoder` says what each answers."""

from tinymim_jax.models.hiera import Hiera
from tinymim_jax.models.vit import ViT

MODELS = {"vit": ViT, "hiera": Hiera}
