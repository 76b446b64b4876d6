"""The same training step in PyTorch, by `bridge.torch_reference`: what ours is compared with.

It has an easier task than ours: images lie on the device as normalised floats, and teacher and student see the same, so
that nothing is converted, jittered, mixed or erased, and no norms are logged.
"""

import dataclasses
import functools
import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from tinymim_jax.bridge.files import need
from tinymim_jax.experiment.config import Stage
from tinymim_jax.models.contract import Encoder
from tinymim_jax.runtime import storage
from tinymim_jax.runtime.errors import InputError

# As the released code runs: attention and relations written out, mixed precision by autocast; and as a good user would:
# scaled_dot_product_attention, torch.compile, bfloat16 by autocast, fused AdamW; on a GPU also as CUDA graphs.
VARIANTS = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}  # torch.compile's modes
# The fields that change what a step computes and have one value here.
FIXED = {
    "model.head_norm": False,
    "model.relative_position": False,
    "model.layer_scale": 0.0,
    "model.remat": False,
    "optim.name": "adamw",
    "optim.freeze": (),
    "optim.accum_steps": 1,
    "optim.ema": None,
    "run.replicas": 1,
}


def steps(stage: Stage, sources: dict[str, Encoder]) -> dict[str, "TorchStep"]:
    """Each variant that works here, run once; of the others, standard error says why not."""
    variants = [v for v in VARIANTS if v != "graphs" or torch_module().cuda.is_available()]
    tried = {variant: _tried(stage, sources, variant) for variant in variants}
    return {variant: step for variant, step in tried.items() if step}


def _tried(stage: Stage, sources: dict[str, Encoder], variant: str) -> "TorchStep | None":
    try:
        step = TorchStep(stage, sources, variant)
        step()
    except Exception as error:  # torch.compile needs a compiler and fails in many ways
        print(f"torch {variant} does not run here: {storage.reason(error)}", file=sys.stderr)
        return None
    return step


def timed(others: dict[str, "TorchStep"], variant: str) -> float:
    """Seconds of a step; one that fails (too little memory?) is taken out of `others`, standard error says so: NaN.

    It is the second of two: the first meets memory that the system has taken back while others computed.
    """
    if variant not in others:
        return math.nan
    try:
        others[variant]()
        begin = time.perf_counter()
        others[variant]()
    except Exception as error:
        print(f"torch {variant} is left out from here: {storage.reason(error)}", file=sys.stderr)
        del others[variant]
        return math.nan
    return time.perf_counter() - begin


def matmul(dtype: str, n: int, count: int) -> Callable[[], float]:
    """A function that measures PyTorch's FLOP/s on `count` products of [n, n] in `dtype`, as `step.matmul` ours."""
    torch = torch_module()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(n, n, device=device).mul(n**-0.5).to(getattr(torch, dtype))

    def measure() -> float:
        y = a
        begin = time.perf_counter()
        for _ in range(count):
            y = y @ a
        if device == "cuda":
            torch.cuda.synchronize()
        return count * 2 * n**3 / (time.perf_counter() - begin)

    return measure


def torch_module() -> types.ModuleType:
    """PyTorch; raises InputError where it is missing."""
    return need("torch", "torch", "--vs=torch")


def check(name: str, stage: Stage, platform: str, devices: int) -> None:
    """Raises InputError unless PyTorch is there, has the step of stage `name`, and computes on one device as ours."""
    if stage.task.kind not in LOSSES:
        raise InputError(f"--vs=torch has no step for {stage.task.kind}; choose one of {', '.join(LOSSES)}")
    theirs = "gpu" if torch_module().cuda.is_available() else "cpu"
    _, own = LOSSES[stage.task.kind]
    for field, value in {**FIXED, **own(stage)}.items():
        found = functools.reduce(lambda node, part: node.get(part) if isinstance(node, dict) else getattr(node, part),
                                 field.split("."), stage)  # fmt: skip
        if (tuple(found) if isinstance(found, list) else found) != value:
            raise InputError(
                f"--vs=torch: PyTorch's step knows {field}={value!r} only, and stage {name} has {found!r}; choose"
                f" another stage, or set --config.stages.{name}.{field}"
            )
    if devices != 1 or platform != theirs:
        raise InputError(
            f"--vs=torch: our step would run on {devices} x {platform}, PyTorch's on one {theirs}; show both the same"
            " device (CUDA_VISIBLE_DEVICES=0, JAX_PLATFORMS=cpu)"
        )


