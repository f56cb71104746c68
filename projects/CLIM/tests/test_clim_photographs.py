"""CLIM on captioned photographs with a real architecture: the loss falls, and an interrupted run is the same."""

from pathlib import Path

import open_clip
import pytest
import torch
from clim.config import add_clim_config
from clim.sources import build_source
from clim.trainer import CLIMTrainer, prepare
from clim_cases import Stop
from safetensors.torch import save_file

from ovdet2.config import load_config
from ovdet2.io.files import write_json

MINI = Path(__file__).resolve().parents[4] / "shared" / "data" / "coco_mini"
STEPS = 20


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Function of (name of a run, resume, step to stop after) that gives (probe losses before and after, losses)."""
    if not MINI.is_dir():
        pytest.skip("../shared/data/coco_mini is not here")
    folder = tmp_path_factory.mktemp("photographs")
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-16")
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, str(folder / "w.safetensors"))

    def config(name):
        options = {
            "MODEL.DEVICE": "cpu",
            "MODEL.TEACHER.ARCHITECTURE": "ViT-B-16",
            "MODEL.TEACHER.PRETRAINED": str(folder / "w.safetensors"),
            "CLIM.CAPTIONS": str(folder / "captions.json"),
            "CLIM.IMAGES": str(folder / "images"),
            "CLIM.TEXT_TABLE": str(folder / "captions.safetensors"),
            "CLIM.CANVAS": 320,
            "DATALOADER.NUM_WORKERS": 0,
            "SOLVER.IMS_PER_BATCH": 32,
            "SOLVER.BASE_LR": 1e-3,
            "SOLVER.WARMUP_ITERS": 0,
            "SOLVER.MAX_ITER": STEPS,
            "SOLVER.CHECKPOINT_PERIOD": STEPS // 2,
            "SEED": 0,
            "OUTPUT_DIR": str(folder / name),
        }
        cfg = load_config("", [part for pair in options.items() for part in pair], add_clim_config)
        cfg.freeze()
        return cfg

    join_captions(folder)
    return lambda name, resume=False, stop=None: train(config(name), resume, stop)


def join_captions(folder):
    """The captioned images of both splits as one json: 33 images, 165 captions."""
    from ovdet2.io.files import read_json

    images, annotations = [], []
    (folder / "images").mkdir()
    for split in ("train2017", "val2017"):
        data = read_json(MINI / "annotations" / f"captions_{split}.json")
        captioned = {entry["image_id"] for entry in data["annotations"]}
        images += [image for image in data["images"] if image["id"] in captioned]
        annotations += data["annotations"]
        for image in data["images"]:
            (folder / "images" / image["file_name"]).symlink_to(MINI / split / image["file_name"])
    write_json(folder / "captions.json", {"images": images, "annotations": annotations})


def train(cfg, resume, stop):
    prepare(cfg)
    source = build_source(cfg)
    assert (len(source), source.num_texts) == (33, 165)
    trainer = CLIMTrainer(cfg)
    other = cfg.clone()
    other.defrost()
    other.SEED = 1  # other crops and captions than the run's, in another order
    probe = next(iter(trainer.build_train_loader(other)))

    @torch.no_grad()
    def probe_loss():
        return trainer._trained(probe)["loss_clim"].item()

    before = probe_loss()
    if stop:
        trainer.register_hooks([Stop(stop)])
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    losses = {step: loss for loss, step in trainer.storage.history("total_loss").values()}
    return before, probe_loss(), losses


@pytest.mark.slow
def test_photographs(run_of):
    before, after, losses = run_of("whole")
    assert len(losses) == STEPS and after < before
    _, _, first = run_of("cut", stop=STEPS // 2)
    _, resumed_after, later = run_of("cut", resume=True)
    assert list(later) == list(range(STEPS // 2, STEPS))
    assert first | later == losses and resumed_after == after
