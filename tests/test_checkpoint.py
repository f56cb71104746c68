"""Checkpoints: whole or absent after a kill or a full disk, and never run."""

import io
import itertools
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ovdet2
from ovdet2.config import Method, load_config
from ovdet2.engine import AtomicCheckpointer
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.files import write_safetensors
from ovdet2.modeling.part import Part, register_parts

ASSETS = Path(ovdet2.__file__).parent / "assets"


def model_of(value, size=8):
    model = nn.Linear(size, size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(model):
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).unique()
    assert len(values) == 1, "weights of two checkpoints are mixed"
    return values.item()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Exploit:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder, moment):
    """Save version 2 over version 1 of the same name; die in the middle of the file (moment 0), or before the
    ``moment``-th call that makes something durable: fsync, rename, fsync of the folder, of file and of pointer."""
    torch.set_num_threads(1)
    calls = itertools.count(1)

    def dying(function):
        return lambda *args: die() if next(calls) == moment else function(*args)

    if moment == 0:
        whole = io.BytesIO()
        torch.save({"model": model_of(2.0).state_dict()}, whole)
        torch.save = lambda data, path: (Path(path).write_bytes(whole.getvalue()[:900]), die())
    os.fsync, os.replace = dying(os.fsync), dying(os.replace)
    AtomicCheckpointer(model_of(2.0), str(folder)).save("model_final", iteration=2)


def save_for_ever(folder, _):
    torch.set_num_threads(1)
    for number in itertools.count(1):
        AtomicCheckpointer(model_of(float(number), 512), str(folder)).save("model_final", iteration=number)


def run_in_child(target, *arguments):
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def assert_whole(folder):
    """The pointed-to checkpoint loads and is of one version, which is returned."""
    size = 512 if (folder / "model_final.pth").stat().st_size > 100_000 else 8
    model = model_of(0.0, size)
    state = AtomicCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    assert value_of(model) == state["iteration"] >= 1
    return state["iteration"]


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_each_moment_of_a_save(tmp_path, moment):
    AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_final", iteration=1)
    child = run_in_child(save_and_die, tmp_path, moment)
    child.join()
    # Six calls make a save durable; the seventh does not exist, and the save ends.
    assert child.exitcode == (0 if moment == 7 else -signal.SIGKILL)
    # The rename of the file is the second of them.
    assert assert_whole(tmp_path) == (1 if moment <= 2 else 2)


@pytest.mark.parametrize("seconds", [0.05, 0.13, 0.21])
def test_killed_at_any_time(tmp_path, seconds):
    child = run_in_child(save_for_ever, tmp_path, None)
    while not (tmp_path / "last_checkpoint").exists():
        assert child.is_alive()
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert_whole(tmp_path)


