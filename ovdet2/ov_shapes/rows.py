"""The rows of the OV-Shapes benchmark as entries of an experiment, and the artefacts that they read.

ovdet2 experiment ov-shapes --rows vild_text vild --seeds 0 1 2
ovdet2 experiment ov-shapes --rows vild_text vild --seeds 0 1 2 --split test

A row is trained once. Its settings are chosen on the validation set; the final table is of the test set.
"""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from detectron2.config import CfgNode

import ovdet2
from ovdet2.data.datasets.ov_shapes import ensure_generated, ensure_test
from ovdet2.data.datasets.register import data_root
from ovdet2.experiments import Artefact, Column, Entry, Experiment, Plan
from ovdet2.experiments.command import CHECKOUT, checkout_file
from ovdet2.experiments.state import content_hash, settings_hash
from ovdet2.ov_shapes.world.scenes import TEST_SPLIT

OUTPUT = "output/ovshapes"
TRAINING_SET = "ov_shapes_train_base"
SETS = {"val": "ov_shapes_val_all", "test": "ov_shapes_test"}  # of --split
TEST_SET = SETS["val"]  # DATASETS.TEST of the rows' configurations
TEACHER = "ovshapes-resnet"
ASSETS = Path(ovdet2.__file__).parent / "assets"
CLIM_CONFIG = "projects/CLIM/configs/ovshapes_vit.yaml"


def _teacher_weights(architecture: str) -> Path:
    return ASSETS / "open_clip" / f"{architecture}.safetensors"


def _clim_settings() -> str:
    """Hash of the settings of CLIM's training, whatever the layout of the yaml file."""
    return settings_hash(yaml.safe_load(checkout_file(CLIM_CONFIG).read_text(encoding="utf-8")))


_OF_TEACHER = {"teacher": _teacher_weights(TEACHER)}
_REGION_CACHE = ("ovdet2.programs.build_region_cache", "--dataset", TRAINING_SET, "--output", "{path}", "--config-file")
_CLIP = ("--architecture", TEACHER, "--pretrained", "embedded")

ARTEFACTS = {
    # From the proposals of ViLD-text. The paper uses 300 regions per image; here the 10 best after a stricter NMS,
    # which are embedded in minutes.
    "region_cache": Artefact(
        "region cache", "MODEL.VILD.REGION_CACHE", "region_cache",
        (*_REGION_CACHE, "ovshapes/vild_text_r18.yaml", "--top", "10", "--nms", "0.5", "MODEL.WEIGHTS", "{weights}"),
        _OF_TEACHER, weights_of="vild_text", training_only=True,
    ),
    "annotation_cache": Artefact(
        "cache of annotated boxes", "MODEL.CCKT.REGION_CACHE", "annotation_cache",
        (*_REGION_CACHE, "ovshapes/detr_text_r18.yaml", "--boxes", "annotations"), _OF_TEACHER,
        training_only=True,
    ),
    "clip_priors": Artefact(
        "concept prior", "MODEL.CCKT.PRIOR_FILE", "priors/clip.safetensors",
        ("ovdet2.programs.build_concept_priors", "--backend", "clip", *_CLIP, "--tiles", "3", "--dataset", TEST_SET,
         "--output", "{path}"),
        _OF_TEACHER,
    ),
    "caption_cache": Artefact(
        "caption cache", "DATASETS.CAPTION_CACHE", "captions.safetensors",
        ("ovdet2.programs.build_caption_cache", "--dataset", "ov_shapes_captions", *_CLIP, "--output", "{path}"),
        _OF_TEACHER, training_only=True,
    ),
    "clim": Artefact(
        "training by CLIM", "MODEL.TEACHER.PRETRAINED", "clim/clim_a1.safetensors",
        ("projects/CLIM/train.py", "--config-file", str(CHECKOUT / CLIM_CONFIG), "--resume", "OUTPUT_DIR", "{folder}"),
        {"teacher": _teacher_weights("ovshapes-vit"), "configuration": _clim_settings},
    ),
}  # fmt: skip