class TorchStep:
    """A stage's step on images of its own; calling it trains once and waits for the device."""

    def __init__(self, stage: Stage, sources: dict[str, Encoder], variant: str):
        """Of a stage that `check` lets pass."""
        torch = torch_module()
        torch.manual_seed(0)
        self.torch = torch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_compiled = variant != "eager"
        # The released code's autocast computes in float16 on a GPU.
        half = torch.float16 if variant == "eager" and self.device.type == "cuda" else torch.bfloat16
        self.dtype = torch.float32 if stage.model.dtype == "float32" else half
        self.models, loss = LOSSES[stage.task.kind][0](stage, sources)
        for model in self.models:
            model.to(self.device).train(model is self.models[-1])  # a teacher drops no paths
            for module in model.modules():
                module.is_fused = self.is_compiled  # which attention reads
        self.loss = torch.compile(loss, mode=VARIANTS[variant]) if self.is_compiled else loss
        # As the released code sets it, and as XLA multiplies float32 on a GPU.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.trained = [p for p in self.models[-1].parameters() if p.requires_grad]
        self.clip_norm = stage.optim.clip_norm
        fused = {"fused": True} if self.is_compiled and self.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.05, **fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        size, batch = stage.data.image_size, stage.run.batch_size
        images = np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)
        self.images = torch.from_numpy(images).to(self.device)

    def __call__(self) -> None:
        """One step."""
        torch = self.torch
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.images)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> int | None:
        """Bytes that a step, made for this, needs with its models and optimiser.

        None where PyTorch does not count, or has no room for one step more.
        """
        if self.device.type != "cuda":
            return None
        cuda = self.torch.cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()  # the other variants' among it
        try:
            self()
        except self.torch.OutOfMemoryError:
            return None
        parameters = [p for model in self.models for p in model.parameters()]
        moments = [x for state in self.optimizer.state.values() for x in state.values() if self.torch.is_tensor(x)]
        own = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments, self.images]
        return cuda.max_memory_allocated() - before + sum(x.numel() * x.element_size() for x in own)


Loss = Callable[[Any], Any]


def _mae(stage: Stage, _: dict[str, Encoder]) -> tuple[list[Any], Loss]:
    import torch

    from tinymim_jax.bridge.torch_reference.mae import MAE

    model = MAE(stage.model, stage.task)
    patches = (stage.model.image_size // stage.model.patch_size) ** 2
    return [model], lambda images: model(images, torch.rand(len(images), patches, device=images.device))[0]


def _distill(stage: Stage, sources: dict[str, Encoder]) -> tuple[list[Any], Loss]:
    from tinymim_jax.bridge.torch_reference import distill
    from tinymim_jax.bridge.torch_reference.vit import ViT

    target, teacher = stage.task.targets["relation"], sources["teacher"]
    block = target.teacher_block
    cut = dataclasses.replace(teacher.trunk(block), last_block_heads=target.heads or teacher.heads_of(block))
    theirs, own = ViT(cut.computing_like(stage.model)), ViT(stage.model)
    return [theirs, own], lambda images: distill.loss(theirs, block, own, images, images)


def _classify(stage: Stage, _: dict[str, Encoder]) -> tuple[list[Any], Loss]:
    import torch

    from tinymim_jax.bridge.torch_reference.vit import ViT

    model = ViT(stage.model)

    def loss(images: Any) -> Any:
        logits = model(images).logits
        target = torch.full_like(logits, 1 / logits.shape[1])  # soft labels, as mixup makes them
        return torch.nn.functional.cross_entropy(logits, target)

    return [model], loss


def _relation_alone(stage: Stage) -> dict[str, Any]:
    """One target, as the recipe has it."""
    if list(stage.task.targets) != ["relation"]:
        return {"task.targets": "relation alone"}
    found = {"relations": ("qk", "vv"), "student_block": stage.model.depth, "kind": "relation", "cls": True}
    found |= {"relation_heads": None, "temperature": 1.0, "softmax": True}
    target = {f"task.targets.relation.{field}": value for field, value in found.items()}
    return {"task.mask_ratio": 0.0, "task.teacher_drop_path": 0.0, **target}


# Of a task: its models and loss, and further fields that have one value here.
LOSSES: dict[str, tuple[Callable, Callable[[Stage], dict[str, Any]]]] = {
    "mae": (_mae, lambda _: {}),
    "distill": (_distill, _relation_alone),
    "classify": (_classify, lambda _: {"task.teacher": None}),
}
