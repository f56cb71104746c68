"""What a training is supervised by: boxes only, or captions and image labels too, and names of novel classes.

A comparison of open-vocabulary detectors is fair only within one setting; the report states it.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovdet2.config.methods import methods_of
from ovdet2.data.samples import BOXES, IMAGE_LABELS, KINDS
from ovdet2.data.source_spec import source_specs

BOXES_ONLY, NAMES, WEAK = "V", "G", "W"


def supervision_of(cfg: CfgNode) -> dict[str, Any]:
    """The supervision of a configuration's training, an entry of report.json under "supervision".

    Returns:
        {"setting": str or None, "novel_names": bool, "boxes", "captions", "image_labels": names of data sets}.

        "setting" is "V" (boxes of base classes and a vision-language model), "G" (also names of novel classes) or "W"
        (also captions or image labels), and None for a configuration without a training set. "novel_names" states
        whether names of novel classes are used in training: in a list of tags, or as image labels. Captions may mention
        novel objects in any case.
    """
    specs = [spec for spec in source_specs(cfg) if spec.datasets]
    datasets = {kind: [name for spec in specs if spec.kind == kind for name in spec.datasets] for kind in KINDS}
    labelled = any(MetadataCatalog.get(name).get("ov_novel_labels") for name in datasets[IMAGE_LABELS])
    named = labelled or any(method.is_on(cfg) and method.names_novel_classes(cfg) for method in methods_of(cfg))
    setting = WEAK if any(datasets[kind] for kind in KINDS if kind != BOXES) else NAMES if named else BOXES_ONLY
    return {"setting": setting if specs else None, "novel_names": bool(specs) and named, **datasets}
