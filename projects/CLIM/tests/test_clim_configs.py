"""The configurations that come with CLIM."""

from pathlib import Path

import open_clip
import pytest
from clim.config import add_clim_config
from clim.model import set_trainable
from clim.sources import SOURCES
from clim.trainer import check

from ovdet2.config import load_config
from ovdet2.data.mosaic import draw_mosaics
from ovdet2.engine import scaled
from ovdet2.errors import UsageError
from ovdet2.vlm.dense import stride_of
from ovdet2.vlm.teacher import register_embedded_models

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    """It names a model that is there, its canvas fits, every image of a step is in a whole round, no claim is made."""
    cfg = load_config(path, [], add_clim_config)
    register_embedded_models()
    clip = open_clip.create_model(cfg.MODEL.TEACHER.ARCHITECTURE)
    set_trainable(clip, cfg.CLIM.TRAINABLE_BLOCKS)
    assert cfg.CLIM.CANVAS % stride_of(clip.visual) == 0 and cfg.CLIM.SOURCE in SOURCES
    batch = cfg.SOLVER.IMS_PER_BATCH // max(1, cfg.SOLVER.REFERENCE_WORLD_SIZE)
    mosaics, rest = draw_mosaics(batch, cfg.CLIM.GRIDS, cfg.CLIM.SINGLES)
    assert batch % (29 + cfg.CLIM.SINGLES) == 0 and len(rest) * len(cfg.CLIM.GRIDS) == cfg.CLIM.SINGLES * len(mosaics)
    assert not cfg.TEST.EXPECTED_RESULTS
    assert f"--config-file projects/CLIM/configs/{path.name}" in path.read_text()


@pytest.mark.parametrize("processes", [1, 8, 16])
def test_scaled_to_the_processes_there_are(processes):
    cfg = load_config(CONFIGS[0].with_name("coco_vit_b16.yaml"), ["CLIM.EVALUATION.DATASET", ""], add_clim_config)
    found = scaled(cfg, processes)
    check(found, processes)
    assert found.SOLVER.IMS_PER_BATCH == 32 * processes and found.SOLVER.MAX_ITER == 92400 * 4 // processes
    with pytest.raises(UsageError, match="over 16 processes has no mosaic of .*4x4"):
        check(load_config("", [], add_clim_config), 16)  # 128 images, for however many processes


def test_unknown_key():
    with pytest.raises(UsageError, match="CLIM.CANVASS"):
        load_config("", ["CLIM.CANVASS", 3], add_clim_config)
    with pytest.raises(UsageError, match="CLIM"):
        load_config("", ["CLIM.CANVAS", 3])  # a key of this project, not of ovdet2