def _detr_rows() -> dict[str, Entry]:
    """Deformable DETR, and CCKT-Det and CLIP-DETR on it."""
    cache, priors = "annotation_cache", "clip_priors"
    rows = {
        "detr_closed_set": Entry("Deformable DETR, closed-set head (sanity)", "ovshapes/detr_closed_set_r18.yaml"),
        "detr_text": Entry("Deformable DETR, text head", "ovshapes/detr_text_r18.yaml"),
        "cckt_similarity": Entry("CCKT-Det: similarity only (control)", "ovshapes/cckt_similarity_r18.yaml"),
        "cckt_priors": Entry("CCKT-Det: priors", "ovshapes/cckt_priors_r18.yaml", needs=(priors,)),
        "cckt_contrast": Entry("CCKT-Det: contrast, similarity", "ovshapes/cckt_contrast_r18.yaml", needs=(cache,)),
        "cckt_full": Entry(
            "CCKT-Det: priors, contrast, similarity", "ovshapes/cckt_full_r18.yaml", needs=(cache, priors)
        ),
        "cckt_full_class": Entry(
            "CCKT-Det: priors, contrast, class branch",
            "ovshapes/cckt_full_class_r18.yaml",
            needs=(priors,),
            weights_of="cckt_full",
        ),
        **_cckt_published_rows(cache, priors),
    }
    heads = {"closed": ("closed head", ()), "text": ("text head", ()), "cckt": ("on CCKT-Det", (cache, priors))}
    for head, (of, needs) in heads.items():
        for part, title in (("align", "AlignNet"), ("dynql", "DynQL"), ("both", "both")):
            config = f"ovshapes/clip_detr_{part}_{head}_r18.yaml"
            rows[f"clip_detr_{part}_{head}"] = Entry(f"CLIP-DETR: {title}, {of}", config, needs=needs)
    return rows


def _cckt_published_rows(cache: str, priors: str) -> dict[str, Entry]:
    """Rows 2 to 5 of CCKT-Det's Table 4 with the class branch of the published code, a closed one."""
    of = "CCKT-Det, published class branch:"
    return {
        "cckt_priors_published": Entry(f"{of} priors", "ovshapes/cckt_priors_published_r18.yaml", needs=(priors,)),
        "cckt_contrast_published": Entry(
            f"{of} contrast, similarity", "ovshapes/cckt_contrast_published_r18.yaml", needs=(cache,)
        ),
        "cckt_full_published": Entry(
            f"{of} priors, contrast, similarity", "ovshapes/cckt_full_published_r18.yaml", needs=(cache, priors)
        ),
        "cckt_full_class_published": Entry(
            f"{of} priors, contrast, class branch",
            "ovshapes/cckt_full_class_published_r18.yaml",
            needs=(priors,),
            weights_of="cckt_full_published",
        ),
    }


def _on(row: str, title: str, config: str) -> Entry:
    return Entry(title, config, weights_of=row)


_ROWS = {
    "teacher": Entry(
        "CLIP on ground-truth boxes (upper bound of the teacher)",
        command=("ovdet2.programs.evaluate_teacher", "--dataset", TEST_SET, *_CLIP, "--output", "{folder}"),
        folder="{name}/seed0",  # nothing in it is random
    ),
    "closed_set": Entry("closed-set head (sanity: novel must be about 0)", "ovshapes/closed_set_r18.yaml"),
    "vild_text": Entry("ViLD-text", "ovshapes/vild_text_r18.yaml"),
    "vild_image": Entry("ViLD-image", "ovshapes/vild_image_r18.yaml", needs=("region_cache",)),
    "vild_image_objectness": _on(
        "vild_image", "ViLD-image, with objectness", "ovshapes/vild_image_objectness_r18.yaml"
    ),
    "vild": Entry("ViLD", "ovshapes/vild_r18.yaml", needs=("region_cache",)),
    "vild_ensemble": Entry("ViLD-ensemble", "ovshapes/vild_ensemble_r18.yaml", needs=("region_cache",)),
    **{
        f"vild_ensemble_{kind}_background": _on(
            "vild_ensemble", f"ViLD-ensemble, {title}", f"ovshapes/vild_ensemble_{kind}_background_r18.yaml"
        )
        for kind, title in (("text", "second head x (1 - background)"), ("objectness", "second head x objectness"))
    },
    "clip_on_crops": _on("vild_text", "CLIP on cropped proposals", "ovshapes/clip_on_crops_r18.yaml"),
    "clip_on_crops_objectness": _on(
        "vild_text", "CLIP on cropped proposals, with objectness", "ovshapes/clip_on_crops_objectness_r18.yaml"
    ),
    "vild_text_clip": _on("vild_text", "ViLD-text + CLIP", "ovshapes/vild_text_clip_r18.yaml"),
    "detic_boxes": Entry("Sigmoid text head, boxes only (control)", "ovshapes/detic_boxes_r18.yaml"),
    "detic_tags": Entry("Detic: image tags", "ovshapes/detic_tags_r18.yaml"),
    "detic_captions": Entry("Detic: captions", "ovshapes/detic_captions_r18.yaml", needs=("caption_cache",)),
    "detic_both": Entry("Detic: image tags and captions", "ovshapes/detic_both_r18.yaml", needs=("caption_cache",)),
    "vldet": Entry("VLDet", "ovshapes/vldet_r18.yaml", needs=("caption_cache",)),
    **_detr_rows(),
    "fvlm": Entry("F-VLM", "ovshapes/fvlm_resnet.yaml"),
    "fvlm_detector": Entry("F-VLM without fusion", "ovshapes/fvlm_resnet_detector.yaml", weights_of="fvlm"),
    "fvlm_clip": Entry(
        "CLIP's map at the proposals of F-VLM, with objectness", "ovshapes/fvlm_resnet_clip.yaml", weights_of="fvlm"
    ),
    "fvlm_vit": Entry("F-VLM on the ViT", "ovshapes/fvlm_vit.yaml"),
    "fvlm_vit_clim": Entry("F-VLM on the ViT after CLIM", "ovshapes/fvlm_vit_clim.yaml", needs=("clim",)),
}
ENTRIES = {name: replace(entry, settings_by="val") for name, entry in _ROWS.items()}

