r"""Time and memory of the evaluation, against the reference implementations, on synthetic predictions.

    python tools/benchmark_evaluation.py --against pycocotools --images 5000 --classes 80 --detections 100
    python tools/benchmark_evaluation.py --against lvis --images 2000 --classes 1203 --detections 300
    python tools/benchmark_evaluation.py --memory --images 20000 --classes 65 --detections 300

What is timed, on the same boxes, in one process, the one after the other:
- ovdet2: reading predictions.jsonl, and all figures of all classes. The ground truth is in memory.
- the reference: from a list of result dicts in memory through loadRes or LVISResults, evaluate, accumulate, summarize.
  Its ground truth is in memory and indexed; that the results would have to be read from a file first is left out, which
  favours the reference.
The figures of both are compared as well. ``lvis`` is installed with "pip install --no-deps lvis==0.5.3".

``--memory`` measures the peak of the resident memory of a process that does what is timed above, over what it holds
once the ground truth is loaded.
"""

import argparse
import contextlib
import io
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ovdet2.data.datasets.coco_json import load_ov_json
from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.register import all_novel
from ovdet2.errors import DataError, SetupError, UsageError, exit_on_error
from ovdet2.evaluation.coco_ap import mean_of
from ovdet2.evaluation.columns import Truth
from ovdet2.evaluation.evaluation import measure
from ovdet2.evaluation.prediction_files import MERGED, PredictionWriter, merge
from ovdet2.evaluation.predictions import read_predictions
from ovdet2.io.files import read_json, write_json

WIDTH, HEIGHT = 640, 480
TRUTH = "truth.json"
OBJECTS = {"ov_coco": 7.3, "ov_lvis": 12.0}  # per image, as in COCO and LVIS
TOLERANCE = 1e-6  # of fractions


def main(argv=None):
    """Command line; returns {"ratio": ..., "seconds": ...} or {"megabytes": ...}."""
    args = parse_args(argv)
    metric = "ov_lvis" if args.against == "lvis" else "ov_coco"
    if args.measured:
        return peak_memory(Path(args.measured), metric, args.detections)
    with tempfile.TemporaryDirectory(prefix="ovdet2-") as folder:
        write_set(Path(folder), metric, args)
        if args.memory:
            # A process of its own: this one has held the generated set.
            command = [sys.executable, __file__, "--memory", "--measured", folder, "--detections", str(args.detections)]
            subprocess.run([*command, "--against", args.against], check=True)
            return None
        return compare(Path(folder), metric, args)


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("pycocotools", "lvis"), default="pycocotools", help="also whose rules")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--skew", type=float, default=1.0, help="class k is as frequent as 1 / k to this power")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.images, args.classes, args.detections) < 1:
        raise UsageError("--images, --classes and --detections must be at least 1.")
    return args


