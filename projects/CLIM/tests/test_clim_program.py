"""train.py as a user runs it: publishing, other averages, the text table alone, the share of composing, processes."""

import json

import build_concept_priors
import build_region_cache
import clim_cases as cases
import numpy as np
import pytest
import torch
import train
from clim.config import add_clim_config
from clim.loading import build_loader
from clim.sources import build_source
from detectron2.modeling import META_ARCH_REGISTRY
from safetensors import safe_open

from ovdet2.caches.region_cache import RegionCache
from ovdet2.config import load_config
from ovdet2.data.datasets.register import register_ov_dataset
from ovdet2.errors import UsageError
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.programs import build_vocabulary
from ovdet2.vlm.teacher import Teacher

NAMES = ("red square", "blue square")


@pytest.fixture(scope="module")
def options(tmp_path_factory, weights, captioned):
    """Overrides of a run of three steps, with boxes to name at its end."""
    folder = tmp_path_factory.mktemp("program")
    cfg = cases.config(captioned, weights, folder / "run", "SOLVER.MAX_ITER", 3)
    boxes = [{"id": i + 1, "image_id": 100 + i, "category_id": 1 + i % 2, "bbox": [4, 3, 30, 20]} for i in range(4)]
    boxes = [box | {"area": 600, "iscrowd": 0} for box in boxes]
    images = [{"id": 100 + i, "file_name": f"{i}.png", "height": 40, "width": 48} for i in range(4)]
    categories = [{"id": 1 + index, "name": name} for index, name in enumerate(NAMES)]
    data = {"images": images, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(data))
    register_ov_dataset("clim_program", folder / "boxes.json", captioned / "images", NAMES[:1], NAMES[1:])
    register_ov_dataset("clim_program_base", folder / "boxes.json", captioned / "images", NAMES)
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    return ["--config-file", str(path)], folder / "run"


def assert_tools_take(fingerprint, weights, folder):
    """The tools that make words, a region cache and priors write that they are of these weights."""
    teacher = ["--architecture", "clim-vit", "--pretrained", str(weights)]
    words, cache, priors = (str(folder / name) for name in ("words.safetensors", "cache", "priors.safetensors"))
    found = build_vocabulary.main(["--words", "red, blue", *teacher, "--device", "cpu", "--output", words])
    assert found.teacher == fingerprint
    source = ["--config-file", "ovshapes/vild_r18.yaml", "--dataset", "clim_program_base", "--boxes", "annotations"]
    manifest = build_region_cache.main([*source, *teacher, "--output", cache, "--workers", "0", "MODEL.DEVICE", "cpu"])
    assert manifest["complete"] and RegionCache(cache).teacher == fingerprint
    clip = ["--backend", "clip", "--dataset", "clim_program", "--num-workers", "0", "--device", "cpu"]
    build_concept_priors.main([*clip, *teacher, "--output", priors])
    assert ConceptPriors(priors).manifest["source"]["teacher"] == fingerprint.to_dict()


def test_train_publish_and_average_again(options, capsys):
    shared, output = options
    evaluation = ["CLIM.EVALUATION.DATASET", "clim_program", "CLIM.EVALUATION.SIDE", "48"]
    train.run([*shared, *evaluation])
    printed = capsys.readouterr().out
    assert "clim_a0.7.safetensors: clim-vit" in printed and "error of the dense map" in printed
    before, after = (json.loads((output / f"regions_{name}.json").read_text()) for name in ("before", "a0.7"))
    published = Teacher.load("clim-vit", str(output / "clim_a0.7.safetensors"))
    assert after["teacher"] == str(published.fingerprint) != before["teacher"]
    assert_tools_take(published.fingerprint, output / "clim_a0.7.safetensors", output)
    train.run([*shared, "--resume", "CLIM.AVERAGE", "1.0"])
    whole = Teacher.load("clim-vit", str(output / "clim_a1.safetensors"))
    original = Teacher.load("clim-vit", load_config(shared[1], [], add_clim_config).MODEL.TEACHER.PRETRAINED)
    for name, tensor in published.clip.state_dict().items():
        expected = 0.7 * whole.clip.state_dict()[name] + 0.3 * original.clip.state_dict()[name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    with safe_open(str(output / "clim_a1.safetensors"), framework="pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    assert manifest["captions"]["kind"] == "coco"
    assert manifest["clim"]["GRIDS"] == [2] and manifest["solver"]["MAX_ITER"] == 3 and manifest["average"] == 1.0


def test_text_only_and_the_share_of_composing(options, tmp_path, capsys):
    shared, _ = options
    train.run([*shared, "--text-only", "OUTPUT_DIR", str(tmp_path)])
    assert (tmp_path / "captions.safetensors").is_file() and not list(tmp_path.glob("*.pth"))
    train.run([*shared, "--measure-composing", "2", "OUTPUT_DIR", str(tmp_path)])
    assert "composing its mosaics" in capsys.readouterr().out and not list(tmp_path.glob("*.pth"))
    with pytest.raises(UsageError, match="number of steps"):
        train.run([*shared, "--measure-composing", "-1"])
    with pytest.raises(UsageError, match="AVERAGE is 1.5"):  # nothing is written
        train.run([*shared, "OUTPUT_DIR", str(tmp_path / "new"), "CLIM.AVERAGE", "1.5"])
    assert not (tmp_path / "new").exists()


def test_workers_load_what_the_process_itself_would(weights, captioned, tmp_path):
    class Rows:
        def __getitem__(self, row):
            return torch.tensor([float(row)])

    def batches(workers):
        cfg = cases.config(captioned, weights, tmp_path, "DATALOADER.NUM_WORKERS", workers)
        loader = iter(build_loader(cfg, build_source(cfg), Rows(), cases.teacher_of("clim-vit")))
        return [record for _ in range(2) for record in next(loader)]

    for one, other in zip(batches(0), batches(2), strict=True):
        assert np.array_equal(one["image"], other["image"]) and np.array_equal(one["text"], other["text"])


@pytest.mark.slow
def test_two_processes_train_and_publish(options, tmp_path):
    """The whole tower under DistributedDataParallel; spawned processes register the made-up architecture anew."""
    shared, _ = options
    model = ["MODEL.TEACHER.ARCHITECTURE", "ovshapes-vit", "MODEL.TEACHER.PRETRAINED", "embedded"]
    sizes = ["CLIM.TRAINABLE_BLOCKS", "-1", "CLIM.CANVAS", "48", "SOLVER.IMS_PER_BATCH", "14"]
    train.run([*shared, "--num-gpus", "2", *model, *sizes, "OUTPUT_DIR", str(tmp_path)])
    published = tmp_path / "clim_a0.7.safetensors"
    cfg = load_config("ovshapes/fvlm_vit.yaml", ["MODEL.TEACHER.PRETRAINED", str(published), "MODEL.DEVICE", "cpu"])
    detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)  # F-VLM, on the published weights
    teacher = Teacher.load("ovshapes-vit", published)
    assert detector.vocabulary.teacher == teacher.fingerprint
    trunk = {name: tensor for name, tensor in detector.state_dict().items() if name.endswith("conv1.weight")}
    assert any(torch.equal(tensor, teacher.clip.visual.conv1.weight) for tensor in trunk.values())
    losses = [json.loads(line)["total_loss"] for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert len(losses) == 3
