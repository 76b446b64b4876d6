"""One finished model on everything: accuracy, robustness, probes of its features; one JSON file and one table."""

import dataclasses
import re
import sys
from typing import Any

import jax
from etils.epath import Path

from tinymim_jax.data.config import Data, Masks
from tinymim_jax.data.device_augment import normalize, to_float
from tinymim_jax.data.sources import check_same_classes, open_source
from tinymim_jax.evals import Classification, Corruptions, Knn, Logistic, Segmentation, labels, subsets
from tinymim_jax.evals.contract import Context, Eval, Measurement, Predict, Variables, save_arrays, scalars
from tinymim_jax.models.contract import Encoder, Outputs, Pool
from tinymim_jax.runtime import codec, markdown, storage
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.metric_log import write_json
from tinymim_jax.runtime.sharding import replicated
from tinymim_jax.weights.parameters import flatten

SUITES = ("imagenet", "robust", "probe", "segmentation", "all")
# TinyMIM, Tables 3 and 4: top-1; ImageNet-A and -R top-1; ImageNet-C, which is a plain mean of errors.
PAPER = {
    192: {"imagenet/top1": 75.8, "imagenet_a/top1": 11.0, "imagenet_r/top1": 39.8, "corruptions/mean_error": 50.1},
    384: {"imagenet/top1": 83.0, "imagenet_a/top1": 27.5, "imagenet_r/top1": 48.8, "corruptions/mean_error": 35.8},
    768: {"imagenet/top1": 85.0, "imagenet_a/top1": 43.0, "imagenet_r/top1": 54.6, "corruptions/mean_error": 32.7},
}


@dataclasses.dataclass
class Sets:
    """What is measured on: ImageFolder trees, if not what the model's own stage had."""

    data: str = ""  # holds train/ and val/ (or test/)
    imagenet_a: str = ""
    imagenet_r: str = ""
    imagenet_c: str = ""  # holds <corruption>/<severity>/
    direct: bool = False  # corruptions that are made: on the evaluation's own crops, uncompressed
    val_fraction: float | None = None  # of trees without splits
    on_bad_image: str | None = None
    per_class: int | None = None  # measure on so many images of each class only
    bank_per_class: int | None = None  # and let the probes learn from so many
    ratios: tuple[float, ...] | None = None  # sizes of images, of a model that segments
    flip: bool = False  # and their mirror images


@dataclasses.dataclass
class Subject:
    """A finished model, as its folder says; a converted one has no `training` data and no `evals` of its own."""

    name: str
    model: Encoder
    variables: Variables
    untrained: list[str]
    training: Data | None
    evals: dict[str, Eval]
    preprocessing: dict[str, Any]  # in evaluation: fields of `Data`
    classes: list[str] | None = None  # what the outputs of its head are called, where that is known
    pool: Pool | None = None  # the token that its features are; None: what the encoder says
    pixels: Predict | None = None  # its logits of pixels, if it has a head for them
    masks: Masks | None = None  # whose classes these are


def evaluate(subject: Subject, suite: str, sets: Sets, mesh: jax.sharding.Mesh, out: Path) -> dict[str, Any]:
    """Runs `suite` on a finished model; writes into `out` after each measure.

    Returns {"checkpoint", "model", "results": {"<eval>/<metric>": value}, "paper": TinyMIM's values, if any}.
    Raises InputError if data is missing, or the model has no head where one is needed.
    """
    model = subject.model
    variables = jax.device_put(subject.variables, replicated(mesh))
    clean, bank = data_sets(subject, sets, suite in ("probe", "all"))
    chosen = evals(suite, subject, clean, bank, sets)
    context = Context(mesh, predict_of(subject, clean), model, classes=subject.classes)
    of_pixels = dataclasses.replace(context, predict=subject.pixels)
    evaluators = {  # what is missing is said first
        name: cfg.build(of_pixels if cfg.needs_pixels else context) for name, cfg in chosen.items()
    }
    storage.check_writable(out)
    notes = check_names(chosen, model, subject.classes)
    notes += dict.fromkeys(note for e in evaluators.values() for b in e.passes.values() for note in b.source.notes)
    print("".join(f"note: {note}\n" for note in notes), end="", flush=True)
    paper = PAPER.get(model.width_of(model.depth), {}) if model.num_classes == 1000 else {}
    if not sets.imagenet_c:  # corruptions made here are not the stored ones
        paper = {name: value for name, value in paper.items() if not name.startswith("corruptions/")}
    given = {field: value for field, value in dataclasses.asdict(sets).items() if value not in ("", None, False)}
    asked = ", ".join(f"--{field}={value}" for field, value in {"suite": suite, **given}.items())
    report = {"checkpoint": subject.name, "model": codec.to_dict(model), "results": {}, "paper": paper}
    report["notes"] = [f"measured with {asked}", *notes]
    for name, evaluator in evaluators.items():
        finish = Measurement({name: evaluator}).run(variables, {}, title=name)
        print(f"{name}: all images seen; the result is being computed", file=sys.stderr, flush=True)
        found = finish()
        report["results"] |= scalars(found)
        save_arrays(found[name], out / f"{name}.npz")
        write(report, out)
        print(f"{name}: done", flush=True)
    return report


