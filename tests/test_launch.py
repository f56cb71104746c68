"""Starting processes: ends of every kind, several machines, signals, what is left behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ovdet2 import errors
from ovdet2.engine import launch
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.weights import DamagedFile
from tests import launch_cases
from tests.processes import run_program

launching = sys.modules[launch.__module__]  # ovdet2.engine.launch is the function
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that a busy machine may need to start processes
# What torchrun sets for a group of one.
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0"}  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def machine_command(function, *arguments, processes=1, machines=1, rank=0, address="auto"):
    """A program that starts the processes of one machine, and its arguments."""
    return ["tests/launch_cases.py", function, *map(str, (processes, machines, rank, address, *arguments))]


@contextmanager
def machine(tmp_path, function, *arguments, **options):
    """That program in an interpreter of its own, to which signals can be sent."""
    _, *rest = machine_command(function, *arguments, **options)
    command = [sys.executable, "-W", "ignore", "-m", "tests.launch_cases", *rest]
    output = tmp_path / "machine.txt"
    with open(output, "w") as stream:
        parent = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield SimpleNamespace(process=parent, output=output)
    finally:
        parent.kill()
        parent.wait()


def wait_for(paths):
    """Until all files are there; gives the pids that they begin with."""
    end = time.time() + PATIENCE
    while not all(path.is_file() and path.read_text() for path in paths):
        assert time.time() < end, f"none of {paths}"
        time.sleep(0.05)
    return [int(path.read_text().split()[0]) for path in paths]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestOneProcess:
    def test_is_called_directly(self):
        calls = []
        launch(calls.append, 1, args=("here",))
        assert calls == ["here"] and comm.get_world_size() == 1

    @pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 2, 2), (2, 0, 0)])
    def test_impossible_numbers(self, numbers):
        with pytest.raises(UsageError):
            launch(print, *numbers, use_cuda=False)

    @pytest.mark.parametrize("address", ["auto", "tcp://node0", "tcp://node0:many", "node0:2300", "file:///tmp/meet"])
    def test_several_machines_need_an_address(self, address):
        with pytest.raises(UsageError, match="tcp://"):
            launch(print, 1, 2, 0, address, use_cuda=False)


class TestUnderTorchrun:
    def test_joins_the_group(self, monkeypatch):
        """The variables torchrun sets, for a group of one."""
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
        seen = []
        launch(lambda: seen.append((torch.distributed.is_initialized(), comm.get_local_rank())), 8, use_cuda=False)
        assert seen == [(True, 0)] and not torch.distributed.is_initialized()

    def test_more_processes_than_gpus(self, monkeypatch):
        for name, value in (TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(UsageError, match="GPU 1.*shows 1"):
            launch(print, 1, use_cuda=True)

    @pytest.mark.parametrize("failing, code, words", [
        ("raise DataError('image 7 is damaged')", 3, "DataError: image 7 is damaged"),
        ("sys.exit(1)", 1, ""),
        ("raise KeyError('seven')", 1, "KeyError: 'seven'"),
    ])  # fmt: skip
    def test_error_leaves_without_the_interpreter(self, failing, code, words):
        """The destructors of a live process group may wait for the others, so nothing registered at exit is run."""
        program = f"""
import atexit, sys, types
engine = types.ModuleType("ovdet2.engine")  # the package's own __init__ imports the trainer, which is not needed here
engine.__path__ = [{str(ROOT / "ovdet2" / "engine")!r}]
sys.modules["ovdet2.engine"] = engine
from ovdet2.engine.launch import launch
from ovdet2.errors import DataError
def main():
    {failing}
atexit.register(print, "interpreter torn down")
launch(main, 1, use_cuda=False)
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env=os.environ | TORCHRUN,
                              capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
        assert done.returncode == code and words in done.stderr and "torn down" not in done.stdout
        assert ("Traceback" in done.stderr) == ("KeyError" in failing)


class TestSeveralProcesses:
    def test_error_of_rank_1_only(self, tmp_path, capfd, caplog):
        """Its kind and its message of several lines; nothing of torch's launcher beside it; handlers restored."""
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with pytest.raises(DataError, match="^image 7 is damaged:\nits json ends early$") as caught:
            launch(launch_cases.meet, 2, args=(tmp_path, 1), use_cuda=False)
        assert caught.value.exit_code == 3 and "elastic" not in caplog.text
        pids = wait_for([tmp_path / "rank0", tmp_path / "rank1"])
        assert not any(map(is_alive, pids))
        assert [(tmp_path / f"rank{rank}").read_text().split()[1:] for rank in (0, 1)] == [
            ["0", "0", "2", "2"], ["1", "1", "2", "2"]]  # fmt: skip
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
        assert "torchelastic" not in capfd.readouterr().err

    @pytest.mark.parametrize("how, code, words", [
        pytest.param("both leave", 0, "", marks=pytest.mark.slow),
        pytest.param("code 7", 7, "", marks=pytest.mark.slow),
        ("killed", 4, "SetupError: process 1 was killed by SIGKILL.*memory"),
        pytest.param("a bug", 1, r"(?s)Traceback.*KeyError: 'seven'", marks=pytest.mark.slow),
    ])  # fmt: skip
    def test_ends(self, tmp_path, how, code, words):
        done = run_program(*machine_command("end", how, processes=2))
        assert done.returncode == code, done.stderr
        assert re.search(words, done.stdout + done.stderr)

    @pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_signal_to_the_parent_ends_all(self, tmp_path, number, code):
        with machine(tmp_path, "outlive", tmp_path, processes=2) as parent:
            pids = wait_for([tmp_path / "rank0", tmp_path / "rank1"])
            parent.process.send_signal(number)
            assert parent.process.wait(PATIENCE) == code, parent.output.read_text()
        assert not any(map(is_alive, pids))
        assert "torchelastic" not in parent.output.read_text()


