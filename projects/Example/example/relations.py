"""The sample's attachment, the model part and the loss. Shapes: R regions of a batch, D embedding dimension."""

import torch
from detectron2.structures import Boxes

from ovdet2.data.steps.regions import CachedRegions
from ovdet2.modeling.rcnn.part import RCNNPart


class RelatedRegions(CachedRegions):
    """Cached regions under a name of this method, so that another method may read another cache."""


class Relations(RCNNPart):
    def own_boxes(self, samples):
        return [Boxes(sample.attached(RelatedRegions).boxes_xyxy) for sample in samples]

    def losses(self, batch):
        student = batch.heads.text_classifier.embed(batch.own_features)
        # To the student's device and type first: autocast on a CPU cannot join float16.
        teacher = torch.cat([sample.attached(RelatedRegions).embeddings.to(student) for sample in batch.samples])
        return {"loss_relations": relational_loss(student, teacher)}


def relational_loss(student, teacher):
    """Mean squared difference of the cosines of all pairs of regions; unit rows [R, D]; 0 without regions."""
    return (student @ student.T - teacher @ teacher.T).square().sum() / max(len(student) ** 2, 1)
