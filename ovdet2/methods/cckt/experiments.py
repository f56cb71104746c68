"""CCKT-Det's experiments: evaluation of one detector with several priors; training with several teachers."""

import functools
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ovdet2.command_line import add_config_file, add_overrides
from ovdet2.config import load_config
from ovdet2.data.records import load_records
from ovdet2.errors import UsageError
from ovdet2.experiments import Artefact, Column, Entry, Experiment, Plan
from ovdet2.experiments.state import text_hash
from ovdet2.io.files import atomic_path
from ovdet2.methods.cckt.sample import required_split
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.quality import quality
from ovdet2.priors.truth import Truth, truth_of

FIGURES = {f"{group} AP50": Column(("bbox", f"AP50-{group}")) for group in ("novel", "base", "all")}
_NO_CLAIM = ("TEST.EXPECTED_RESULTS", "[]")


def build_prior_sweep(args: Namespace) -> Experiment:
    """The paper's Table 6: prior files x thresholds rho x lengths L, with one detector.

    Raises:
        UsageError: the configuration has no semantic priors, or MODEL.WEIGHTS is not set.
    """
    cfg = load_config(args.config_file, args.opts)
    if not (cfg.MODEL.CCKT.ENABLED and cfg.MODEL.CCKT.PRIORS):
        raise UsageError(f"{args.config_file} has no semantic priors: set MODEL.CCKT.PRIORS to True.")
    if not cfg.MODEL.WEIGHTS:
        raise UsageError("the detector has no weights: end the command with MODEL.WEIGHTS <file>.")
    truth = functools.cache(_truth)
    artefacts, entries = {}, {}
    for name, path in _named(args.priors).items():
        artefacts[name] = Artefact("concept prior", "MODEL.CCKT.PRIOR_FILE", str(path.resolve()))
        for rho in args.rho:
            for top in args.top:
                chosen = ("MODEL.CCKT.PRIOR_THRESHOLD", str(rho), "MODEL.CCKT.PRIOR_TOP", str(top))
                entry = f"{name}_rho{rho:g}_top{top}"
                entries[entry] = Entry(
                    name,
                    args.config_file,
                    (*args.opts, *_NO_CLAIM, "TEST.HTML_REPORT", "False", *chosen),
                    needs=(name,),
                    weights=cfg.MODEL.WEIGHTS,
                    folder=entry,
                    facts=functools.partial(prior_facts, name, truth),
                )
    columns = {
        "kind": Column(("facts", "kind"), str),
        "rho": Column(("facts", "rho"), "{:g}".format),
        "L": Column(("facts", "top"), str),
        "words": Column(("facts", "words")),
        "novel P / R": Column(("facts", "novel"), _percents),
        "base P / R": Column(("facts", "base"), _percents),
    }
    pictures = {"curve.png": draw_curve}
    return Experiment(entries, columns | FIGURES, artefacts, heading="prior", shared_detector=True, pictures=pictures)


