"""Naming of regions, the comparison of two models, and the pictures."""

import json

import clim_cases as cases
import eval_regions
import pytest
import torch
from clim import regions
from clim.response import draw_responses, mosaic_of, response_maps
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torch.nn import functional as F

from ovdet2.data.datasets.register import register_ov_dataset
from ovdet2.errors import NumericalError, UsageError
from ovdet2.ov_shapes.world.classes import BASE_NAMES, NOVEL_NAMES
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.dense import embed_regions_dense
from ovdet2.vocabulary import Vocabulary
from tests.caption_cases import image_of, write_coco
from tests.micro import wave

NAMES = ("red star", "blue moon", "grey key", "fish", "green ring", "crown", "bolt", "heart")
BOXES = ([4, 3, 20, 18], [10, 12, 30, 20], [0, 0, 48, 40])


def register(name, folder, names, base):
    """Three images with three boxes each, and a crowd that does not count."""
    write_coco(folder, 3)
    categories = [{"id": 7 * index + 3, "name": word} for index, word in enumerate(names)]
    annotations = []
    for image in range(3):
        for index, box in enumerate(BOXES):
            category = categories[(3 * image + index) % len(names)]["id"]
            shared = {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **shared})
        annotations.append({**annotations[-1], "id": len(annotations) + 1, "iscrowd": 1})
    images = [{"id": index, "file_name": f"{index}.png", "height": 40, "width": 48} for index in range(3)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(data))
    novel = [word for word in names if word not in base]
    register_ov_dataset(name, folder / "boxes.json", folder / "images", base, novel)


@pytest.fixture
def dataset(tmp_path):
    register("clim_test", tmp_path, NAMES, NAMES[:2])
    yield "clim_test"
    DatasetCatalog.remove("clim_test")
    MetadataCatalog.pop("clim_test", None)


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("name, way", [("clim-vit", "dense map"), ("clim-resnet", "attention pool")])
def test_accuracies_against_a_loop(dataset, name, way, square):
    teacher = cases.teacher_of(name)
    found = regions.evaluate(teacher, dataset, side=64, factors=(1.0,), templates="single", square=square)
    assert found["settings"]["square"] == square
    words = Vocabulary.build(NAMES, teacher, "single").embeddings
    embed = {
        "crops": lambda image, box: embed_regions(teacher, image, box, (1.0,)),
        way: lambda image, box: embed_regions_dense(teacher, image, box, side=64, square=square),
    }
    assert set(found) == {"teacher", "dataset", "settings", *embed}
    for key, region in embed.items():
        right = {"all": [], "base": [], "novel": []}
        for number in range(3):
            image = torch.from_numpy(image_of(number)).permute(2, 0, 1)
            for index, (x, y, width, height) in enumerate(BOXES):
                row = region(image, torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32))
                truth = (3 * number + index) % len(NAMES)
                rank = (row @ words.T)[0].argsort(descending=True).tolist().index(truth)
                right["all"].append(rank)
                right["base" if truth < 2 else "novel"].append(rank)
        for subset, ranks in right.items():
            for top in (1, 5):
                share = sum(rank < top for rank in ranks) / len(ranks)
                assert found[key][f"top{top}"][subset] == pytest.approx(100 * share)
        assert found[key]["top5"]["all"] < 100


def test_ranks():
    """A word that scores as high is not told apart: a model that answers the same to all words names nothing."""
    logits = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.1], [0.3, 0.3, 0.3]])
    assert regions.ranks_of(logits, torch.tensor([2, 0, 1])).tolist() == [1, 0, 2]
    with pytest.raises(NumericalError, match="not finite"):
        regions.ranks_of(torch.tensor([[0.1, float("nan"), 0.3]]), torch.tensor([0]))


def test_whole_images_of_ov_shapes(tmp_path, monkeypatch):
    """A model that is told the right word names every image, one that is told the next word none."""
    register("clim_shapes", tmp_path, (*BASE_NAMES, *NOVEL_NAMES), BASE_NAMES)
    try:
        monkeypatch.setattr(regions, "WHOLE_IMAGES", 65)
        split, words = regions.split_of("clim_shapes"), torch.eye(65)

        class Told:
            image_size, interpolation = 16, "bilinear"

            def __init__(self, shift):
                self.number, self.shift = 0, shift

            def encode_image(self, pixels):
                assert pixels.shape == (1, 3, 16, 16) and 0 <= pixels.min() and pixels.max() <= 1
                word = (*BASE_NAMES, *NOVEL_NAMES)[self.number]
                self.number += 1
                return torch.eye(65)[split.names.index(word) + self.shift - 65][None]

        right = regions.whole_image_accuracy(Told(0), words, split)
        assert right["top1"] == {"all": 100, "base": 100, "novel": 100}
        assert regions.whole_image_accuracy(Told(1), words, split)["top1"]["all"] == 0
    finally:
        DatasetCatalog.remove("clim_shapes")
        MetadataCatalog.pop("clim_shapes", None)


