"""CCKT-Det (Zhang et al.): semantic priors, regional contrastive distillation, similarity scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method

if TYPE_CHECKING:
    from ovdet2.data.source_spec import SourceSpec
    from ovdet2.data.steps.step import Step
    from ovdet2.methods.cckt.part import CCKT
    from ovdet2.modeling.host import Host


class CCKTDet(Method):
    """Semantic priors, contrastive distillation and similarity scores on Deformable DETR."""

    name = "cckt"
    hosts = ("OpenVocabularyDeformableDETR",)

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.CCKT.*"""
        # CCKT-Det on OpenVocabularyDeformableDETR: semantic priors, contrastive distillation of regions, scores by
        # similarity.
        cfg.MODEL.CCKT = CN()
        # Off: the plain detector.
        cfg.MODEL.CCKT.ENABLED = False
        # Add the words of an image to its queries: in training the annotated ones, at test those of PRIOR_FILE.
        cfg.MODEL.CCKT.PRIORS = True
        # A file of ovdet2 prior for DATASETS.TEST.
        cfg.MODEL.CCKT.PRIOR_FILE = ""
        # rho: lowest score of a word of PRIOR_FILE.
        cfg.MODEL.CCKT.PRIOR_THRESHOLD = 0.7
        # L: most words of an image at test, the best ones.
        cfg.MODEL.CCKT.PRIOR_TOP = 6
        # Fewer than L: "none" takes those there are, "random" fills up with other words of the vocabulary.
        cfg.MODEL.CCKT.PRIOR_FILL = "none"
        # Training: share of the annotated words that are dropped, each by chance.
        cfg.MODEL.CCKT.PRIOR_DROPOUT = 0.0
        # Training: most base words that are added though they are not annotated; how many is drawn from 0 to this
        # number.
        cfg.MODEL.CCKT.PRIOR_DISTRACTORS = 0
        # Images of no PRIOR_FILE (Detector, demo): the teacher scores the image and n x n cells, the best score
        # counts.
        cfg.MODEL.CCKT.PRIOR_TILES = 1
        # Words to queries: "blocks" of consecutive queries, "interleave" (query i takes word i mod K); empty:
        # interleave with two stages, blocks otherwise.
        cfg.MODEL.CCKT.ASSIGNMENT = ""
        # Factor of the initial weights of the words' projection, beside Xavier's. With 1, the published code's, a word
        # starts at some hundredths of the norm of the learned content, and a short training hardly reads it.
        cfg.MODEL.CCKT.PRIOR_GAIN = 1.0
        # tau of similarities.
        cfg.MODEL.CCKT.TEMPERATURE = 0.07
        # tau of the contrast; 0: TEMPERATURE, as in paper and code.
        cfg.MODEL.CCKT.CONTRAST_TEMPERATURE = 0.0
        # Norm of the crops' features in the contrast. 1: unit features. The published code takes CLIP's raw features,
        # whose norm is about 20 with ViT-L/14@336; the cache has unit rows, to which this gives one norm.
        cfg.MODEL.CCKT.CONTRAST_NORM = 1.0
        # Added to cos / tau in the similarity probability. The paper has none: a similarity above 0 is then a
        # probability above 1/2, and a focal loss drives an embedding away from all words but its own. With
        # CLASS_LOSS_ON "similarity" or "both" try -4.6, at which the class branch starts.
        cfg.MODEL.CCKT.SIMILARITY_BIAS = 0.0
        # Weight of the similarity in the cost that queries are matched by.
        cfg.MODEL.CCKT.SIMILARITY_COST = 1.0
        # What the focal loss trains: the "class" branch (published code), "similarity" (the paper's Eq. 7), or "both".
        cfg.MODEL.CCKT.CLASS_LOSS_ON = "class"
        # "instance": each object's crop against the queries of its image (the paper); "batch": of the images of a
        # process; "class": one crop of each class against the queries of a process (published code); "none": no
        # contrast, no crops.
        cfg.MODEL.CCKT.CONTRAST = "instance"
        # Weight of the contrast.
        cfg.MODEL.CCKT.CONTRAST_WEIGHT = 1.0
        # Iteration at which contrast and similarity cost set in; the paper adds them when the learning rate drops.
        cfg.MODEL.CCKT.CONTRAST_START = 0
        # Folder of a region cache of the annotated boxes of DATASETS.TRAIN (ovdet2 cache build --boxes
        # annotations).
        cfg.MODEL.CCKT.REGION_CACHE = ""
        # Score of a detection: "similarity" (the paper), the "class" branch, or the "product" of their probabilities.
        cfg.MODEL.CCKT.SCORE = "similarity"

    def is_on(self, cfg: CfgNode) -> bool:
        """MODEL.CCKT.ENABLED."""
        return cfg.MODEL.CCKT.ENABLED

    def check(self, cfg: CfgNode) -> None:
        """See :mod:`ovdet2.methods.cckt.check`; nothing is checked where it is off."""
        from ovdet2.methods.cckt.check import check_choices, check_contrast

        if self.is_on(cfg):
            check_choices(cfg.MODEL.CCKT.CONTRAST, cfg.MODEL.CCKT.CLASS_LOSS_ON, cfg.MODEL.CCKT.SCORE)
            check_contrast(cfg.MODEL.CCKT.CONTRAST_TEMPERATURE, cfg.MODEL.CCKT.CONTRAST_NORM)

    def build(self, cfg: CfgNode, host: Host) -> CCKT | None:
        """See :func:`~ovdet2.methods.cckt.build.build_cckt`."""
        from ovdet2.methods.cckt.build import build_cckt

        return build_cckt(cfg, host) if self.is_on(cfg) else None

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """See :func:`~ovdet2.methods.cckt.sample.build_steps`; nothing for images without boxes."""
        from ovdet2.data.samples import BOXES
        from ovdet2.methods.cckt.sample import build_steps

        return build_steps(cfg, source.datasets, is_train) if self.is_on(cfg) and source.kind == BOXES else []

    def facts(self, cfg: CfgNode) -> dict[str, Any]:
        """See :func:`~ovdet2.methods.cckt.sample.prior_facts`."""
        from ovdet2.methods.cckt.sample import prior_facts

        return prior_facts(cfg)


METHOD = CCKTDet()
