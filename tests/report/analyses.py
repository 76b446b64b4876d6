"""Arrays as analyses store them, small and made up."""

import numpy as np


def cka(**other):
    values = np.array([[1.0, 0.4, 0.1], [0.4, 1.0, 0.3]])
    error = np.array([[0.01, 0.02, np.nan]] * 2)
    return {"kind": "cka", "cka": values, "cka_error": error, "rows": ["block0", "norm"],
            "columns": ["block0", "block1", "norm"], "models": ["one", "other"], **other}  # fmt: skip


def attention():
    random = np.random.default_rng(0)
    return {"kind": "attention", "distance": random.random((3, 4)) * 20, "entropy": random.random((3, 4)),
            "blocks": np.arange(1, 4), "uniform_distance": 18.2, "uniform_entropy": 2.77}  # fmt: skip


def relation(images=2, size=16, tokens=5):
    random = np.random.default_rng(1)
    maps = random.integers(0, 256, (2, images, 1, 2, 3, tokens, tokens), np.uint8)
    pixels = random.integers(0, 256, (images, size, size, 3), np.uint8)
    return {"kind": "relation", "teacher": maps[0], "student": maps[1], "kl": random.random((1, 2, 3)),
            "relations": ["qk", "vv"], "blocks": [[5, 6]], "images": pixels}  # fmt: skip


def spectrum():
    return {"kind": "spectrum", "effective_rank": [3.0, 7.5], "norm": [1.0, 2.0], "layers": ["block0", "norm"]}


def neighbours():
    pixels = np.random.default_rng(2).integers(0, 256, (2, 4, 8, 8, 3), np.uint8)
    return {"kind": "neighbours", "queries": pixels[:, 0], "nearest": pixels[:, 1:],
            "similarity": [[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]}  # fmt: skip


ALL = {"cka": cka, "attention": attention, "relation": relation, "spectrum": spectrum, "neighbours": neighbours}


def save(folder):
    """One npz of each kind."""
    folder.mkdir(exist_ok=True)
    for name, made in ALL.items():
        np.savez_compressed(folder / f"{name}.npz", **made())
