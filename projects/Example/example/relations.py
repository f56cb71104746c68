"""The sample step and the model part. Shapes: R regions of an image or a batch, D embedding dimension."""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes

from ovdet2.caches.training_cache import known_regions
from ovdet2.data.steps import Step
from ovdet2.modeling.rcnn.part import RCNNPart


@dataclass(frozen=True)
class Related:
    """Cached regions: ``boxes_xyxy`` [R, 4] in pixels of the augmented image, the teacher's ``embeddings`` [R, D]."""

    boxes_xyxy: torch.Tensor
    embeddings: torch.Tensor


class AttachRelated(Step):
    def __init__(self, cache):
        self.cache, self.require_teacher = cache, cache.require_teacher

    def __call__(self, sample):
        ids = [box["id"] for box in sample.annotations]
        cached = known_regions(self.cache, sample.image_id, sample.width, sample.height, ids)
        boxes = Boxes(torch.from_numpy(sample.transforms.apply_box(cached.boxes_xyxy.numpy())).float())
        boxes.clip(tuple(sample.image.shape[1:]))
        kept = boxes.nonempty()
        sample.attach(Related(boxes.tensor[kept], cached.embeddings[kept]))


class Relations(RCNNPart):
    def own_boxes(self, samples):
        return [Boxes(sample.attached(Related).boxes_xyxy) for sample in samples]

    def losses(self, batch):
        teacher = torch.cat([sample.attached(Related).embeddings for sample in batch.samples])
        return {"loss_relations": relational_loss(batch.heads.classifier.embed(batch.own_features), teacher)}


def relational_loss(student, teacher):
    """Mean squared difference of the cosines of all pairs of regions; unit rows [R, D]; 0 without regions."""
    teacher = teacher.to(student)
    return (student @ student.T - teacher @ teacher.T).square().sum() / max(len(student) ** 2, 1)