def test_full_disk_harms_nothing(tmp_path, monkeypatch):
    AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_0000001")
    real_save = torch.save

    def half_then_full(data, path):
        real_save(data, path)
        with open(path, "r+b") as handle:
            handle.truncate(100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half_then_full)
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(SetupError, match=r"No space left.*free some disk space.*model_0000001"):
            AtomicCheckpointer(model_of(2.0), str(tmp_path)).save(name)
    assert names(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    model = model_of(0.0)
    AtomicCheckpointer(model, str(tmp_path)).resume_or_load("")
    assert value_of(model) == 1.0


@pytest.mark.parametrize("kept_bytes", [0, 1, 30, 1000, -1])
def test_truncated_latest_falls_back(tmp_path, kept_bytes, caplog):
    for number in (1, 2):
        AtomicCheckpointer(model_of(float(number)), str(tmp_path)).save(f"model_{number:07d}", iteration=number)
    latest = tmp_path / "model_0000002.pth"
    latest.write_bytes(latest.read_bytes()[:kept_bytes])
    model = model_of(0.0)
    state = AtomicCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert value_of(model) == state["iteration"] == 1
    assert "model_0000002.pth" in caplog.text

    (tmp_path / "model_0000001.pth").write_bytes(b"")
    with pytest.raises(DataError, match="none of the checkpoints"):
        AtomicCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_flipped_byte_in_weights_is_found(tmp_path, caplog):
    """torch.load does not look at the check sums: it would give a weight with another value."""
    for number in (1, 2):
        AtomicCheckpointer(model_of(float(number), 64), str(tmp_path)).save(f"model_{number:07d}")
    path = tmp_path / "model_0000002.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    model = model_of(0.0, 64)
    AtomicCheckpointer(model, str(tmp_path)).resume_or_load("")
    assert value_of(model) == 1.0 and "another checksum" in caplog.text


def test_keeps_the_newest_and_the_pointed(tmp_path):
    for number in (9, 1, 2, 3, 4):  # 9: of an earlier, longer run in the same folder
        AtomicCheckpointer(model_of(1.0), str(tmp_path)).save(f"model_{number:07d}")
        os.utime(tmp_path / f"model_{number:07d}.pth", ns=(number % 9 * 10**9,) * 2)
    AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_final")
    assert names(tmp_path) == ["last_checkpoint", "model_0000003.pth", "model_0000004.pth", "model_final.pth"]
    AtomicCheckpointer(model_of(1.0), str(tmp_path), keep=0).save("model_0000005")
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.bin"])
def test_malicious_pickle_is_refused(tmp_path, name):
    trace = tmp_path / "executed"
    payload = {"model": {"weight": np.zeros(2)}, "__author__": Exploit(trace)}
    path = tmp_path / name
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path)
    with pytest.raises(DataError, match=f"(?s){name}.*could run code|could run code.*safetensors"):
        AtomicCheckpointer(model_of(0.0)).load(str(path))
    assert not trace.exists()


@pytest.mark.parametrize("reached", ["eval", "getattr", "numpy.load", "os.system", "torch.load"])
def test_pickle_names_outside_numpy_arrays_are_refused(tmp_path, reached):
    module, _, function = reached.rpartition(".")
    path = tmp_path / "weights.pkl"
    path.write_bytes(f"c{module or 'builtins'}\n{function}\n(S'1'\ntR.".encode())
    with pytest.raises(DataError, match="was not opened"):
        AtomicCheckpointer(model_of(0.0)).load(str(path))


@pytest.mark.parametrize("protocol", [2, 4])
def test_zoo_pickle_is_read(tmp_path, protocol):
    weights = {name: np.full(p.shape, 3.0, np.float32) for name, p in model_of(0.0).named_parameters()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "zoo"}, protocol=protocol))
    model = model_of(0.0)
    AtomicCheckpointer(model).load(str(path))
    assert value_of(model) == 3.0


def test_trunk_that_comes_with_ovdet2_is_found_inside_a_model(tmp_path):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    url = "ovdet2://backbones/ovshapes_r18.safetensors"
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.bottom_up = build_resnet_backbone(load_config("base/ovshapes_r18.yaml"), ShapeSpec(channels=3))
    AtomicCheckpointer(model, str(tmp_path)).load(url, checkpointables=[])
    saved = load_file(ASSETS / "backbones" / "ovshapes_r18.safetensors")
    loaded = model.backbone.bottom_up.state_dict()
    assert {name for name in loaded if not name.endswith("num_batches_tracked")} == set(saved)
    assert all(torch.equal(loaded[name], value.float()) for name, value in saved.items())
    with pytest.raises(DataError, match="nothing.safetensors is not among the files that come with ovdet2"):
        AtomicCheckpointer(model, str(tmp_path)).load("ovdet2://backbones/nothing.safetensors")


def test_safetensors_are_read_and_damaged_ones_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, model_of(4.0).state_dict(), {"schema": "any"})
    model = model_of(0.0)
    AtomicCheckpointer(model).load(str(path))
    assert value_of(model) == 4.0
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="weights.safetensors is not a complete"):
        AtomicCheckpointer(model).load(str(path))