def prior_facts(name: str, truth: Callable[[str], dict[int, Truth]], cfg: CfgNode) -> dict[str, Any]:
    """Quality of the concept prior of a configuration.

    Args:
        name: name of the prior.
        truth: function from the name of a data set to the annotated words of its images.
        cfg: configuration with the prior, rho, L and the data set.

    Returns:
        "prior" (``name``), "kind", "content_sha256", and those of :func:`~ovdet2.priors.quality.quality`: "rho", "top",
        "words", and "base", "novel", "all" as [precision, recall].
    """
    cckt, [dataset] = cfg.MODEL.CCKT, cfg.DATASETS.TEST
    priors = ConceptPriors(cckt.PRIOR_FILE)
    [judged] = quality(priors, truth(dataset), required_split(dataset), [cckt.PRIOR_THRESHOLD], [cckt.PRIOR_TOP])
    judged["words"] = float(judged["words"])
    return judged | {"prior": name, "kind": priors.kind, "content_sha256": priors.manifest["content_sha256"]}


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot novel AP50 against the novel recall of the priors: one point per row, one line per file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="novel recall of the priors, percent", ylabel="novel AP50")
    for name in dict.fromkeys(row["prior"] for row in rows):
        points = sorted((100 * (r["novel"][1] or 0.0), r["AP50-novel"]) for r in rows if r["prior"] == name)
        axes.plot(*zip(*points), marker="o", label=name)
    if rows:
        axes.legend()
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def build_teacher_sweep(args: Namespace) -> Experiment:
    """The paper's Table 5: train with several teachers, each for crop embeddings, word embeddings and priors.

    Raises:
        UsageError: the configuration does not use priors and contrast.
    """
    cfg = load_config(args.config_file, args.opts)
    if not (cfg.MODEL.CCKT.ENABLED and cfg.MODEL.CCKT.PRIORS and cfg.MODEL.CCKT.CONTRAST != "none"):
        raise UsageError(
            f"{args.config_file} does not use the priors and the contrast of CCKT-Det, so the teacher has little effect."
        )
    [train], [test] = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    artefacts, entries = {}, {}
    for teacher in args.teachers:
        architecture, pretrained = teacher.split(":")
        named = ("--architecture", architecture, "--pretrained", pretrained)
        folder, cache, priors = teacher.replace(":", "_").replace("/", "_"), f"{teacher} cache", f"{teacher} priors"
        command = ("ovdet2.programs.build_region_cache", "--config-file", args.config_file, "--dataset", train)
        command = (*command, "--boxes", "annotations", "--output", "{path}", *named)
        artefacts[cache] = Artefact(
            f"region cache of {teacher}",
            "MODEL.CCKT.REGION_CACHE",
            f"{folder}/annotation_cache",
            command,
            _hashes(teacher=teacher, dataset=train),
        )
        command = ("ovdet2.programs.build_concept_priors", "--backend", "clip", "--dataset", test, "--output", "{path}")
        command = (*command, "--tiles", str(cfg.MODEL.CCKT.PRIOR_TILES), *named)
        artefacts[priors] = Artefact(
            f"concept prior of {teacher}",
            "MODEL.CCKT.PRIOR_FILE",
            f"{folder}/priors.safetensors",
            command,
            _hashes(teacher=teacher, dataset=test, tiles=cfg.MODEL.CCKT.PRIOR_TILES),
        )
        chosen = ("MODEL.TEACHER.ARCHITECTURE", architecture, "MODEL.TEACHER.PRETRAINED", pretrained)
        entries[teacher] = Entry(
            teacher,
            args.config_file,
            (*args.opts, *_NO_CLAIM, *chosen),
            needs=(cache, priors),
            folder=f"{folder}/run",
        )
    return Experiment(entries, FIGURES, artefacts, heading="teacher", accept_unmarked=True)


def _named(paths: Sequence[str]) -> dict[str, Path]:
    """{name: path} of files. The name is the stem, with the folder's name if two files have the same stem."""
    files = {Path(path).resolve(): Path(path) for path in paths}
    stems = [path.stem for path in files.values()]
    return {
        path.stem if stems.count(path.stem) == 1 else f"{full.parent.name}_{path.stem}": path
        for full, path in files.items()
    }


def _hashes(**facts: Any) -> dict[str, Callable[[], str]]:
    return {name: functools.partial(text_hash, str(fact)) for name, fact in facts.items()}


def _truth(dataset: str) -> dict[int, Truth]:
    return truth_of(load_records([dataset], "DATASETS.TEST", False), required_split(dataset))


def _percents(pair: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in pair)


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    return lambda text: [kind(number) for number in text.split(",")]


def _teacher(text: str) -> str:
    if text.count(":") != 1 or text.strip(":") != text:
        raise ArgumentTypeError(f"{text} is not ARCHITECTURE:PRETRAINED")
    return text


def _add_priors(parser: ArgumentParser) -> None:
    add_config_file(parser, purpose="of the detector")
    parser.add_argument("--priors", nargs="+", required=True, help="files of ovdet2 prior")
    parser.add_argument("--rho", type=_numbers(float), default=[0.7], help="thresholds, 0.7,0.9")
    parser.add_argument("--top", type=_numbers(int), default=[6], help="lengths L, 6,12")
    add_overrides(parser)


def _add_teachers(parser: ArgumentParser) -> None:
    add_config_file(parser, purpose="of all trainings")
    parser.add_argument("--teachers", nargs="+", required=True, type=_teacher, metavar="ARCHITECTURE:PRETRAINED")
    add_overrides(parser)


PLANS = {
    "priors": Plan(
        "Evaluate one trained CCKT-Det under many priors. Only the priors change, not the weights. Writes "
        "table.md (AP50, and precision and recall of the priors), results.json, and curve.png (novel AP50 against the "
        "novel recall of the priors). If the weights or the configuration change, all rows are evaluated again.",
        build_prior_sweep,
        _add_priors,
    ),
    "teachers": Plan(
        "Train and evaluate CCKT-Det with several teachers of open_clip. For each: the region cache of annotated boxes, "
        "the CLIP priors of the test set, the training, all below <output>/<teacher>.",
        build_teacher_sweep,
        _add_teachers,
    ),
}