def data_sets(subject: Subject, sets: Sets, probes: bool = True) -> tuple[Data, Data]:
    """The clean evaluation set and the training images, which `probes` learn from, both for evaluation."""
    if subject.training is not None:
        train = dataclasses.replace(subject.training, transform="eval", rand_augment="", repeats=1)
        own = [e.data for e in subject.evals.values() if _is_clean(e)]
        clean = own[0] if own else _held_out(train)
    else:
        train = pixels(subject) if probes else dataclasses.replace(pixels(subject), val_fraction=1.0)  # it learnt none
        clean = dataclasses.replace(train, split="val")
        if not sets.data and not (sets.imagenet_c or sets.imagenet_a or sets.imagenet_r):
            raise InputError(
                f"{subject.name} was converted and names no data: give --data=PATH, a tree with train/ and val/"
            )
    if sets.data:
        train, clean = _in_tree(train, sets.data, "train"), _in_tree(clean, sets.data, "val")
    chosen = {f: value for f in ("val_fraction", "on_bad_image") if (value := getattr(sets, f)) is not None}
    train, clean = (dataclasses.replace(data, **chosen) for data in (train, clean))
    if sets.per_class is not None:
        clean = dataclasses.replace(clean, per_class=sets.per_class, num_examples=None)
    if sets.bank_per_class is not None:
        train = dataclasses.replace(train, per_class=sets.bank_per_class, num_examples=None)
    alike = {field: getattr(clean, field) for field in ("crop_pct", "crop_mode", "interpolation")}
    return clean, dataclasses.replace(train, **alike)


