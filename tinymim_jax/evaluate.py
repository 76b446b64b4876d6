"""One finished model on everything: accuracy, robustness, probes of its features; one JSON file and one table."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from tinymim_jax import config, handoff
from tinymim_jax.config import Classification, Corruptions, Data, Eval, InputError, Knn, Logistic
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.sources import open_source
from tinymim_jax.evals import make_evaluator
from tinymim_jax.evals.base import Predict, measure
from tinymim_jax.mesh import replicated
from tinymim_jax.tasks.base import Outputs, encode
from tinymim_jax.train import write_json

SUITES = ("imagenet", "robust", "probe", "all")
# TinyMIM, Tables 3 and 4: top-1; ImageNet-A and -R top-1; ImageNet-C, which is a plain mean of errors.
PAPER = {
    192: {"imagenet/top1": 75.8, "imagenet_a/top1": 11.0, "imagenet_r/top1": 39.8, "corruptions/mean_error": 50.1},
    384: {"imagenet/top1": 83.0, "imagenet_a/top1": 27.5, "imagenet_r/top1": 48.8, "corruptions/mean_error": 35.8},
    768: {"imagenet/top1": 85.0, "imagenet_a/top1": 43.0, "imagenet_r/top1": 54.6, "corruptions/mean_error": 32.7},
}


@dataclasses.dataclass
class Sets:
    """What is measured on: ImageFolder trees, if not what the model's own stage had."""

    data: str = ""  # holds train/ and val/ (or the splits of the stage)
    imagenet_a: str = ""
    imagenet_r: str = ""
    imagenet_c: str = ""  # holds <corruption>/<severity>/
    per_class: int | None = None  # measure on so many images of each class only


def evaluate(folder: Path, suite: str, sets: Sets, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Runs `suite` on the finished stage or converted checkpoint in `folder`.

    Returns {"checkpoint", "model", "results": {"<eval>/<metric>": value}, "paper": the published values, if any}.
    Raises InputError if data is missing, or the model has no head where one is needed.
    """
    model = handoff.read_model(folder)
    variables = jax.device_put(handoff.read_variables(folder), replicated(mesh))
    clean, bank = data_sets(folder, model, sets)
    chosen = evals(suite, model, clean, bank, sets)
    evaluators = {name: make_evaluator(cfg, mesh) for name, cfg in chosen.items()}  # what is missing is said first
    predict = make_predict(folder, model, clean, mesh)
    results = {}
    for name, evaluator in evaluators.items():
        results |= measure({name: evaluator}, predict, variables, {}, title=name)
        print(f"{name}: done", flush=True)
    paper = PAPER.get(model.width, {}) if model.num_classes == 1000 else {}
    return {"checkpoint": str(folder), "model": config.to_dict(model), "results": results, "paper": paper}


def data_sets(folder: Path, model: config.ViT, sets: Sets) -> tuple[Data, Data]:
    """The clean evaluation set and the training images, both for evaluation."""
    converted = handoff.read_converted(folder)
    if converted is None:
        stage = handoff.read_stage(folder)
        train = dataclasses.replace(stage.data, transform="eval", rand_augment="")
        own = [e.data for e in stage.evals.values()]
        clean = own[0] if own else dataclasses.replace(train, split="test" if train.source == "digits" else "val")
    else:
        pixels = {key: tuple(value) for key, value in converted["preprocessing"].items()}
        train = Data("folder", transform="eval", image_size=model.image_size, **pixels)
        clean = dataclasses.replace(train, split="val")
        if not sets.data:
            raise InputError(f"{folder} was converted and names no data: give --data=PATH, a tree with train/ and val/")
    if sets.data:
        train, clean = (
            dataclasses.replace(d, source="folder", path=sets.data, num_examples=None) for d in (train, clean)
        )
    if sets.per_class is not None:
        clean = dataclasses.replace(clean, per_class=sets.per_class, num_examples=None)
    return clean, dataclasses.replace(train, crop_pct=clean.crop_pct)


def evals(suite: str, model: config.ViT, clean: Data, bank: Data, sets: Sets) -> dict[str, Eval]:
    """What `suite` measures; raises InputError if it needs a head that is not there."""
    if suite not in SUITES:
        raise InputError(f"--suite={suite}: unknown; choose one of {', '.join(SUITES)}")
    if not model.num_classes and suite in ("imagenet", "robust"):
        raise InputError(
            f"--suite={suite} needs a model with a head, and this one has none: fine-tune it, or use probe"
        )
    chosen: dict[str, Eval] = {}
    if suite in ("imagenet", "all") and model.num_classes:
        chosen["imagenet"] = Classification(clean)
    if suite in ("robust", "all") and model.num_classes:
        for name in ("imagenet_a", "imagenet_r"):
            if path := getattr(sets, name):
                root = Path(path)
                chosen[name] = Classification(_folder(clean, str(root.parent), root.name), subset=name)
        stored = bool(sets.imagenet_c)
        chosen["corruptions"] = Corruptions(_folder(clean, sets.imagenet_c, "") if stored else clean, stored=stored)
    if suite in ("probe", "all"):
        k = tuple(k for k in Knn(clean, bank).k if k <= len(open_source(bank))) or (1,)
        chosen |= {"knn": Knn(clean, bank, k=k), "logistic": Logistic(clean, bank)}
    return chosen


def _folder(data: Data, path: str, split: str) -> Data:
    return dataclasses.replace(data, source="folder", path=path, split=split, num_examples=None)


def make_predict(folder: Path, model: config.ViT, data: Data, mesh: jax.sharding.Mesh) -> Predict:
    """Logits and features; the latter from before the block that distillation left half trained, if there is one."""
    half = handoff.half_trained(model, handoff.read_untrained(folder))
    block = None if half is None else max(half - 1, 1)

    def predict(variables: Any, _: Any, batch: Any) -> Outputs:
        return encode(model, variables, normalize(to_float(batch["image"]), data.mean, data.std), block)

    return jax.jit(predict, out_shardings=replicated(mesh))


def table(report: dict[str, Any]) -> str:
    """A Markdown table of the results, the paper's numbers beside them where it has any."""
    lines = [f"# {report['checkpoint']}", "", "| measure | here | paper |", "|---|---|---|"]
    for name, value in report["results"].items():
        if name.endswith("/images") or name[-2:] in [f"_{s}" for s in range(1, 6)]:
            continue
        published = report["paper"].get(name)
        lines.append(f"| {name} | {value:.2f} | {'' if published is None else published} |")
    notes = [
        "Percent. corruptions/*: top-1 error, a mean over severities; mean_error: their plain mean, which the paper",
        "calls mCE; mce: each error over AlexNet's on ImageNet.",
    ]
    return "\n".join([*lines, "", *notes, ""])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes eval.json and eval.md into `folder`."""
    write_json(folder / "eval.json", report)
    (folder / "eval.md").write_text(table(report))
    return [folder / "eval.json", folder / "eval.md"]
