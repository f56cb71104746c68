r"""Import the weights of a published Deformable DETR: official, H-Deformable-DETR's, Detic's, detrex', transformers'.

    # keep the classes of a registered data set, in its order; then measure the published figure on COCO
    ovdet2 import-weights r50_deformable_detr_plus_iterative_bbox_refinement-checkpoint.pth \
        --dataset closed_coco_2017_val --output r50.safetensors
    ovdet2 eval --config-file coco/deformable_detr_r50_refine.yaml MODEL.WEIGHTS r50.safetensors
    # H-Deformable-DETR: its queries after the first 300 take part in training only
    ovdet2 import-weights r50_hybrid_branch_lambda1_group6_t1500_..._12eps.pth --queries 300 \
        --dataset closed_coco_2017_val --output h_detr.safetensors
    ovdet2 eval --config-file coco/deformable_detr_r50_plus_plus_12ep.yaml MODEL.DETR.WIDE_POSITION True \
        MODEL.WEIGHTS h_detr.safetensors
    # Detic's, which has a row for each of the 1,203 classes of LVIS
    ovdet2 import-weights Detic_DeformDETR_LI_R50_4x_ft4x.pth --dataset closed_lvis_v1_val --output detic_detr.safetensors
    ovdet2 eval --config-file lvis/deformable_detr_r50_two_stage.yaml MODEL.WEIGHTS detic_detr.safetensors
    # keep all 91 rows of the class layers, one per COCO id
    ovdet2 import-weights model.safetensors --output r50_91.safetensors
    # keep everything but the class layers, for a detector with a text branch
    ovdet2 import-weights model.safetensors --without-classes --output r50_text.safetensors

The output is a file for MODEL.WEIGHTS. The variant (one_stage, refine, two_stage, plus_plus) is inferred from the weights
and printed: set MODEL.DETR.VARIANT to it, with plus_plus also MODEL.DETR.WIDE_POSITION to True. A file with unknown or missing weights is refused.

Weights of Detic, CoDet and VLDet: ``ovdet2 import-weights --kind detic --help``.

Exit codes: 2 usage, 3 data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ovdet2.command_line import command_parser, dataset_files, keep_inputs
from ovdet2.data.datasets import split_of
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.files import sha256_file, write_safetensors
from ovdet2.io.weights import read_weights
from ovdet2.modeling.detr.import_weights import import_weights, rows_of_classes

SCHEMA = "ovdet2/imported-detr/1"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the manifest that was written."""
    parser = command_parser("import-weights", __doc__)
    parser.add_argument("weights", help="published checkpoint (.pth or .safetensors)")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--dataset", help="registered data set whose category ids select rows of the class layers")
    classes.add_argument("--without-classes", action="store_true", help="drop the class layers")
    parser.add_argument("--queries", type=int, help="keep only the first learned queries")
    parser.add_argument("--prefix", default="network.", help="prefix of every name that is written (network.)")
    args = parser.parse_args(argv)
    if not args.output.endswith(".safetensors"):
        raise UsageError(f"--output {args.output}: name a .safetensors file.")
    keep_inputs("--output", [args.output], args.weights, dataset_files(args.dataset or ""))
    published = read_weights(args.weights)["model"]
    rows = [] if args.without_classes else class_rows(args.dataset, published)
    weights, variant = import_weights(published, rows, args.queries)
    manifest = {
        "schema": SCHEMA,
        "source_sha256": sha256_file(args.weights),
        "variant": variant,
        "class_rows": rows,
        "num_queries": len(weights.get("transformer.query_maker.content", ())) or None,
        "tensors": len(weights),
    }
    write_safetensors(args.output, {f"{args.prefix}{name}": value for name, value in weights.items()}, manifest)
    count = "all rows" if rows is None else f"{len(rows)} rows"
    print(f"{args.output}: {len(weights)} tensors, variant {variant}, {count} of the class layers")
    if variant == "plus_plus":
        print("Set MODEL.DETR.WIDE_POSITION True for these weights.")
    return manifest


def class_rows(dataset: str | None, weights: Mapping[str, Any]) -> list[int] | None:
    """Rows of the class layers for the contiguous classes of a registered data set; None for no data set.

    Args:
        dataset: its name.
        weights: dict of name to Tensor, under published names.

    Raises:
        UsageError: the data set has no split.
        DataError: see :func:`~ovdet2.modeling.detr.import_weights.rows_of_classes`.
    """
    if dataset is None:
        return None
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"{dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    return rows_of_classes(weights, split.category_ids)


if __name__ == "__main__":
    with exit_on_error():
        main()
