"""Signals: a training stops after the step, saves, and its resumed run equals an uninterrupted one bit for bit."""

import os
import signal
import time

import pytest
import torch

from ovdet2.engine import Trainer
from ovdet2.engine.stop import StopRequest
from tests import signal_cases
from tests.micro_training import micro_cfg, write_data
from tests.processes import SERVER

PATIENCE = 120
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def wait_for(path):
    end = time.time() + PATIENCE
    while not (path.is_file() and (path.read_text() or path.name == "evaluating")):
        assert time.time() < end, f"no {path}"
        time.sleep(0.02)


def started(root, function, *arguments):
    process = SERVER.Process(target=signal_cases.in_process, args=(root, root / "output.txt", function, *arguments))
    process.start()
    return process


def ended(process):
    process.join(PATIENCE)
    return process.exitcode


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_bit_for_bit(root, number, workers):
    process = started(root, signal_cases.run, "out", 7, workers)
    wait_for(root / "waiting")
    os.kill(process.pid, number)
    (root / "go").touch()
    assert ended(process) == CODES[number], (root / "output.txt").read_text()
    output = (root / "output.txt").read_text()
    assert f"Stopped by {number.name} after iteration 7" in output and "Traceback" not in output
    assert (root / "out" / "last_checkpoint").read_text() == "model_0000007.pth"
    assert not (root / "out" / "run.lock").exists()
    resumed = signal_cases.run(root, "out", workers=workers, resume=True)
    assert resumed.start_iter == 8
    signal_cases.run(root, "straight", workers=workers)
    found, expected = (weights(root / name / "model_final.pth") for name in ("out", "straight"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_it_immediately(root, number):
    process = started(root, signal_cases.run, "out", 7)
    wait_for(root / "waiting")
    os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, number)
    assert ended(process) in (-number, CODES[number]) and not list((root / "out").glob("*.pth"))


def test_a_signal_to_the_loading_processes_as_well(root):
    """As a scheduler sends it: the step that cannot be loaded any more is not counted."""
    process = started(root, signal_cases.run, "out", 7, 2)
    wait_for(root / "waiting")
    children = [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    for pid in [process.pid, *children]:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    (root / "go").touch()
    assert ended(process) == 143, (root / "output.txt").read_text()
    resumed = signal_cases.run(root, "out", workers=2, resume=True)
    assert resumed.start_iter in (7, 8)  # the batch may have been loaded before
    signal_cases.run(root, "straight", workers=2)
    found, expected = (weights(root / name / "model_final.pth") for name in ("out", "straight"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("period, newest", [(5, "model_0000004.pth"), (0, "model_final.pth")])
def test_within_an_evaluation(root, period, newest):
    """It is left, and the training before it saved; after the last step the run is complete but for its figures."""
    process = started(root, signal_cases.evaluate_for_ever, "out", period)
    wait_for(root / "evaluating")
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143, (root / "output.txt").read_text()
    assert (root / "out" / "last_checkpoint").read_text() == newest
    assert "Traceback" not in (root / "output.txt").read_text()


def test_the_step_of_a_checkpoint_is_saved_once(root):
    process = started(root, signal_cases.run, "out", 7, 0, False, ["SOLVER.CHECKPOINT_PERIOD", "8"])
    wait_for(root / "waiting")
    os.kill(process.pid, signal.SIGTERM)
    (root / "go").touch()
    assert ended(process) == 143
    assert (root / "output.txt").read_text().count("Stopped by") == 1
    assert [path.name for path in (root / "out").glob("*.pth")] == ["model_0000007.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_of_two_processes(root, number):
    """A signal to the parent: both processes agree on the step, and save it once."""
    process = started(root, signal_cases.run_in_two, "out", 7)
    wait_for(root / "waiting")
    os.kill(process.pid, number)
    time.sleep(1)
    (root / "go").touch()
    assert ended(process) == CODES[number], (root / "output.txt").read_text()
    assert (root / "out" / "last_checkpoint").read_text() == "model_0000007.pth"
    saved = torch.load(root / "out" / "model_0000007.pth", weights_only=True)
    assert saved["iteration"] == 7 and len(saved["trainer"]["random"]) == 2


def test_handlers_are_restored(root):
    before = [signal.getsignal(number) for number in CODES]
    Trainer(micro_cfg(root / "out", ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"])).train()
    assert [signal.getsignal(number) for number in CODES] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert request.number == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
