"""Cost of ViLD: training steps compared with Detectron2's Faster R-CNN; samples with and without cached regions.

    ovdet2 bench vild --sizes 800x1066 512x512 224x224 --turns 8

All models have the same R50-FPN and head weights and get the same image of 20 objects, hence the same proposals (512
regions are sampled if there are enough). ViLD and ViLD-ensemble distil 300 cached regions as well. Samples are
compared by ``ovdet2 bench cache``.
"""

import argparse
from collections.abc import Iterator

import torch
from detectron2.modeling import build_model
from torch.nn import functional as F

import ovdet2.data.datasets  # noqa: F401  registers OV-COCO, whose 65 words are the vocabulary
from ovdet2.bench.cache import CACHE, TRUTH
from ovdet2.bench.detectors import DIM, TrainingStep, build_detector, noise_samples, random_words
from ovdet2.bench.harness import SIZE, Benchmark, Candidate, Case, Comparison, size_text
from ovdet2.config import load_config
from ovdet2.data.samples import Sample
from ovdet2.engine import Trainer
from ovdet2.methods.vild.sample import CachedRegions
from ovdet2.modeling import dataset_split
from ovdet2.vlm.fingerprint import Fingerprint

PLAIN = "Faster R-CNN"
TEXT, CACHED = "ovcoco/vild_text_r50.yaml", "ovcoco/vild_r50.yaml"
VARIANTS = {"ViLD-text": TEXT, "ViLD": CACHED, "ViLD-ensemble": "ovcoco/vild_ensemble_r50.yaml"}
REGIONS = 300
OPTIONS = {"--sizes": SIZE | {"nargs": "+", "default": [(800, 1066), (512, 512), (224, 224)]}}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """Every size, one image each."""
    candidates = [Candidate(name, lambda name=name: build(name, args.device), TrainingStep.__call__)
                  for name in (PLAIN, *VARIANTS)]  # fmt: skip
    yield Comparison(candidates, [Case({"image": size_text(size)}, samples_with_regions(size)) for size in args.sizes])


def build(name: str, device: str) -> TrainingStep:
    """Training step of a model. All models have equal trunks and RPNs: other proposals would change the number of
    regions and the cost."""
    cfg = load_config(VARIANTS.get(name, TEXT), ["MODEL.DEVICE", device])
    if name == PLAIN:
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "GeneralizedRCNN", "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 48
        torch.manual_seed(0)
        return TrainingStep(build_model(cfg))
    split, teacher = (
        dataset_split(cfg),
        Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED),
    )
    return TrainingStep(build_detector(cfg, random_words(split.names, split.base_mask, DIM, teacher)))


def samples_with_regions(size: tuple[int, int]) -> list[Sample]:
    """One noise image with cached regions, whose sides are 0.05 to 0.3 of the image's."""
    samples, generator = noise_samples(size), torch.Generator().manual_seed(1)
    sides = torch.tensor([size[1], size[0]])
    corners = torch.rand(REGIONS, 2, generator=generator) * 0.7 * sides
    boxes = torch.cat([corners, corners + (0.05 + 0.25 * torch.rand(REGIONS, 2, generator=generator)) * sides], dim=1)
    rows = F.normalize(torch.randn(REGIONS, DIM, generator=generator), dim=1).half()
    samples[0].attach(CachedRegions(boxes, rows))
    return samples


def cached_samples(args: argparse.Namespace) -> Comparison:
    """Compare training samples with and without cached regions, for ``ovdet2.bench.cache``."""
    name = f"benchmark {args.folder.name}"
    images = {"name": name, "json": str(args.folder / TRUTH), "images": str(args.images.resolve()), "base": ["thing"]}
    data = ["DATASETS.OWN", [images | {"base_only": True}], "DATASETS.TRAIN", (name,), "DATASETS.TEST", ()]
    data += ["DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False]
    data += ["SOLVER.IMS_PER_BATCH", args.count, "INPUT.MIN_SIZE_TRAIN", (args.side,), "INPUT.MAX_SIZE_TRAIN", 1333]
    cache = ["MODEL.VILD.REGION_CACHE", str(args.folder / CACHE), "MODEL.VILD.REGIONS_PER_IMAGE", args.regions]

    def batches(config, overrides):
        torch.set_num_threads(1)  # as in a data loading worker
        return iter(Trainer.build_train_loader(load_config(config, overrides)))

    candidates = [
        Candidate("plain", lambda: batches(TEXT, data), lambda loaded, _: next(loaded)),
        Candidate("with cached regions", lambda: batches(CACHED, data + cache), lambda loaded, _: next(loaded)),
    ]
    return Comparison(candidates, [Case({"what": "training samples", "of": f"{args.count} images, one thread"})])


main = Benchmark("ovdet2.methods.vild.bench", __doc__, OPTIONS, plan, turns=8, turn_options=("--steps",)).main

if __name__ == "__main__":
    main()
