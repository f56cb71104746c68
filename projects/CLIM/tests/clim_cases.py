"""Two CLIP models of a few kilobytes and a configuration, for the tests."""

import json

import open_clip
import torch
from clim.config import add_clim_config
from detectron2.engine import HookBase

from ovdet2.config import load_config
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher, state_dict_sha256
from tests.micro import wave

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "clim-vit": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "clim-vit-wide": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
    "clim-vit-64px": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "clim-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}


def register_models(folder):
    """Tell open_clip of the architectures above."""
    for name, vision in VISION.items():
        if name not in open_clip.list_models():
            (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
            open_clip.add_model_config(folder / f"{name}.json")


def clip_of(name, dtype=torch.float32):
    """An open_clip model whose weights do not depend on a random generator."""
    clip = open_clip.create_model(name).eval()
    with torch.no_grad():
        for number, (key, parameter) in enumerate(clip.named_parameters()):
            values = wave(parameter.shape, 0.3 + 0.01 * number)
            if parameter.ndim > 1:
                parameter.copy_(values * (0.3 if "embedding" in key else 1.5 / parameter[0].numel() ** 0.5))
            elif parameter.ndim == 1:
                parameter.copy_(key.endswith("weight") + 0.1 * values)
    return clip.to(dtype)


def teacher_of(name, dtype=torch.float32):
    """A Teacher of :func:`clip_of`."""
    clip = clip_of(name, dtype)
    fingerprint = Fingerprint(name, "test", state_dict_sha256(clip.state_dict()))
    return Teacher(clip, open_clip.get_tokenizer(name), fingerprint).to(dtype)


def config(folder, weights, output, *overrides):
    """A frozen configuration of a run of six steps of seven images."""
    cfg = load_config("", ["MODEL.DEVICE", "cpu", *overrides], add_clim_config)
    defaults = {
        "MODEL.TEACHER.ARCHITECTURE": "clim-vit",
        "MODEL.TEACHER.PRETRAINED": str(weights),
        "CLIM.CAPTIONS": str(folder / "captions.json"),
        "CLIM.IMAGES": str(folder / "images"),
        "CLIM.GRIDS": [2],
        "CLIM.CANVAS": 48,
        "CLIM.CROP_SCALE": [0.5, 1.0],
        "CLIM.FLIP": 0.5,
        "CLIM.TRAINABLE_BLOCKS": 2,
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.MAX_BAD_IMAGES": 0,
        "SOLVER.IMS_PER_BATCH": 7,
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "SEED": 5,
        "OUTPUT_DIR": str(output),
    }
    given = set(overrides[::2])
    cfg.merge_from_list([part for key, value in defaults.items() if key not in given for part in (key, value)])
    cfg.freeze()
    return cfg


class Stop(HookBase):
    """Ends a run in the middle of a period of checkpoints, as a kill does."""

    def __init__(self, done):
        self.done = done

    def after_step(self):
        if self.trainer.iter + 1 == self.done:
            raise KeyboardInterrupt
