r"""Evaluate the detections of any tool, without a model: novel, base and all classes, report.json and report.html.

    ovdet2 eval --predictions coco_instances_results.json --dataset ov_coco_val_all --output output/theirs
    # what its training saw, and a comparison with a report of ovdet2
    ovdet2 eval --predictions theirs.json --dataset ov_coco_val_all --output output/theirs --setting VW \
        --seen boxes='COCO, 48 base classes' captions=CC3M --compare output/ovcoco/vild_r50/inference/ov_coco_val_all
    # boxes with words, but without scores: precision and recall, or scores from a CLIP
    ovdet2 eval --predictions spoken.json --dataset ov_coco_val_all --output output/spoken --without-ap
    ovdet2 eval --predictions spoken.json --dataset ov_coco_val_all --output output/rescored \
        --rescore --architecture ViT-B-32-quickgelu --pretrained openai

The file is a list of {"image_id", "category_id", "bbox", "score"} as in COCO's results (with "segmentation" for masks, and
"category_name" instead of the id if the tool writes names), or a predictions.jsonl of ovdet2. Ids may be numbers or texts of
digits. Detections of classes that the annotation file has and the split has not compete for the places of an image and are
then ignored, as those of distractor words.

Exit codes: 2 usage, 3 data, 4 environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.command_line import add_config_file, command_parser, dataset_files, keep_inputs, options_but
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split, read_coco_json
from ovdet2.data.datasets.register import require_metric
from ovdet2.errors import DataError, UsageError, counted, exit_on_error
from ovdet2.evaluation import OpenVocabularyEvaluator, format_table
from ovdet2.evaluation.bootstrap import RESAMPLES
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.columns import Detections
from ovdet2.evaluation.evaluation import REPORT, load_truth
from ovdet2.evaluation.foreign_predictions import XYWH, XYXY, ForeignDetections, read_foreign
from ovdet2.evaluation.ov_evaluator import DETECTION_LIMITS
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.setting import UNKNOWN, add_setting_options, stated_setting
from ovdet2.io.files import sha256_file
from ovdet2.report.compare import as_text, compare, require_comparable
from ovdet2.report.html_report import write_html


def main(argv: Sequence[str] | None = None) -> Mapping[str, Mapping[str, float]]:
    """Command line; returns the results."""
    args = parse_args(argv)
    setting = stated_setting(args.setting, args.seen)
    load_config(args.config_file)  # registers its DATASETS.OWN
    if args.dataset not in DatasetCatalog.list() or split_of(args.dataset) is None:
        raise UsageError(f"{args.dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    metric = require_metric(args.dataset)
    written = [args.output / name for name in (MERGED, REPORT, "report.html")]
    keep_inputs("--output", written, options_but(args, "output"), dataset_files(args.dataset))
    truth, split = load_truth(args.dataset)
    metadata = MetadataCatalog.get(args.dataset)
    categories = read_coco_json(metadata.json_file)["categories"]
    names = {category["id"]: category.get("name", str(category["id"])) for category in categories}
    args.output.mkdir(parents=True, exist_ok=True)
    masks = metadata.ov_masks and not args.without_ap
    foreign = read_foreign(args.predictions, truth, split, names, args.boxes, masks, args.output)
    facts: dict[str, Any] = {"predictions": str(args.predictions), "predictions_sha256": sha256_file(args.predictions)}
    if args.rescore:
        foreign, stated = _rescored(args, foreign, truth.images, split)
        facts["scores"] = stated
        if setting.teacher == UNKNOWN and setting.stated is None:
            setting = replace(setting, teacher=f"{args.architecture} {Path(args.pretrained).name} (scores)")
    facts["setting"] = setting.to_report()
    reason = _why_scores_tell_nothing(foreign, args)
    limit = args.detections or DETECTION_LIMITS[metric]
    if reason:
        limit = _most_of_an_image(foreign.detections)
        scores = np.ones_like(foreign.detections.scores)
        foreign = replace(foreign, detections=replace(foreign.detections, scores=scores))
    evaluator = OpenVocabularyEvaluator(
        args.dataset,
        args.output,
        max_detections=limit,
        proposals_per_image=0,
        distractors=sorted(foreign.outside),
        facts=facts,
        resamples=args.bootstrap,
        scores_tell_nothing=reason,
    )
    evaluator.reset()
    evaluator.process_records(records_of(foreign.detections, truth.images, split, limit, bool(foreign.outside)))
    del foreign
    results = evaluator.evaluate()
    assert evaluator.evaluation is not None  # this is the first process
    report = evaluator.evaluation.report
    print(format_table(report))
    write_html(args.output / "report.html", report, truth, evaluator.evaluation.detections, split)
    print(args.output / "report.html")
    if args.compare:
        _print_comparison(args, report)
    return results


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program.

    Raises:
        UsageError: --rescore without a CLIP, with --without-ap, or a number below its least value.
    """
    parser = command_parser("eval", __doc__)
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="detections of all images")
    parser.add_argument("--dataset", required=True, help="registered open-vocabulary data set")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of report.json, report.html and predictions.jsonl"
    )
    parser.add_argument("--boxes", choices=[XYWH, XYXY], default=XYWH, help="form of bbox in the file (xywh)")
    parser.add_argument("--detections", type=int, metavar="N", help="best of an image that count (100; LVIS: 300)")
    parser.add_argument(
        "--without-ap", action="store_true", help="accept missing or equal scores: precision and recall"
    )
    parser.add_argument("--rescore", action="store_true", help="score each box by a CLIP: its probability of the word")
    parser.add_argument("--architecture", default="", help="with --rescore: open_clip architecture")
    parser.add_argument("--pretrained", default="", help="with --rescore: tag, 'embedded' or a weight file")
    parser.add_argument("--templates", default="vild63", help="with --rescore: prompt template set (vild63)")
    parser.add_argument("--device", default="cpu", help="with --rescore: device of the CLIP (cpu)")
    parser.add_argument(
        "--bootstrap", type=int, default=RESAMPLES, metavar="N", help="resamples for intervals of AP (200)"
    )
    parser.add_argument("--compare", type=Path, metavar="REPORT", help="report.json or its folder to compare with")
    add_setting_options(parser)
    add_config_file(parser, required=False, purpose="its DATASETS.OWN are registered")
    args = parser.parse_args(argv)
    if args.rescore and not (args.architecture and args.pretrained):
        raise UsageError("--rescore needs a CLIP: add --architecture and --pretrained.")
    if args.rescore and args.without_ap:
        raise UsageError("--rescore gives scores, --without-ap needs none: remove one of them.")
    if args.bootstrap < 0 or (args.detections is not None and args.detections < 1):
        raise UsageError("--bootstrap must be at least 0 and --detections at least 1: change them.")
    return args


