"""The programs around the region cache, called as functions on a small OV-Shapes."""

import json
import shutil
from pathlib import Path

import bench_cache
import pytest
import torch

from ovdet2.caches.region_cache import RegionCache
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.programs import build_region_cache, inspect_cache

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ["--config-file", "configs/ovshapes/vild_text_r18.yaml", "--dataset", "ov_shapes_train_base"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    ensure_generated(folder, counts={"train2017": 24, "val2017": 4}, workers=1)
    return folder


@pytest.fixture(autouse=True)
def data_folder(root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def annotated(root, tmp_path_factory):
    """A cache of the annotated boxes, built through the program."""
    output = tmp_path_factory.mktemp("cache") / "annotations"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.chdir(ROOT)
        build(output, "--boxes", "annotations")
    return output


def build(output, *options):
    return build_region_cache.main(
        [*CONFIG, "--output", str(output), "--images-per-shard", "10", "--workers", "0", *map(str, options)]
    )


def truth(root):
    return json.loads((root / "ov_shapes" / "annotations" / "ov_shapes_train_base.json").read_text())


def test_every_annotation_has_its_region(annotated, root):
    cache = RegionCache(annotated)
    assert cache.manifest["regions"] == len(truth(root)["annotations"])
    for annotation in truth(root)["annotations"]:
        embeddings, found = cache.of_annotations(annotation["image_id"], [annotation["id"]])
        assert found.all() and abs(embeddings.float().norm() - 1) < 1e-3
    assert cache.missing == 0
    assert cache.manifest["command"].endswith("--boxes annotations")


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    assert build(tmp_path / "none", "--boxes", "annotations", "--dry-run") is None
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("images, about", "boxes", "GB", "hours", "MB of memory"))
    assert float(printed.split("least ")[1].split(",")[0]) > 0.999  # cosine to Pillow's crops
    assert not (tmp_path / "none").exists()


def test_boxes_of_a_file_and_every_choice_is_in_the_manifest(tmp_path, root):
    images = truth(root)["images"]
    results = [{"image_id": images[0]["id"], "bbox": [5, 5, 40, side], "score": 0.5} for side in (3, 30, 60)]
    (tmp_path / "boxes.json").write_text(json.dumps(results))
    choice = ["--boxes", tmp_path / "boxes.json", "--min-side", 16, "--top", 50, "--nms", 0.9, "--crop", "pad_square"]
    manifest = build(tmp_path / "cache", *choice, "--scales", "1.0", "--dtype", "bf16", "--batch-size", 3)
    recipe = manifest["recipe"]
    assert manifest["regions"] == 2 and len(recipe["boxes"]["file_sha256"]) == 64
    assert recipe["boxes"]["filters"] == {"min_score": None, "min_side": 16.0, "nms": 0.9, "top": 50}
    assert {key: recipe["crops"][key] for key in ("policy", "scales", "side", "filter", "dtype")} == {
        "policy": "pad_square", "scales": [1.0], "side": 96, "filter": "bilinear", "dtype": "bf16",
    }  # fmt: skip
    assert recipe["crops"]["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    assert recipe["crops"]["std"] == pytest.approx([0.2686, 0.2613, 0.2758], abs=1e-4)
    facts = manifest["shards"][0]
    assert facts["batch_size"] == 3 and facts["device"] == "cpu" and facts["threads"] == torch.get_num_threads()
    with pytest.raises(CacheError, match="'dtype': 'bf16'.* instead of .*'dtype': 'fp32'"):
        build(tmp_path / "cache", *choice, "--scales", "1.0", "--batch-size", 3)


def test_a_teacher_that_is_not_the_detectors(tmp_path):
    other = ["--architecture", "ovshapes-vit", "--pretrained", "embedded"]
    manifest = build(tmp_path / "c", "--boxes", "annotations", *other)
    assert manifest["recipe"]["teacher"]["architecture"] == "ovshapes-vit"


def test_shares_of_an_array_make_the_same_cache(annotated, tmp_path, capsys):
    assert build(tmp_path / "cache", "--boxes", "annotations", "--shard", "1/2") is None
    assert "are left to other processes" in capsys.readouterr().out
    manifest = build(tmp_path / "cache", "--boxes", "annotations", "--shard=0/2")
    assert manifest["shards"] == RegionCache(annotated).manifest["shards"]
    assert "--shard" not in manifest["command"]


def test_ranks_of_torchrun_begin_apart(annotated, tmp_path, monkeypatch):
    order = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    writer = build_region_cache.CacheWriter
    write = writer.write
    monkeypatch.setattr(writer, "write", lambda self, index, *rest: order.append(index) or write(self, index, *rest))
    manifest = build(tmp_path / "cache", "--boxes", "annotations")
    assert order == [1, 2, 0] and manifest["shards"] == RegionCache(annotated).manifest["shards"]


def test_unreadable_images_are_few_and_named(root, tmp_path, capsys):
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(copy))
        images = truth(root)["images"]
        path = copy / "ov_shapes" / "train2017" / images[3]["file_name"]
        path.write_bytes(path.read_bytes()[:300])
        manifest = build(tmp_path / "cache", "--boxes", "annotations")
        assert images[3]["file_name"] in capsys.readouterr().out
        assert list(manifest["shards"][0]["unreadable"]) == [str(images[3]["id"])]
        with pytest.raises(DataError, match="1 images cannot be used, DATALOADER.MAX_BAD_IMAGES is 0"):
            build(tmp_path / "strict", "--boxes", "annotations", "DATALOADER.MAX_BAD_IMAGES", "0")
        assert list(RegionCache(tmp_path / "cache").unreadable) == [str(images[3]["id"])]
        assert build(tmp_path / "cache", "--boxes", "annotations", "--verify") == manifest  # still unreadable
        shutil.copy(root / "ov_shapes" / "train2017" / images[3]["file_name"], path)
        mended = build(tmp_path / "cache", "--boxes", "annotations", "--verify")
        assert not RegionCache(tmp_path / "cache").unreadable
        assert mended["shards"][1:] == manifest["shards"][1:] and mended["regions"] > manifest["regions"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--boxes", "proposals", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["--boxes", "nowhere.json"], "nowhere.json does not exist"),
        (["--boxes", "annotations", "MODEL.TEACHER.ARCHITECTURE", "ViT-Q"], "no architecture 'ViT-Q'"),
    ],
)
def test_what_cannot_be_built(tmp_path, options, message):
    with pytest.raises((UsageError, DataError), match=message):
        build(tmp_path / "cache", *options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("options", [["--shard", "2/2"], ["--nms", "0"], ["--batch-size", "0"], ["--crop", "squash"]])
def test_arguments_that_make_no_sense(tmp_path, options):
    with pytest.raises(SystemExit):
        build(tmp_path / "cache", *options)


def inspect(cache, output, *options):
    return inspect_cache.main([str(cache), "--output", str(output), *options])


def test_inspection_names_the_annotated_regions(annotated, tmp_path, capsys):
    found = inspect(annotated, tmp_path, "--device", "cpu")
    printed = capsys.readouterr().out
    assert found["accuracy"] > 50 and "chance 2.1%" in printed and "regions.png" in printed
    assert "regions per image: least" in printed and (tmp_path / "regions.png").stat().st_size > 1000
    asked = inspect(annotated, tmp_path, "--device", "cpu", "--words", "red moon, plain circle")
    assert asked["regions"] == found["regions"]


def test_inspection_with_words_of_another_teacher(annotated, tmp_path):
    from ovdet2.vlm.fingerprint import Fingerprint
    from ovdet2.vocabulary import Vocabulary

    rows = torch.nn.functional.normalize(torch.randn(1, 128), dim=1)
    Vocabulary(("moon",), [True], rows, Fingerprint("ViT-B-32", "openai", "b" * 64), "single").save(tmp_path / "v")
    with pytest.raises(CacheError, match="ovshapes-resnet / embedded .5ff1ed10cd57.*ViT-B-32 / openai .b{12}"):
        inspect(annotated, tmp_path, "--device", "cpu", "--vocabulary", str(tmp_path / "v"))


def test_the_benchmark_measures_what_it_says(root):
    options = [
        "--count",
        "3",
        "--boxes",
        "2",
        "--rounds",
        "1",
        "--cached-images",
        "5",
        "--regions",
        "20",
        "--dim",
        "16",
    ]
    images = root / "ov_shapes" / "train2017"
    found = bench_cache.main(["--images", str(images), "--architectures", "ovshapes-vit", *options])
    names = {"builder", "encoder", "loop", "RegionCache", "memory map", "plain", "with cached regions"}
    assert {key[-1] for key in found} == names and all(row.ratio > 0 for row in found.values())