@pytest.mark.parametrize("weights", ["http://127.0.0.1:9/R-50.pkl", "/nowhere/model.pth", "unknown://R-50.pkl"])
def test_unreachable_weights_name_the_remedy(weights):
    with pytest.raises(DataError, match=f"(?s){weights}.*set MODEL.WEIGHTS"):
        AtomicCheckpointer(model_of(0.0)).load(weights)


def test_shapes_and_names_that_do_not_fit_are_reported(tmp_path, caplog):
    caplog.set_level("INFO")
    AtomicCheckpointer(nn.Linear(8, 3), str(tmp_path)).save("other")
    model = nn.ModuleDict({"extra": nn.Linear(8, 8)})
    model.register_parameter("weight", nn.Parameter(torch.zeros(8, 8)))
    AtomicCheckpointer(model).load(str(tmp_path / "other.pth"))
    assert "(3, 8) in the checkpoint but (8, 8) in the model" in caplog.text  # weight
    assert "extra.{bias, weight}" in caplog.text  # missing
    assert "not used by the model:\n  bias" in caplog.text  # unexpected
    [line] = [record.getMessage() for record in caplog.records if record.name == "ovdet2.engine.checkpoint"]
    assert line.endswith(
        "other.pth; not in the file, so at their initial values: extra.weight, extra.bias; of another shape in the file, "
        "so at their initial values: weight; in the file, but not in the model: bias"
    )


class TestLoadAll:
    """What is evaluated holds no weight that was drawn at random."""

    def model(self, size=8, rows=3):
        return nn.Sequential(model_of(0.0), nn.BatchNorm1d(size), nn.Sequential(Words(rows)))

    def saved(self, folder, model, drop=()):
        weights = {name: value for name, value in model.state_dict().items() if name not in drop}
        torch.save({"model": weights, "iteration": 7}, folder / "weights.pth")
        return str(folder / "weights.pth")

    def test_vocabulary_and_step_counts_may_be_absent(self, tmp_path):
        drop = ("1.num_batches_tracked", "2.0.rows")
        assert AtomicCheckpointer(self.model()).load_all(self.saved(tmp_path, self.model(), drop))["iteration"] == 7
        AtomicCheckpointer(self.model()).load_all(self.saved(tmp_path, self.model(rows=7)))

    def test_missing_and_misshaped_weights_are_named(self, tmp_path):
        path = self.saved(tmp_path, self.model(size=9), drop=("0.bias",))
        with pytest.raises(DataError, match=r"weights.pth does not hold 5 .*1.weight \(\[9\].*\[8\].*0.bias \(missing"):
            AtomicCheckpointer(self.model()).load_all(path)
        with pytest.raises(DataError, match="0.bias"):
            AtomicCheckpointer(self.model(9), str(tmp_path)).resume_or_load(path, resume=True, complete=True)
        AtomicCheckpointer(self.model(9)).load(path)  # to start from, it will do

    def test_the_weights_that_training_starts_from_are_no_detector(self, tmp_path):
        model = nn.ModuleDict({"backbone": model_of(0.0), "head": model_of(0.0)})
        path = self.saved(tmp_path, model, drop=("head.weight", "head.bias"))
        with pytest.raises(DataError, match="weights.pth holds only the backbone, from which training starts"):
            AtomicCheckpointer(model).load_all(path)
        path = self.saved(tmp_path, model, drop=("head.bias",))
        with pytest.raises(DataError, match="does not hold 1 of the model's weights: head.bias"):
            AtomicCheckpointer(model).load_all(path)

    @pytest.mark.parametrize("weights", ["http://127.0.0.1:9/R-50.pkl", "/nowhere/model.pth"])
    def test_no_advice_to_start_from_scratch(self, weights):
        with pytest.raises(DataError, match="set MODEL.WEIGHTS to a file, to evaluate or predict|to the file, to eval"):
            AtomicCheckpointer(self.model()).load_all(weights)

    def test_nothing_to_load(self, tmp_path):
        with pytest.raises(UsageError, match="MODEL.WEIGHTS"):
            AtomicCheckpointer(self.model(), str(tmp_path)).resume_or_load("", resume=True, complete=True)


