"""Names of devices that do not exist end with a sentence, before anything is loaded."""

import pytest
import torch

from ovdet2.config import get_cfg, settle_device
from ovdet2.errors import SetupError, UsageError
from ovdet2.io.devices import require_device
from ovdet2.predictor import Detector
from ovdet2.priors.local_model import LocalModel
from ovdet2.programs import build_region_cache, build_vocabulary
from ovdet2.vlm.teacher import Teacher

UNKNOWN = ["gpu", "mps", "mps:0", "CUDA", "cuda:", "cuda:-1", "cuda:a", "cuda 0", "0", "", "xpu", "meta", "cuda:0,1"]


@pytest.fixture(params=[0, 1, 2])
def gpus(request, monkeypatch):
    """The number of GPUs of the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize("device", UNKNOWN)
def test_unknown_devices(device, gpus, tmp_path):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = device
    for refuses in (
        lambda: require_device(device, "--device"),
        lambda: settle_device(cfg),
        lambda: build_region_cache.device_of(cfg),
        lambda: Teacher.load("ovshapes-vit", "embedded", device),
        lambda: LocalModel(tmp_path, device),
        lambda: Detector("ovshapes/vild_text_r18.yaml", "w.pth", ["MODEL.DEVICE", repr(device)]),
    ):
        with pytest.raises(UsageError, match='no device that ovdet2 runs on.*"cpu", "cuda" or'):
            refuses()
    with pytest.raises(UsageError, match="Apple's GPUs lack operations"):
        require_device("mps", "--device")


@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_numbered_devices(number, gpus):
    device = f"cuda:{number}"
    if number < gpus:
        require_device(device, "--device")
        return
    there = f"the {gpus} GPUs of this machine are numbered from 0" if gpus else "this machine has no GPU with CUDA"
    with pytest.raises(SetupError, match=f"--device is '{device}', but {there}"):
        require_device(device, "--device")
    cfg = get_cfg()
    cfg.MODEL.DEVICE = device
    with pytest.raises(SetupError, match="MODEL.DEVICE is 'cuda:"):
        settle_device(cfg)


def test_devices_that_exist(gpus):
    require_device("cpu", "--device")
    require_device(torch.device("cpu"), "--device")
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cuda"
    assert settle_device(cfg) == (gpus == 0) and cfg.MODEL.DEVICE == ("cuda" if gpus else "cpu")
    if not gpus:
        with pytest.raises(SetupError, match="no GPU with CUDA"):
            require_device("cuda", "--device")


def test_a_program_refuses_before_it_embeds_words(tmp_path):
    options = ["--words", "cat", "--architecture", "ovshapes-vit", "--pretrained", "embedded", "--device", "gpu"]
    with pytest.raises(UsageError, match="the device of the teacher .--device. is 'gpu'"):
        build_vocabulary.main([*options, "--output", str(tmp_path / "v.safetensors")])
    assert not (tmp_path / "v.safetensors").exists()
