r"""Time and memory of the evaluation, against the reference implementations, on synthetic predictions.

    ovdet2 bench evaluation --against pycocotools --images 5000 --classes 80 --detections 100
    ovdet2 bench evaluation --against lvis --images 2000 --classes 1203 --detections 300
    ovdet2 bench evaluation --memory --images 20000 --classes 65 --detections 300

What is timed, on the same boxes:
- ovdet2: reading predictions.jsonl, and all figures of all classes. The ground truth is in memory.
- the reference: from a list of result dicts in memory through loadRes or LVISResults, evaluate, accumulate, summarize.
  Its ground truth is in memory and indexed; the time to read results from a file is not included, which
  favours the reference.
The figures of both are compared as well. ``lvis`` is installed with "pip install --no-deps lvis==0.5.3". The ratio is to
ovdet2.

``--memory`` measures ovdet2 only: the peak resident memory of a process during the timed work, above its memory after
the ground truth is loaded.
"""

import argparse
import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ovdet2.bench.evaluation_set import TRUTH, write_set
from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison, positive
from ovdet2.bench.turns import Elapsed
from ovdet2.data.datasets.coco_json import load_ov_json
from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.register import all_novel
from ovdet2.errors import DataError, SetupError
from ovdet2.evaluation.coco_ap import mean_of
from ovdet2.evaluation.columns import Truth
from ovdet2.evaluation.evaluation import measure
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.predictions import read_predictions
from ovdet2.io.files import read_json

TOLERANCE = 1e-6  # of fractions
OPTIONS = {
    "--against": {
        "choices": ("pycocotools", "lvis"),
        "default": "pycocotools",
        "help": "reference, and its evaluation rules",
    },
    "--images": {"type": positive, "default": 300},
    "--classes": {"type": positive, "default": 80},
    "--detections": {"type": positive, "default": 100, "help": "per image"},
    "--skew": {"type": float, "default": 1.0, "help": "class k is as frequent as 1 / k to this power"},
    "--seed": {"type": int, "default": 0},
    "--memory": {"action": "store_true", "help": "measure memory instead of time"},
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One set, two programs; with --memory ovdet2 only."""
    metric = "ov_lvis" if args.against == "lvis" else "ov_coco"
    if not (args.folder / TRUTH).is_file():
        write_set(args.folder, metric, args)
    if args.memory:
        args.turns = 0
    else:
        args.no_memory = True
    detections = len(read_predictions(args.folder / MERGED).detections) if not args.peak else 0
    case = Case({"images": str(args.images), "detections": str(detections), "classes": str(args.classes)})
    reference = _pycocotools if metric == "ov_coco" else _lvis
    candidates = [Candidate("ovdet2", lambda: _truth_of(args.folder, metric),
                            lambda loaded, _: _ours(args.folder, loaded, metric, args.detections))]  # fmt: skip
    if not args.memory:
        candidates.append(
            Candidate(args.against, lambda: reference(args.folder, args.detections), lambda run, _: run())
        )
    yield Comparison(candidates, [case], title=f"skew {args.skew}", report=compare_figures)


def compare_figures(times: Mapping[str, Sequence[Elapsed]]) -> None:
    """Print the figures of both.

    Raises:
        DataError: they differ.
    """
    figures = {name: mine[-1].value for name, mine in times.items()}
    (_, ours), (reference, theirs) = figures.items()
    for name, values in figures.items():
        print(f"{name}: {', '.join(f'{key} {values[key]:.7f}' for key in ('AP', 'AP50', 'APs'))}")
    for key, value in theirs.items():
        if not (abs(ours[key] - value) < TOLERANCE or (math.isnan(ours[key]) and math.isnan(value))):
            raise DataError(f"{key} differs: {ours[key]} here, {value} in {reference}.")


def _truth_of(folder, metric):
    categories = read_json(folder / TRUTH)["categories"]
    split = frequency_split(categories) if metric == "ov_lvis" else all_novel("synthetic", categories, folder / TRUTH)
    records = load_ov_json(folder / TRUTH, folder, split, federated=metric == "ov_lvis")
    return Truth.of(records, split), split


def _ours(folder, loaded, metric, limit):
    """Means over all classes, as fractions; ``loaded`` is of :func:`_truth_of`."""
    truth, split = loaded
    detections = read_predictions(folder / MERGED).detections
    per_class = measure(truth, detections, split, metric, limit)["bbox"]
    means = {name: mean_of(figures[name] for figures in per_class.values()) / 100 for name in per_class[1]}
    for group, ids in split.groups.items():
        means[f"AP{group}"] = mean_of(per_class[category_id]["AP"] for category_id in ids) / 100
    return means


def _result_dicts(folder):
    detections = read_predictions(folder / MERGED).detections
    boxes = detections.boxes_xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (detections.image_ids, detections.category_ids, boxes, detections.scores.astype(np.float64))
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row)) for row in zip(*(column.tolist() for column in columns))]


def _pycocotools(folder, limit):
    """A function that evaluates the set and gives its means."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    silent = contextlib.redirect_stdout(io.StringIO())
    results = _result_dicts(folder)
    with silent:
        truth = COCO(str(folder / TRUTH))

    def run():
        with silent:
            engine = COCOeval(truth, truth.loadRes(results), "bbox")
            engine.params.maxDets = [1, 10, limit]
            engine.evaluate()
            engine.accumulate()
            if limit == 100:
                engine.summarize()  # supports no other limit
        precision = engine.eval["precision"][..., -1]
        values = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
        values |= {f"AP{size}": precision[..., area] for area, size in ((1, "s"), (2, "m"), (3, "l"))}
        values[f"AR@{limit}"] = engine.eval["recall"][..., 0, -1]
        return {name: float(v[v > -1].mean()) if (v > -1).any() else math.nan for name, v in values.items()}

    return run


def _lvis(folder, limit):
    """As :func:`_pycocotools`."""
    try:
        from lvis import LVIS, LVISEval, LVISResults
    except ImportError as error:
        raise SetupError(f"{error}: pip install --no-deps lvis==0.5.3") from None
    if not hasattr(np, "float"):
        vars(np)["float"] = float  # its last release is older than NumPy 1.24
    truth, results = LVIS(str(folder / TRUTH)), _result_dicts(folder)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")

    def run():
        engine = LVISEval(truth, LVISResults(truth, results, max_dets=limit), "bbox")
        engine.run()
        return {name: float(engine.results[name]) if engine.results[name] > -1 else math.nan for name in names}

    return run


main = Benchmark("ovdet2.bench.evaluation", __doc__, OPTIONS, plan, turns=1, warm_up=0, device=False).main

if __name__ == "__main__":
    main()