def records_of(
    detections: Detections, images: Mapping[int, Mapping[str, Any]], split: Split, limit: int, outside: bool
) -> Iterator[dict[str, Any]]:
    """The records of predictions.jsonl, one of each image of the data set.

    Args:
        detections: in any order; equal scores of an image keep theirs.
        images: {image id: record}.
        split: detections of other classes compete for the places of an image and are then dropped.
        limit: detections of an image.
        outside: whether there may be such detections; their number is then in each record.
    """
    order = np.lexsort((-detections.scores, detections.image_ids))
    sorted_ids = detections.image_ids[order]
    for image_id, image in images.items():
        start, end = np.searchsorted(sorted_ids, image_id, "left"), np.searchsorted(sorted_ids, image_id, "right")
        best = order[start:end][:limit]
        kept = best[np.isin(detections.category_ids[best], split.category_ids)]
        record: dict[str, Any] = {
            "image_id": image_id,
            "category_ids": detections.category_ids[kept].tolist(),
            "scores": detections.scores[kept].tolist(),
            "boxes_xyxy": detections.boxes_xyxy[kept].tolist(),
        }
        if outside:
            record["distractor_detections"] = len(best) - len(kept)
        masks: Any = detections.masks
        if masks is not None:
            record |= {
                "mask_size": [image["height"], image["width"]],
                "masks": [masks[row]["counts"] for row in kept.tolist()],
            }
        yield record


def _rescored(
    args: argparse.Namespace, foreign: ForeignDetections, images: Mapping[int, Mapping[str, Any]], split: Split
) -> tuple[ForeignDetections, str]:
    """(the detections of the split's classes with a CLIP's scores, a description of the scores)."""
    from ovdet2.evaluation.rescoring import rescore  # slow to import
    from ovdet2.vlm.teacher import Teacher
    from ovdet2.vocabulary import Vocabulary

    detections = foreign.detections
    kept = np.flatnonzero(np.isin(detections.category_ids, split.category_ids))
    masks: Any = detections.masks
    detections = Detections(
        detections.image_ids[kept],
        detections.category_ids[kept],
        detections.scores[kept],
        detections.boxes_xyxy[kept],
        None if masks is None else [masks[row] for row in kept.tolist()],
    )
    teacher = Teacher.load(args.architecture, args.pretrained, args.device)
    vocabulary = Vocabulary.build(split.names, teacher, args.templates, split.base_mask, split.category_ids)
    scores = rescore(teacher, vocabulary.embeddings, images, detections, split)
    dropped = f"; {counted(len(foreign.detections) - len(kept), 'detection')} of other classes dropped"
    stated = (
        f"softmax of {teacher.fingerprint} over the {counted(len(split.names), 'word')} (templates {args.templates}), crops "
        f"at 1x and 1.5x{dropped if foreign.outside else ''}"
    )
    return replace(foreign, detections=replace(detections, scores=scores), outside={}, unscored=""), stated


def _why_scores_tell_nothing(foreign: ForeignDetections, args: argparse.Namespace) -> str:
    """Why there is no AP; "" if the scores order the detections.

    Raises:
        DataError: scores are missing or equal and --without-ap was not given.
        UsageError: it was given, and the scores are neither.
    """
    scores, path = foreign.detections.scores, args.predictions
    missing = int(np.isnan(scores).sum())
    if 0 < missing < len(scores):
        raise DataError(
            f"{path}: {foreign.unscored}: it has no score, and {len(scores) - missing} of {len(scores)} have one: give all or none."
        )
    reason = ""
    if missing:
        reason = f"none of the {counted(missing, 'detection')} has a score"
    elif len(scores) > 1 and scores.min() == scores.max():
        reason = f"all {counted(len(scores), 'detection')} have the score {float(scores[0]):g}"
    if args.without_ap and not reason:
        raise UsageError(f"{path} has scores that differ: remove --without-ap.")
    if reason and not args.without_ap:
        raise DataError(
            f"{path}: {reason}: AP needs scores, which order the detections. Add --without-ap for precision and recall, or "
            "--rescore for scores from a CLIP."
        )
    if not reason:
        return ""
    return f"{reason}. AP is the area below the curve that a score threshold draws; without an order there is no curve."


def _most_of_an_image(detections: Detections) -> int:
    _, counts = np.unique(detections.image_ids, return_counts=True)
    return int(counts.max(initial=1))


def _print_comparison(args: argparse.Namespace, report: dict[str, Any]) -> None:
    other = read_report(args.compare)
    require_comparable(other, report)
    print(f"\n{as_text(compare(other, report), (str(args.compare), str(args.output)))}")


if __name__ == "__main__":
    with exit_on_error():
        main()
