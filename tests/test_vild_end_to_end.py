"""ViLD through the programs a user types, on a small OV-Shapes: detector, cache, distillation, prediction, leaks."""

import json
import shutil

import pytest
import torch

import train_net
from ovdet2 import Detector
from ovdet2.caches.region_cache import RegionCache
from ovdet2.config import load_config
from ovdet2.data.datasets.ov_shapes import OV_SHAPES, ensure_generated
from ovdet2.io.images import read_image
from ovdet2.modeling import build_teacher
from ovdet2.vlm.crops import embed_regions
from tests.test_end_to_end import CONFIG, WITHOUT_PICTURES, program, report_of
from tests.test_end_to_end import SMALL as SMALL_RUN

SMALL = [*SMALL_RUN, *WITHOUT_PICTURES]
TOP = 9
TRAIN_JSON = "ov_shapes/annotations/ov_shapes_train_base.json"


def build_cache(root, weights, output, *overrides):
    config = ["--config-file", f"configs/{CONFIG}", "--dataset", "ov_shapes_train_base", "--output", output]
    choice = ["--top", TOP, "--images-per-shard", 7]
    return program(
        "tools/build_region_cache.py", *config, *choice, *SMALL, "MODEL.WEIGHTS", weights, *overrides, root=root
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of data sets, weights of three steps of ViLD-text, its region cache)."""
    root, output = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("output")
    ensure_generated(root, counts={"train2017": 16, "val2017": 4}, workers=1)
    done = program(
        "train_net.py", "--config-file", f"configs/{CONFIG}", *SMALL, "OUTPUT_DIR", output / "text", root=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = output / "text" / "model_final.pth"
    done = build_cache(root, weights, output / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    return root, weights, output / "cache"


def train(root, config, cache, output, *overrides):
    distilled = ["MODEL.VILD.REGION_CACHE", cache, "OUTPUT_DIR", output, *overrides]
    return program("train_net.py", "--config-file", f"configs/ovshapes/{config}.yaml", *SMALL, *distilled, root=root)


def annotations_of(root):
    return json.loads((root / TRAIN_JSON).read_text())


def with_annotations(root, copy, annotations):
    """A copy of the data sets whose training json has other annotations."""
    shutil.copytree(root, copy)
    (copy / TRAIN_JSON).write_text(json.dumps(annotations_of(root) | {"annotations": annotations}))
    return copy


def test_cache_holds_the_embeddings_of_its_boxes(world):
    """Each image's regions, cut and embedded again from the file."""
    root, _, folder = world
    cache = RegionCache(folder)
    teacher = build_teacher(load_config(CONFIG))
    images = annotations_of(root)["images"]
    assert len(cache) == len(images) and len(cache.manifest["shards"]) == -(-len(images) // 7)
    for image in images[:5]:
        found = cache.regions(image["id"])
        assert 0 < len(found) <= TOP and (found.ann_ids == -1).all()
        assert (found.scores[:-1] >= found.scores[1:]).all() and (found.scores <= 1).all()
        pixels = torch.from_numpy(read_image(root / "ov_shapes" / "train2017" / image["file_name"]).copy())
        again = embed_regions(teacher, pixels.permute(2, 0, 1), found.boxes_xyxy)
        assert torch.allclose(found.embeddings.float(), again, atol=2e-3)


def test_proposals_do_not_depend_on_annotations(world, tmp_path):
    """The boxes of the cache cannot have been taken from annotations: without any, the same come out."""
    root, weights, folder = world
    data = annotations_of(root)
    bare = with_annotations(root, tmp_path / "datasets", [])
    done = build_cache(bare, weights, tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = RegionCache(folder), RegionCache(tmp_path / "cache")
    for image in data["images"]:
        one, two = first.regions(image["id"]), second.regions(image["id"])
        assert torch.equal(one.boxes_xyxy, two.boxes_xyxy) and torch.equal(one.embeddings, two.embeddings)


def test_novel_annotations_stop_cache_and_training(world, tmp_path):
    """A single novel box in the training json: neither program runs, and both name it."""
    root, weights, folder = world
    annotations = annotations_of(root)["annotations"]
    novel = {**annotations[0], "id": 10**8, "category_id": OV_SHAPES.novel[0][0]}
    leaking = with_annotations(root, tmp_path / "datasets", [*annotations, novel])
    done = build_cache(leaking, weights, tmp_path / "cache")
    assert done.returncode == 3 and "novel" in done.stderr and "100000000" in done.stderr, done.stderr[-1000:]
    assert not list(tmp_path.glob("cache/shard*"))
    done = train(leaking, "vild_r18", folder, tmp_path / "out")
    assert done.returncode == 3 and "novel" in done.stderr, done.stderr[-1000:]


def test_a_detector_that_saw_novel_boxes_may_not_propose(world, tmp_path):
    root, weights, _ = world
    state = torch.load(weights, weights_only=True)
    prefix = "roi_heads.box_predictor.cls_score.vocabulary."
    manifest = json.loads(bytes(state["model"][prefix + "manifest"].tolist()))
    state["model"][prefix + "base_mask"][48] = True  # the first novel class
    torch.save(state, tmp_path / "seen.pth")
    done = build_cache(root, tmp_path / "seen.pth", tmp_path / "cache")
    assert done.returncode == 3 and f"trained with boxes of {manifest['names'][48]}" in done.stderr, done.stderr[-1000:]


def test_rerun_does_nothing_and_a_lost_shard_comes_back(world, tmp_path):
    root, weights, folder = world
    copy = tmp_path / "cache"
    shutil.copytree(folder, copy)
    hashes = {shard["file"]: shard["sha256"] for shard in RegionCache(copy).manifest["shards"]}
    (copy / "shard-00001.safetensors").unlink()
    before = (copy / "shard-00000.safetensors").stat().st_mtime_ns
    refused = train(root, "vild_r18", copy, tmp_path / "out")
    assert refused.returncode == 3 and "complete it with: ovdet2 cache build" in refused.stderr
    assert build_cache(root, weights, copy).returncode == 0
    assert {shard["file"]: shard["sha256"] for shard in RegionCache(copy).manifest["shards"]} == hashes
    assert (copy / "shard-00000.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("config", ["vild_r18", "vild_image_r18", "vild_ensemble_r18"])
def test_variant_trains_evaluates_and_predicts(world, tmp_path, config):
    root, _, folder = world
    done = train(root, config, folder, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [line["loss_distillation"] for line in metrics if "loss_distillation" in line]
    assert losses and all(0 < loss < 100 for loss in losses)  # that it falls: tests/test_coco_mini.py, on photographs
    assert report_of(tmp_path)["detections"] > 0
    predictor = Detector(f"ovshapes/{config}.yaml", tmp_path / "model_final.pth", SMALL)  # needs no cache
    predictor.set_vocabulary("striped moon, red mug")
    image = next((root / "ov_shapes" / "val2017").glob("*.jpg"))
    assert set(predictor.predict(image).pred_classes.tolist()) <= {0, 1}


def test_weight_zero_is_vild_text_bit_for_bit(world, tmp_path):
    """Three steps of the ViLD configuration without its weight end in the very weights of ViLD-text."""
    root, weights, folder = world
    assert train(root, "vild_r18", folder, tmp_path, "MODEL.VILD.WEIGHT", 0.0).returncode == 0
    first, second = (torch.load(path, weights_only=True)["model"] for path in (weights, tmp_path / "model_final.pth"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_distil(world, tmp_path, monkeypatch):
    root, _, folder = world
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    arguments = ["--config-file", "configs/ovshapes/vild_ensemble_r18.yaml", "--num-gpus", "2", *SMALL]
    paths = ["MODEL.VILD.REGION_CACHE", str(folder), "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    train_net.run([*arguments, *paths, "DATALOADER.NUM_WORKERS", "1"])
    assert "loss_distillation" in (tmp_path / "metrics.json").read_text()


def test_cache_of_another_teacher_stops_training(world, tmp_path):
    """Same name, other weights: only the hash tells."""
    root, _, folder = world
    copy = tmp_path / "cache"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["teacher"]["weights_sha256"] = "f" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = train(root, "vild_r18", copy, tmp_path / "out")
    assert done.returncode == 3 and "ffffffffffff" in done.stderr and "the vocabulary" in done.stderr, done.stderr[
        -1000:
    ]