def pixels(subject: Subject) -> Data:
    """How evaluation makes images its input, whichever they are."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in subject.preprocessing.items()}
    return Data("folder", transform="eval", image_size=subject.model.image_size, masks=subject.masks, **fields)


def _is_clean(cfg: Eval) -> bool:
    """Whether an eval of a stage reads the plain evaluation set."""
    is_other = (isinstance(cfg, Classification) and cfg.subset) or (isinstance(cfg, Corruptions) and cfg.stored)
    return not is_other and not cfg.data.corruption


def _held_out(train: Data) -> Data:
    """The evaluation set beside the training set of a stage that has no evals."""
    splits = {"digits": "test", "scenes": "test", "tfds": "validation" if train.name == "imagenet2012" else "test"}
    data = dataclasses.replace(train, num_examples=None, per_class=None)
    if train.source in ("folder", "pairs"):
        return _in_tree(data, train.path, "val")
    return dataclasses.replace(data, split=splits.get(train.source, "val"))


def _in_tree(data: Data, path: str, split: str) -> Data:
    return dataclasses.replace(in_folder(data, path, split), source="pairs" if data.masks else "folder")


def in_folder(data: Data, path: str, split: str = "", per_class: int | None = None) -> Data:
    """The images of a folder, or of one of its splits, made as those of `data`."""
    fields = {"source": "folder", "path": path, "split": split, "num_examples": None, "per_class": per_class}
    return dataclasses.replace(data, **fields)


def check_names(chosen: dict[str, Eval], model: Encoder, classes: list[str] | None) -> list[str]:
    """How labels find the outputs of the head, which are called `classes`.

    Raises InputError if the data's are not those of the head, or of the probes' other set, as far as names tell.
    """
    notes = []
    for cfg in chosen.values():
        for pair in cfg.same_classes(None):
            check_same_classes(*pair)
        if isinstance(cfg, Classification) and not cfg.subset:
            where = f"{cfg.data.path}/{cfg.data.split}"
            notes.append(labels.match(classes, open_source(cfg.data).classes, model.num_classes, where)[1])
        if cfg.needs_pixels and classes and (own := open_source(cfg.data).classes):
            notes.append(labels.order(classes, own, cfg.data.path or cfg.data.source)[1])
    return notes


def _name_of(data: Data) -> str:
    """What results on `data` are called."""
    if subsets.is_imagenet(open_source(data).classes, data.name):
        return "imagenet"
    name = re.sub(r"[^\w.+-]", "_", data.title())
    return f"{name}_" if name in {"corruptions", "knn", "logistic", "imagenet_a", "imagenet_r"} else name


def evals(suite: str, subject: Subject, clean: Data, bank: Data, sets: Sets) -> dict[str, Eval]:
    """What `suite` measures; raises InputError if it needs a head that is not there."""
    model = subject.model
    if suite not in SUITES:
        raise InputError(f"--suite={suite}: unknown; choose one of {', '.join(SUITES)}")
    if suite == "segmentation" and subject.pixels is None:
        raise InputError("--suite=segmentation needs a model with a head for pixels: train one with task 'segment'")
    if not model.num_classes and suite in ("imagenet", "robust"):
        other = "it segments: use segmentation" if subject.pixels else "fine-tune it, or use probe"
        raise InputError(f"--suite={suite} needs a model with a head for whole images, and this one has none: {other}")
    for name in ("imagenet_a", "imagenet_r", "imagenet_c"):
        if path := getattr(sets, name):
            if suite not in ("robust", "all"):
                raise InputError(f"--{name} is measured by --suite=robust or all, not {suite}; choose one")
            storage.check(storage.path(path))
            if not storage.path(path).is_dir():
                raise InputError(f"--{name}={path}: no such folder")
            if model.num_classes != 1000:
                raise InputError(f"--{name} needs a model of ImageNet's 1000 classes; this one has {model.num_classes}")
    chosen: dict[str, Eval] = {}
    if subject.pixels and suite in ("segmentation", "all"):
        chosen["segmentation"] = Segmentation(clean, flip=sets.flip, ratios=sets.ratios or (1.0,))
    elif sets.flip or sets.ratios:
        raise InputError(
            "--ratios and --flip are for the segmentation of a model with a head for pixels; leave them out"
        )
    if suite in ("imagenet", "all") and model.num_classes:
        chosen[_name_of(clean)] = Classification(clean)
    if suite in ("robust", "all") and model.num_classes:
        for name in ("imagenet_a", "imagenet_r"):
            if path := getattr(sets, name):
                data = in_folder(clean, str(Path(path).parent), Path(path).name, clean.per_class)
                chosen[name] = Classification(data, subset=name)
        stored = bool(sets.imagenet_c)
        only_others = clean.source == "folder" and not clean.path and not stored  # --imagenet_a or --imagenet_r alone
        if not only_others:
            data = in_folder(clean, sets.imagenet_c, per_class=clean.per_class) if stored else clean
            chosen["corruptions"] = Corruptions(data, stored=stored, published=not (stored or sets.direct))
    if suite == "probe" or (suite == "all" and not subject.pixels):
        try:
            k = tuple(k for k in Knn(clean, bank).k if k <= len(open_source(bank))) or (1,)
        except InputError as error:
            raise InputError(f"{error}; probes learn from it, --suite=imagenet and robust do without") from error
        chosen |= {"knn": Knn(clean, bank, k=k), "logistic": Logistic(clean, bank)}
    return chosen


def features_block(subject: Subject) -> int | None:
    """The block before the one that distillation left half trained; None: the features are the last block's."""
    half = subject.model.half_trained(flatten(subject.variables["params"]), subject.untrained)
    return None if half is None else max(half - 1, 1)


def predict_of(subject: Subject, data: Data) -> Predict:
    """Logits, if features are of the last block, and features."""
    block = features_block(subject)

    def predict(variables: Variables, _: Any, batch: Any) -> Outputs:
        images = normalize(to_float(batch["image"]), data.mean, data.std)
        return subject.model.outputs(variables, images, block, subject.pool)

    return predict


def table(report: dict[str, Any]) -> str:
    """A Markdown table of the results, how many images they are of, and the paper's numbers where it has any."""
    found, paper = report["results"], report["paper"]
    names = [name for name in found if not re.search(r"/images$|_[1-5]$", name)]
    images = {name: found.get(re.sub(r"/.*", "/images", name)) for name in names}
    columns = {
        "measure": names,
        "here": [f"{found[name]:.2f}" for name in names],
        "images": [f"{count:,.0f}" if count else "" for count in images.values()],
        "TinyMIM (paper)": [str(paper.get(name, "")) for name in names],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    results = markdown.table(list(columns), zip(*columns.values(), strict=True))
    notes = ["Percent."]
    if any(name.startswith("corruptions/") for name in report["results"]):
        notes = [
            "Percent. corruptions/*: top-1 error, a mean over severities; mean_error: their plain mean, the paper's",
            "mCE; mce, of ImageNet's classes alone: each error over AlexNet's.",
        ]
    notes += [f"{note[:1].upper()}{note[1:]}." for note in report.get("notes", ())]
    return "\n".join([f"# {report['checkpoint']}", "", results, "", *notes, ""])


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes eval.json and eval.md into `folder`."""
    write_json(folder / "eval.json", report)
    (folder / "eval.md").write_text(table(report))
