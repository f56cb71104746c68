"""OUTPUT_DIR: one training at a time, and no remains of killed ones."""

import argparse
import json
import os
import time

import pytest

from ovdet2.caches.claims import STALE_SECONDS, Claims
from ovdet2.engine import Trainer, setup
from ovdet2.engine.run_folder import claim_folder, is_claimed, release_folder, sweep_folder
from ovdet2.errors import SetupError
from tests.micro_training import micro_cfg, micro_opts, write_data
from tests.processes import SERVER, run_program


def hold(folder, connection):
    """In a process: claim a folder, and hold it until told to end."""
    claim_folder(folder)
    connection.send("held")
    connection.recv()


@pytest.fixture
def held(tmp_path):
    """A folder in which another process trains."""
    folder = tmp_path / "out"
    folder.mkdir()
    mine, theirs = SERVER.Pipe()
    process = SERVER.Process(target=hold, args=(folder, theirs))
    process.start()
    assert mine.recv() == "held"
    yield folder, process
    mine.send("end")
    process.join()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


class TestClaim:
    def test_of_another_process_refuses(self, held):
        folder, process = held
        assert is_claimed(folder)
        with pytest.raises(SetupError, match=rf"out is in use by a training, process {process.pid} on .*OUTPUT_DIR"):
            claim_folder(folder)

    def test_of_a_killed_process_is_taken_over(self, held):
        folder, process = held
        process.kill()
        process.join()
        assert not is_claimed(folder) and claim_folder(folder)
        release_folder(folder)
        assert list(folder.iterdir()) == []

    def test_is_one_per_process(self, tmp_path):
        assert claim_folder(tmp_path) and not claim_folder(tmp_path / ".") and not is_claimed(tmp_path)
        release_folder(tmp_path)
        release_folder(tmp_path)
        assert claim_folder(tmp_path)
        release_folder(tmp_path)

    @pytest.mark.parametrize("age, refused", [(0, True), (2 * STALE_SECONDS, False)])
    def test_of_another_machine_lives_by_its_heartbeat(self, tmp_path, age, refused):
        """A container that was killed: its process cannot be looked up."""
        path = tmp_path / "run.lock"
        path.write_text(json.dumps(Claims(tmp_path)._owner | {"machine": "node7 0 0", "pid": 12}))
        os.utime(path, (time.time() - age,) * 2)
        assert is_claimed(tmp_path) == refused
        if refused:
            with pytest.raises(SetupError, match="process 12 on node7"):
                claim_folder(tmp_path)
        else:
            assert claim_folder(tmp_path)
            release_folder(tmp_path)

    @pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00", '{"pid": "x"}'])
    def test_of_wrong_bytes(self, tmp_path, content):
        (tmp_path / "run.lock").write_text(content)
        with pytest.raises(SetupError, match="in use by another training"):
            claim_folder(tmp_path)


class TestTraining:
    def test_writes_nothing_into_the_folder_of_another(self, held, root):
        """Neither log, configuration nor checkpoint; with --resume too."""
        folder, process = held
        before = sorted(path.name for path in folder.iterdir())
        for switch in ([], ["--resume"]):
            done = run_program("train_net.py", *switch, *micro_opts(folder))
            assert done.returncode == 4 and f"in use by a training, process {process.pid}" in done.stderr
            assert "Traceback" not in done.stderr
        assert sorted(path.name for path in folder.iterdir()) == before
        trainer = Trainer(micro_cfg(folder))
        with pytest.raises(SetupError, match="in use"):
            trainer.train()
        assert not list(folder.glob("*.pth"))

    def test_releases_its_folder(self, root):
        options = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
        setup(argparse.Namespace(config_file="", opts=micro_opts(root / "out") + options))
        assert (root / "out" / "run.lock").is_file()
        Trainer(micro_cfg(root / "out", options)).train()
        assert not (root / "out" / "run.lock").exists()

    def test_an_evaluation_of_a_living_run_keeps_its_configuration(self, held):
        folder, _ = held
        (folder / "config.yaml").write_text("of the training")
        setup(argparse.Namespace(config_file="", opts=micro_opts(folder), eval_only=True))
        assert (folder / "config.yaml").read_text() == "of the training"


def _dead_pid():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_remains_of_killed_processes_are_removed(tmp_path):
    dead = _dead_pid()
    remains = [f".model_{number:07d}.pth.{dead}-0123abcd.tmp" for number in range(3)]
    kept = [
        f".model_0000009.pth.{os.getpid()}-0123abcd.tmp",
        ".mine.tmp",
        "model_0000001.pth",
        f".a.{dead}-0123abcd.txt",
    ]
    for name in (*remains, *kept):
        (tmp_path / name).write_bytes(b"0" * 1000)
    sweep_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_run_removes_them_at_its_start(root):
    (root / "out").mkdir()
    left = root / "out" / f".model_final.pth.{_dead_pid()}-0123abcd.tmp"
    left.write_bytes(b"0")
    setup(argparse.Namespace(config_file="", opts=micro_opts(root / "out")))
    release_folder(root / "out")
    assert not left.exists()