class TestSeveralMachines:
    @pytest.mark.parametrize("failing", [[], [1]])
    def test_two_on_loopback(self, tmp_path, failing):
        """Ranks follow the machines' numbers, though the second starts first; the failing one says why."""
        options = {"machines": 2, "address": f"tcp://127.0.0.1:{free_port()}"}
        commands = [machine_command("meet", tmp_path, *failing, rank=rank, **options) for rank in (1, 0)]
        with ThreadPoolExecutor(2) as pool:
            second, first = pool.map(lambda command: run_program(*command), commands)
        assert (first.returncode, second.returncode) == ((1, 3) if failing else (0, 0)), (first.stderr, second.stderr)
        assert ("DataError: image 7 is damaged:\nits json ends early" in second.stderr) == bool(failing)
        for rank in (0, 1):  # rank, rank on the machine, processes, processes on the machine
            assert (tmp_path / f"rank{rank}").read_text().split()[1:] == [str(rank), "0", "2", "1"]

    def test_busy_port(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            with pytest.raises(SetupError, match=rf"127.0.0.1:{port}.*--dist-url.*port is free"):
                launch(print, 1, 2, 0, f"tcp://127.0.0.1:{port}", use_cuda=False)

    def test_waiting_for_the_other_can_be_interrupted(self, tmp_path):
        port = free_port()
        with machine(tmp_path, "meet", tmp_path, machines=2, address=f"tcp://127.0.0.1:{port}") as parent:
            end = time.time() + PATIENCE
            while not listens(port):
                assert time.time() < end, parent.output.read_text()
                time.sleep(0.05)
            time.sleep(0.5)
            parent.process.send_signal(signal.SIGINT)
            assert parent.process.wait(PATIENCE) == -signal.SIGINT


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class TestReportedError:
    """What the parent makes of the files that torch's error handler wrote in the processes."""

    def recorded(self, tmp_path, monkeypatch, *ends):
        """The error raised when processes ended so, in that order: exceptions, or broken files."""
        monkeypatch.setattr(launching, "_MONITOR_INTERVAL", 0)
        for rank, end in enumerate(ends):
            path = tmp_path / str(rank) / "error.json"
            path.parent.mkdir()
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
            if isinstance(end, str):
                path.write_text(end)
            else:
                launching._report(end, spawned=True)
            os.utime(path, ns=(rank, rank))
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "0" / "error.json"))
        with pytest.raises(Exception) as caught:
            launching._raise_first_error(ChildFailedError("main", {0: failure}), tmp_path)
        return caught.value

    @pytest.mark.parametrize("kind", ["UsageError", "DataError", "CacheError", "SetupError", "NumericalError"])
    def test_keeps_its_kind_and_message(self, tmp_path, monkeypatch, kind):
        message = "a: b\nc: ü"
        error = self.recorded(tmp_path, monkeypatch, RuntimeError("an echo"), getattr(errors, kind)(message))
        assert type(error).__name__ == kind and str(error) == message

    def test_subclass_is_of_the_nearest_kind(self, tmp_path, monkeypatch):
        error = self.recorded(tmp_path, monkeypatch, DamagedFile("7.pth is empty"))
        assert type(error) is DataError and str(error) == "7.pth is empty"

    def test_first_of_several(self, tmp_path, monkeypatch):
        error = self.recorded(tmp_path, monkeypatch, DataError("first"), SetupError("second"))
        assert type(error) is DataError

    @pytest.mark.parametrize("broken", ["", json.dumps({"message": {"message": "DataError: half"}})[:-5]])
    def test_half_a_file_is_passed_over(self, tmp_path, monkeypatch, broken):
        error = self.recorded(tmp_path, monkeypatch, RuntimeError("an echo"), broken, UsageError("a wrong key"))
        assert type(error) is UsageError

    def test_another_exception(self, tmp_path, monkeypatch):
        error = self.recorded(tmp_path, monkeypatch, KeyError("seven"))
        assert isinstance(error, ChildFailedError)