class TestParts:
    """Weights of what methods add to a detector."""

    def model(self, value, *parts):
        """With parts of a weight each, given as (name, whether for training only, old prefixes)."""
        model = nn.ModuleDict({"body": model_of(value)})
        built = []
        for name, training_only, old_weights in parts:
            part = Part()
            part.name, part.training_only, part.old_weights = name, training_only, old_weights
            part.head = model_of(value)
            built.append(part)
        model.parts = register_parts(model, built)
        return model

    def test_old_names_are_accepted(self, tmp_path, caplog):
        old = self.model(3.0)
        old.roi_heads = nn.ModuleDict({"head": model_of(3.0), "header": nn.ModuleDict()})
        AtomicCheckpointer(old, str(tmp_path)).save("old")
        model = self.model(0.0, ("new", False, {"roi_heads.head.": "new.head."}))
        AtomicCheckpointer(model).load_all(str(tmp_path / "old.pth"))
        assert value_of(model) == 3.0
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

    def test_todays_names_are_left_as_they_are(self, tmp_path):
        AtomicCheckpointer(self.model(3.0, ("new", False, {})), str(tmp_path)).save("today")
        model = self.model(0.0, ("new", False, {"roi_heads.head.": "new.head."}))
        AtomicCheckpointer(model).load_all(str(tmp_path / "today.pth"))
        assert value_of(model) == 3.0

    def test_a_part_of_training_alone_may_be_missing_on_either_side(self, tmp_path, caplog, monkeypatch):
        method = Method()
        method.name, method.training_only = "for_training", True
        monkeypatch.setattr("ovdet2.engine.checkpoint.find_methods", lambda: (method,))
        trained, bare = self.model(3.0, (method.name, True, {})), self.model(0.0)
        AtomicCheckpointer(trained, str(tmp_path)).save("trained")
        AtomicCheckpointer(bare).load_all(str(tmp_path / "trained.pth"))
        assert value_of(bare) == 3.0
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        AtomicCheckpointer(bare, str(tmp_path)).save("bare")
        AtomicCheckpointer(trained).load_all(str(tmp_path / "bare.pth"))
        needed = self.model(0.0, ("needed", False, {}))
        with pytest.raises(DataError, match="needed.head"):
            AtomicCheckpointer(needed).load_all(str(tmp_path / "bare.pth"))


def test_iteration_of_other_weights_is_not_that_of_the_run(tmp_path):
    AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_final", iteration=41)
    here = AtomicCheckpointer(model_of(0.0), str(tmp_path / "new"))
    assert here.resume_or_load(str(tmp_path / "model_final.pth"), resume=True) == {}
    assert value_of(here.model) == 1.0
    assert AtomicCheckpointer(model_of(0.0), str(tmp_path)).resume_or_load("", resume=True) == {"iteration": 41}


class Words(nn.Module):
    """Keeps its own rows and notes what the checkpoint had."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("rows", torch.full((rows, 2), float(rows)))
        self.saved = None

    def adopt_saved_vocabulary(self, saved):
        self.saved = saved


def test_vocabulary_of_the_run_wins(tmp_path, caplog):
    """Contract 13: a checkpoint of another K loads whole, its vocabulary is handed over, nothing is reported."""
    saved = nn.Sequential(model_of(5.0), nn.Sequential(Words(7)))
    AtomicCheckpointer(saved, str(tmp_path)).save("model")
    model = nn.Sequential(model_of(0.0), nn.Sequential(Words(3)))
    caplog.clear()
    AtomicCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert value_of(model[0]) == 5.0
    assert model[1][0].rows.shape == (3, 2) and list(model[1][0].saved) == ["rows"]
    assert model[1][0].saved["rows"].shape == (7, 2)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_pointer_is_what_detectron2_reads(tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    AtomicCheckpointer(model_of(6.0), str(tmp_path)).save("model_final", iteration=3)
    model = model_of(0.0)
    assert DetectionCheckpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 3
    assert value_of(model) == 6.0
