"""The builder of region caches under fire: killed at random moments, started twice, with damaged shards. Minutes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ovdet2.caches.region_cache import RegionCache
from ovdet2.data.datasets.ov_shapes import ensure_generated

ROOT = Path(__file__).resolve().parents[1]
KILLS = 30
IMAGES, PER_SHARD, BOXES = 150, 3, 60
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of data sets, file of boxes, an uninterrupted build)."""
    root = tmp_path_factory.mktemp("datasets")
    ensure_generated(root, counts={"train2017": IMAGES, "val2017": 4}, workers=1)
    data = json.loads((root / "ov_shapes" / "annotations" / "ov_shapes_train_base.json").read_text())
    rng, results = np.random.default_rng(0), []
    for image in data["images"]:
        limits = np.array([image["width"], image["height"]])
        for _ in range(BOXES):
            corner = rng.random(2) * (limits - 20)
            sides = 10 + rng.random(2) * (limits - corner - 10)
            results.append({"image_id": image["id"], "bbox": [*corner, *sides], "score": rng.random()})
    (root / "boxes.json").write_text(json.dumps(results))
    whole = root / "whole"
    assert start(root, whole).wait(timeout=600) == 0
    return root, whole


def start(root, output, *options, threads=2):
    """A builder process; its output goes to <output>.log."""
    output.parent.mkdir(exist_ok=True, parents=True)
    fixed = ["--config-file", "configs/ovshapes/vild_text_r18.yaml", "--dataset", "ov_shapes_train_base"]
    choice = ["--boxes", root / "boxes.json", "--nms", 1, "--images-per-shard", PER_SHARD, "--workers", 0]
    command = [sys.executable, "tools/build_region_cache.py", *fixed, *choice, "--output", output, *options]
    env = os.environ | {"DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": str(threads)}
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=log, stderr=log)


def wait_for_a_claim(output, process):
    while process.poll() is None:
        for lock in output.glob("*.lock"):
            try:
                if json.loads(lock.read_text())["pid"] == process.pid:
                    return
            except (OSError, ValueError):
                continue
        time.sleep(0.01)


def assert_same(found, wanted):
    names = sorted(p.name for p in wanted.glob("*.safetensors"))
    assert len(names) == RegionCache(wanted).manifest["planned_shards"] >= 40
    assert sorted(p.name for p in found.iterdir()) == ["manifest.json", *names]  # no lock, no temporary file
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    assert RegionCache(found).manifest["shards"] == RegionCache(wanted).manifest["shards"]


def test_killed_thirty_times_and_finished_by_two_at_once(world):
    root, whole = world
    output, rng, at_work = root / "killed", random.Random(0), 0
    for number in range(KILLS):
        process = start(root, output)
        if number % 3:
            wait_for_a_claim(output, process)
            time.sleep(rng.uniform(0, 1.5))
        else:
            time.sleep(rng.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        at_work += any(output.glob("*.lock"))
        if number == KILLS // 2:
            with pytest.raises(Exception, match="is incomplete.*complete it with: ovdet2 cache build"):
                RegionCache(output)
    assert at_work >= KILLS // 3, "most kills came before or after the work: the test tests nothing"
    first, second = start(root, output), start(root, output)
    assert first.wait(timeout=600) == second.wait(timeout=600) == 0
    assert_same(output, whole)


def test_two_at_once_of_which_one_is_killed(world):
    root, whole = world
    output = root / "two"
    first, second = start(root, output), start(root, output)
    wait_for_a_claim(output, first)
    time.sleep(1.0)
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=600) == 0
    assert_same(output, whole)


def test_tasks_of_an_array(world):
    root, whole = world
    output = root / "array"
    tasks = [start(root, output, "--shard", f"{number}/2") for number in range(2)]
    assert [task.wait(timeout=600) for task in tasks] == [0, 0]
    assert_same(output, whole)


def test_a_second_run_changes_nothing_and_a_flipped_bit_costs_one_shard(world):
    root, whole = world
    output = root / "again"
    shutil.copytree(whole, output)
    times = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    assert start(root, output).wait(timeout=600) == 0
    assert times == {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    path = output / "shard-00007.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert start(root, output, "--verify").wait(timeout=600) == 0
    assert "1 shards to build anew [7]" in Path(f"{output}.log").read_text()
    assert_same(output, whole)
    after = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    assert {name for name in times if times[name] != after[name]} == {"manifest.json", path.name}


def test_another_number_of_threads(world):
    root, whole = world
    output = root / "one_thread"
    assert start(root, output, threads=1).wait(timeout=600) == 0
    first, second = RegionCache(whole), RegionCache(output)
    for image_id in first.image_ids():
        cosines = (first.regions(image_id).embeddings.float() * second.regions(image_id).embeddings.float()).sum(dim=1)
        assert cosines.min() >= 0.999
