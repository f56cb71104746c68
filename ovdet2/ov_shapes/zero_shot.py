"""Zero-shot accuracy of a teacher on OV-Shapes."""

import torch
from torch.nn import functional as F

from ovdet2.io.progress import progress_bar
from ovdet2.ov_shapes.augment import INTERPOLATION
from ovdet2.ov_shapes.world.classes import BASE_NAMES, CLASS_NAMES, NOVEL_NAMES, UNSEEN_COMBINATIONS, UNSEEN_NOUNS
from ovdet2.ov_shapes.world.scenes import IMAGE_COUNTS, class_index, detection_scene, single_object_scene
from ovdet2.vlm.crops import crop_regions, scale_boxes
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary.templates import render


def measure(teacher: Teacher, seed: int) -> dict[str, dict[str, float]]:
    """Zero-shot accuracies over the 65 classes in percent, with ViLD's prompts.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        seed: of the data set.

    Returns:
        dict "whole_images" | "box_crops_1x" | "box_crops_1.5x" | "box_crops_1x+1.5x" -> dict "all", "base", "novel",
        "unseen_nouns", "unseen_combinations" -> percent; crops are of the ground-truth boxes of the validation images.
    """
    texts = F.normalize(torch.stack([teacher.encode_text(render(n, "vild63")).mean(dim=0) for n in CLASS_NAMES]), dim=1)
    whole, labels = [], []
    for index in progress_bar(range(10 * len(CLASS_NAMES)), desc="whole images"):
        image = _to_tensor(single_object_scene(seed, index).image)
        whole.append(F.interpolate(image[None], size=(teacher.image_size,) * 2, mode=INTERPOLATION, antialias=True))
        labels.append(index % len(CLASS_NAMES))
    result = {"whole_images": accuracies(teacher.encode_image(torch.cat(whole)) @ texts.T, torch.tensor(labels))}
    tight, wide, labels = [], [], []
    for index in progress_bar(range(IMAGE_COUNTS["val2017"]), desc="box crops"):
        scene = detection_scene(seed, "val2017", index)
        image, height, width = torch.from_numpy(scene.image).permute(2, 0, 1), *scene.image.shape[:2]
        boxes = torch.tensor([placed.box_xyxy for placed in scene.objects])
        tight.append(teacher.encode_image(crop_regions(image, boxes, teacher.image_size, filter=teacher.interpolation)))
        around = scale_boxes(boxes, 1.5, height, width)
        wide.append(teacher.encode_image(crop_regions(image, around, teacher.image_size, filter=teacher.interpolation)))
        labels += [class_index(placed) for placed in scene.objects]
    tight, wide, labels = torch.cat(tight), torch.cat(wide), torch.tensor(labels)
    result["box_crops_1x"] = accuracies(tight @ texts.T, labels)
    result["box_crops_1.5x"] = accuracies(wide @ texts.T, labels)
    result["box_crops_1x+1.5x"] = accuracies((tight + wide) @ texts.T, labels)
    return result


def accuracies(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Percent of the rows of ``logits`` [N, 65] whose largest entry is at ``labels`` [N], by group of classes."""
    right = logits.argmax(dim=1) == labels
    groups = {
        "all": CLASS_NAMES,
        "base": BASE_NAMES,
        "novel": NOVEL_NAMES,
        "unseen_nouns": UNSEEN_NOUNS,
        "unseen_combinations": UNSEEN_COMBINATIONS,
    }
    result = {}
    for group, names in groups.items():
        members = torch.isin(labels, torch.tensor([CLASS_NAMES.index(name) for name in names]))
        result[group] = round(100.0 * right[members].float().mean().item(), 1)
    return result


def _to_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255.0