def test_comparison(dataset, tmp_path, monkeypatch, capsys):
    def result(top1, square):
        accuracy = {"top1": {"all": top1, "base": top1, "novel": top1}, "top5": {"all": 90, "base": 90, "novel": 90}}
        # A file of before the square has no "square" among its settings.
        return {"dataset": dataset, "settings": {"side": 64} | square, "crops": accuracy, "dense map": accuracy}

    found = {"first": 20.0, "second": 60.0}
    asked = []

    def evaluate(teacher, name, side, square):
        asked.append(teacher.fingerprint)
        given = {"square": True} if square else {}
        return result(found[teacher.fingerprint], given) | {"teacher": teacher.fingerprint}

    class Named:
        def __init__(self, fingerprint):
            self.fingerprint = fingerprint

    monkeypatch.setattr(regions, "evaluate", evaluate)
    before, after = Named("first"), Named("second")
    assert regions.compare(before, after, dataset, 64, tmp_path, "a0.7") == pytest.approx(50.0)
    assert (tmp_path / "regions_before.json").is_file() and (tmp_path / "regions_a0.7.json").is_file()
    assert "80.0% before, 40.0% after, 50.0% less" in capsys.readouterr().out
    regions.compare(before, after, dataset, 64, tmp_path, "a0.7")
    regions.compare(before, after, dataset, 32, tmp_path, "a0.7")
    assert asked == ["first", "second", "first", "second"]  # once per teacher and settings
    for _ in range(2):
        regions.compare(before, after, dataset, 64, tmp_path, "a0.7", square=True)
    assert asked[4:] == ["first", "second"]


@pytest.mark.parametrize("name, cells", [("clim-vit", (6, 8)), ("clim-resnet", (2, 2))])
def test_response_of_a_cell(name, cells):
    """A ViT's cell is its own embedding; a ResNet's is pooled from the window around it."""
    teacher = cases.teacher_of(name)
    image = torch.from_numpy(image_of(1, 48, 64)).permute(2, 0, 1)
    words = F.normalize(wave((3, 16), 0.4), dim=1)
    found = response_maps(teacher, image, words, side=64)
    assert found.shape == (3, *cells)
    cell, box = ((2, 3), [24, 16, 32, 24]) if name == "clim-vit" else ((0, 1), [0, -32, 96, 64])
    row = embed_regions_dense(teacher, image, torch.tensor([box], dtype=torch.float32), side=64)
    assert torch.allclose(found[:, cell[0], cell[1]], (words @ row.T)[:, 0], atol=1e-5)


def test_mosaic_of_images():
    images = [torch.full((3, 20 + index, 30), 40 * index, dtype=torch.uint8) for index in range(4)]
    canvas = mosaic_of(images, 2, side=32)
    assert canvas.shape == (3, 64, 64) and [canvas[0, y, x].item() for y in (9, 50) for x in (9, 50)] == [
        0,
        40,
        80,
        120,
    ]


def test_picture(tmp_path):
    image = torch.from_numpy(image_of(2)).permute(2, 0, 1)
    maps = [torch.rand(2, 5, 6), torch.rand(2, 5, 6)]
    draw_responses(tmp_path / "out.png", image, ["red $tar", "moon"], maps, ["before", "after"])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500


def test_program(dataset, tmp_path, weights, capsys):
    output = tmp_path / "out"
    shared = ["--architecture", "clim-vit", "--side", "64", "--templates", "single", "--output", str(output)]
    pairs = ["--pretrained", str(weights), str(weights), "--device", "cpu"]
    images = [str(tmp_path / "images" / f"{index}.png") for index in range(3)]
    found = eval_regions.main(
        [*shared, *pairs, "--dataset", dataset, "--limit", "2", "--words", "moon", "--images", images[0]]
    )
    assert found[0] == found[1] == json.loads((output / "regions.json").read_text())[0]
    assert (output / "response_0.png").is_file() and "| vit.safetensors | dense map |" in capsys.readouterr().out
    for wrong in ([], ["--words", "moon"], ["--words", "moon", "--images", *images, "--mosaic", "2"]):
        with pytest.raises(UsageError):
            eval_regions.main([*shared, *pairs, *wrong])
    with pytest.raises(UsageError, match="'clim_none' is not a registered"):
        eval_regions.main([*shared, *pairs, "--dataset", "clim_none"])