def write_set(folder, metric, args):
    """Write truth.json and predictions.jsonl; a third of the detections are near an object, with better scores."""
    random = np.random.default_rng(args.seed)
    shares = 1.0 / np.arange(1, args.classes + 1) ** args.skew
    shares /= shares.sum()
    images, annotations, writer = [], [], PredictionWriter(folder, 0)
    for image_id in range(1, args.images + 1):
        boxes, classes = _random_boxes(random, max(1, random.poisson(OBJECTS[metric])), shares)
        image = {"id": image_id, "file_name": f"{image_id}.jpg", "width": WIDTH, "height": HEIGHT}
        if metric == "ov_lvis":
            absent = np.setdiff1d(random.integers(1, args.classes + 1, 8), classes)
            image |= {"neg_category_ids": absent.tolist(), "not_exhaustive_category_ids": classes[:1].tolist()}
        images.append(image)
        for box, category_id in zip(boxes, classes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        writer.write({"image_id": image_id, **_random_detections(random, boxes, classes, shares, args.detections)})
    writer.close()
    merge(folder, [writer.token], range(1, args.images + 1))
    categories = [{"id": k, "name": f"class {k}", "frequency": "fcr"[k % 3]} for k in range(1, args.classes + 1)]
    write_json(folder / TRUTH, {"info": {}, "images": images, "annotations": annotations, "categories": categories})


def _random_boxes(random, count, shares):
    """(boxes XYWH [count, 4] within the image, classes [count] from 1)."""
    size = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
    corner = random.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    return np.concatenate([corner, size], axis=1).round(2), random.choice(len(shares), count, p=shares) + 1


def _random_detections(random, boxes, classes, shares, count):
    """A record's entries; float32 values, as a model gives them."""
    near = random.integers(0, len(boxes), count // 3)
    others, other_classes = _random_boxes(random, count - len(near), shares)
    moved = boxes[near] + random.normal(0, 0.07, (len(near), 4)) * np.tile(boxes[near, 2:], 2)
    found = np.concatenate([moved, others]).astype(np.float32)
    found[:, 2:] = found[:, :2] + found[:, 2:].clip(1)
    near_classes = np.where(random.random(len(near)) < 0.7, classes[near], random.permutation(classes[near]))
    scores = np.concatenate([random.beta(3, 3, len(near)), random.beta(1, 6, len(others))]).astype(np.float32)
    best = np.argsort(-scores, kind="stable")
    return {
        "category_ids": np.concatenate([near_classes, other_classes])[best].tolist(),
        "scores": scores[best].astype(float).tolist(),
        "boxes_xyxy": found[best].astype(float).tolist(),
    }


def compare(folder, metric, args):
    """Time both on the set in ``folder``, print, and compare the figures."""
    truth, split = _truth_of(folder, metric)
    results = _result_dicts(folder)
    ours, our_seconds, our_cpu = _timed(lambda: _ours(folder, truth, split, metric, args.detections))
    reference = _pycocotools if metric == "ov_coco" else _lvis
    theirs, their_seconds, their_cpu = reference(folder, results, args.detections)
    print(
        f"{args.images} images x {args.detections} detections, {args.classes} classes (skew {args.skew}): "
        f"{len(results)} detections, {len(truth.ann_ids)} objects"
    )
    print(f"{'':<14}{'wall s':>10}{'CPU s':>10}{'AP':>12}{'AP50':>12}{'APs':>12}")
    for name, seconds, cpu, figures in (
        ("ovdet2", our_seconds, our_cpu, ours),
        (args.against, their_seconds, their_cpu, theirs),
    ):
        shown = "".join(f"{figures[key]:>12.7f}" for key in ("AP", "AP50", "APs"))
        print(f"{name:<14}{seconds:>10.2f}{cpu:>10.2f}{shown}")
    print(f"{args.against} / ovdet2: {their_seconds / our_seconds:.1f}x wall, {their_cpu / our_cpu:.1f}x CPU")
    for key, value in theirs.items():
        if not (abs(ours[key] - value) < TOLERANCE or (math.isnan(ours[key]) and math.isnan(value))):
            raise DataError(f"{key} differs: {ours[key]} here, {value} in {args.against}.")
    return {"ratio": their_seconds / our_seconds, "seconds": our_seconds}


def peak_memory(folder, metric, limit):
    """Print and return the peak of resident memory above the ground truth, in MB."""
    truth, split = _truth_of(folder, metric)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    figures = _ours(folder, truth, split, metric, limit)
    peak = _memory("VmHWM")
    detections = len(read_predictions(folder / MERGED).detections)
    print(
        f"{len(truth.images)} images, {detections} detections, {len(split.names)} classes: {before:.0f} MB with the "
        f"libraries and the ground truth, peak {peak:.0f} MB: {peak - before:.0f} MB above; AP {figures['AP']:.4f}"
    )
    return {"megabytes": peak - before}


def _truth_of(folder, metric):
    categories = read_json(folder / TRUTH)["categories"]
    split = frequency_split(categories) if metric == "ov_lvis" else all_novel("synthetic", categories, folder / TRUTH)
    records = load_ov_json(folder / TRUTH, folder, split, federated=metric == "ov_lvis")
    return Truth.of(records, split), split


def _ours(folder, truth, split, metric, limit):
    """Means over all classes, as fractions."""
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


def _pycocotools(folder, results, limit):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / TRUTH))

        def run():
            engine = COCOeval(truth, truth.loadRes(results), "bbox")
            engine.params.maxDets = [1, 10, limit]
            engine.evaluate()
            engine.accumulate()
            if limit == 100:
                engine.summarize()  # knows no other limit
            return engine.eval

        found, seconds, cpu = _timed(run)
    precision = found["precision"][..., -1]
    values = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    values |= {f"AP{size}": precision[..., area] for area, size in ((1, "s"), (2, "m"), (3, "l"))}
    values[f"AR@{limit}"] = found["recall"][..., 0, -1]
    return {name: float(v[v > -1].mean()) if (v > -1).any() else math.nan for name, v in values.items()}, seconds, cpu


def _lvis(folder, results, limit):
    try:
        from lvis import LVIS, LVISEval, LVISResults
    except ImportError as error:
        raise SetupError(f"{error}: pip install --no-deps lvis==0.5.3") from None
    if not hasattr(np, "float"):
        np.float = float  # its last release is older than NumPy 1.24
    truth = LVIS(str(folder / TRUTH))

    def run():
        engine = LVISEval(truth, LVISResults(truth, results, max_dets=limit), "bbox")
        engine.run()
        return engine.results

    found, seconds, cpu = _timed(run)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
    return {name: float(found[name]) if found[name] > -1 else math.nan for name in names}, seconds, cpu


def _timed(function):
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _memory(field):
    """A line of /proc/self/status in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    with exit_on_error():
        main()