COLUMNS = {
    "novel AP50": Column(("bbox", "AP50-novel")),
    "unseen nouns": Column(("bbox", "AP50-unseen_nouns")),
    "unseen combinations": Column(("bbox", "AP50-unseen_combinations")),
    "base AP50": Column(("bbox", "AP50-base")),
    "base AP": Column(("bbox", "AP-base")),
    "all AP50": Column(("bbox", "AP50-all")),
    "novel AR@100": Column(("proposals", "AR@100-novel")),
    "base AR@100": Column(("proposals", "AR@100-base")),
    "setting": Column(("setting", "letters"), str),
    "settings by": Column(("settings_by",), str),
}


def inputs_of(cfg: CfgNode | None) -> dict[str, str]:
    """Hashes of the trunk, the data set and the teacher of a row; ``cfg`` is None for the teacher's own."""
    inputs = {
        "OV-Shapes": ensure_generated(data_root())["pixels_sha256"]["train2017"],
        "teacher": content_hash(_teacher_weights(cfg.MODEL.TEACHER.ARCHITECTURE if cfg else TEACHER)),
    }
    trunk = cfg.MODEL.WEIGHTS.removeprefix("ovdet2://") if cfg else ""
    return inputs | {"trunk": content_hash(ASSETS / trunk) if trunk else ""}


OV_SHAPES_ROWS = Experiment(ENTRIES, COLUMNS, ARTEFACTS, inputs_of, marker="ov-shapes")


def final_table(rows: Experiment) -> Experiment:
    """The evaluation of the weights of ``rows`` on the test set.

    Programs of rows and artefacts whose command names the validation set are run with the test set in its place.

    Args:
        rows: of OV-Shapes, evaluated on the validation set.
    """
    return replace(
        rows,
        entries={name: _on_test(name, entry, rows.artefacts) for name, entry in rows.entries.items()},
        columns={**rows.columns, "times read": Column(("readings",), str)},
        artefacts={
            name: replace(artefact, command=_naming_test(artefact.command))
            for name, artefact in rows.artefacts.items()
            if SETS["val"] in artefact.command
        },
        inputs=lambda cfg: rows.inputs(cfg) | {"test images": ensure_test(data_root())["pixels_sha256"][TEST_SPLIT]},
        marker="ov-shapes-test",
        weights_from=rows,
        folder="test",
    )


def _on_test(name: str, entry: Entry, artefacts: Mapping[str, Artefact]) -> Entry:
    if entry.command:
        return replace(entry, command=_naming_test(entry.command))
    return replace(
        entry,
        overrides=(*entry.overrides, "DATASETS.TEST", f"('{SETS['test']}',)", "TEST.EXPECTED_RESULTS", "[]"),
        needs=tuple(need for need in entry.needs if not artefacts[need].training_only),
        weights_of=entry.weights_of or name,
    )


def _naming_test(command: Sequence[str]) -> tuple[str, ...]:
    return tuple(SETS["test"] if word == SETS["val"] else word for word in command)


FINAL_TABLE = final_table(OV_SHAPES_ROWS)


def add_split(parser: ArgumentParser) -> None:
    """Add --split, val or test, to the options of an experiment."""
    parser.add_argument(
        "--split",
        choices=SETS,
        default="val",
        help="val chooses settings; test is for the final table: it evaluates the weights of the same runs on "
        "ov_shapes_test, writes below OUTPUT/test and logs each reading in OUTPUT/test_readings.jsonl (val)",
    )


PLAN = Plan(
    "Run rows of the OV-Shapes benchmark, and write their table. A row that is done is not run again; an interrupted one "
    "goes on where it stopped.",
    lambda args: FINAL_TABLE if args.split == "test" else OV_SHAPES_ROWS,
    add_split,
    output=OUTPUT,
)
