"""A disk that is full, or read-only: exit code 4 and one sentence from every writer; odd configurations are refused."""

import errno
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ovdet2.config import load_config
from ovdet2.engine import Trainer, launch
from ovdet2.engine.start import require_numbers
from ovdet2.errors import SetupError, UsageError, exit_on_error, full_disk
from ovdet2.io.files import atomic_path, write_json, write_text
from ovdet2.predictor import _memory_explained
from tests.micro_training import micro_cfg, write_data

REPORTED = sys.modules[launch.__module__]._report
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG]


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "a.json")

    return fail


@pytest.mark.parametrize("number", FULL)
class TestEveryWriter:
    def test_of_files(self, tmp_path, monkeypatch, number):
        (tmp_path / "a.json").write_text("old")
        monkeypatch.setattr(pathlib.Path, "write_text", failing(number))
        for write in (write_text, write_json):
            with pytest.raises(SetupError, match=r"a.json cannot be written: .*free space, or choose another folder"):
                write(tmp_path / "a.json", "new")
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"old"

    def test_at_the_rename(self, tmp_path, monkeypatch, number):
        monkeypatch.setattr(os, "fsync", failing(number))
        with pytest.raises(SetupError, match="a.bin cannot be written"), atomic_path(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"new")
        assert not list(tmp_path.iterdir())

    def test_that_writes_without_these(self, capsys, number):
        """Anywhere in a program: the end is the same."""
        with pytest.raises(SystemExit) as ended, exit_on_error():
            failing(number)()
        error = capsys.readouterr().err
        assert ended.value.code == 4 and error.startswith("SetupError: writing a.json: the file system ")
        assert error.count("\n") == 1

    def test_in_a_process_of_a_group(self, tmp_path, monkeypatch, number):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
        assert REPORTED(OSError(number, "no"), spawned=True) == 4
        assert json.loads((tmp_path / "error.json").read_text())["message"]["message"].startswith(
            "SetupError: the file"
        )


def test_other_errors_of_files_stay_what_they_are(tmp_path):
    assert full_disk(OSError(errno.ENOENT, "no")) is None and full_disk(OSError("no number")) is None
    with pytest.raises(FileNotFoundError), exit_on_error():
        failing(errno.ENOENT)()
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        open(tmp_path / "nothing")


def test_a_real_full_disk(tmp_path):
    """/dev/full takes nothing."""
    program = "from ovdet2.errors import exit_on_error\nwith exit_on_error():\n  open('/dev/full', 'w', buffering=1).write('a\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 4 and "the file system is full" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="the folder .*file/a cannot be made"):
        write_text(tmp_path / "file" / "a" / "b.txt", "")


class TestConfigurations:
    @pytest.mark.parametrize("content, words", [
        ("_BASE_: missing.yaml", "_BASE_ names .*missing.yaml, which does not exist"),
        ("_BASE_: a.yaml", "its own _BASE_"),
        ("_BASE_: .", "_BASE_ names"),
        ("_BASE_: http://127.0.0.1:9/a.yaml", "_BASE_ names the address http.*download"),
        ("_BASE_: 5", "a.yaml"),
        ("- a\n- b", "a.yaml"),
        ("just text", "a.yaml"),
        ("\x00", "a.yaml"),
        ("SOLVER: 5", "a.yaml"),
        ("SOLVER: {MAX_ITER: many}", "MAX_ITER"),
        ("MODEL: {WEIGHTS: [1]}", "WEIGHTS|a.yaml"),
    ])  # fmt: skip
    def test_odd_files(self, tmp_path, content, words):
        path = tmp_path / "a.yaml"
        path.write_text(content)
        with pytest.raises(UsageError, match=words):
            load_config(path)

    @pytest.mark.parametrize("key, value", [
        ("SOLVER.MAX_ITER", "0"), ("SOLVER.MAX_ITER", "-5"), ("DATALOADER.NUM_WORKERS", "-1"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine"), ("SOLVER.WARMUP_METHOD", "none"), ("SOLVER.BASE_LR", "-0.1"),
        ("SOLVER.BASE_LR", "float('nan')"),
    ])  # fmt: skip
    def test_odd_numbers(self, tmp_path, monkeypatch, key, value):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        write_data(tmp_path)
        if "nan" in value:
            cfg = SimpleNamespace(
                SOLVER=SimpleNamespace(MAX_ITER=1, BASE_LR=float("nan")), DATALOADER=SimpleNamespace(NUM_WORKERS=0)
            )
            with pytest.raises(UsageError, match="SOLVER.BASE_LR is nan"):
                require_numbers(cfg)
            return
        with pytest.raises(UsageError, match=f"{key} is .*{value}.*: (give|choose)"):
            Trainer(micro_cfg(tmp_path / "out", [key, value]))


class TestMemoryOfTheDetector:
    BATCH = [{"image": torch.zeros(3, 48, 64)}, {"image": torch.zeros(3, 40, 50)}]

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory."),
            MemoryError(),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            RuntimeError("not enough memory: you tried to allocate 9 bytes."),
        ],
    )
    def test_names_sizes_words_and_keys(self, error):
        words = "2 images of 64x48, 50x40 pixels and 1,203 words: .*fewer words.*INPUT.MIN_SIZE_TEST"
        with pytest.raises(SetupError, match=words), _memory_explained(self.BATCH, 1203):
            raise error

    @pytest.mark.parametrize("error", [RuntimeError("shapes differ"), SetupError("no"), KeyError("seven")])
    def test_other_errors_stay(self, error):
        with pytest.raises(type(error), match=str(error.args[0])), _memory_explained(self.BATCH, 1):
            raise error
