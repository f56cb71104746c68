"""Loading processes that are killed, stopped, hang or cannot hand over a sample: a message, soon, and no process left."""

import multiprocessing
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.multiprocessing import reductions

from ovdet2 import doctor
from ovdet2.engine import start
from ovdet2.errors import SetupError
from ovdet2.io import loading, shared_memory
from ovdet2.io.loading import WatchedLoader, WorkerError
from tests.loading_cases import Failing
from tests.micro_training import micro_cfg


@pytest.fixture
def slow_fetch(monkeypatch):
    """The file descriptor of a sample is fetched late from its process."""
    rebuild = reductions.rebuild_storage_fd

    def late(*arguments):
        time.sleep(0.5)
        return rebuild(*arguments)

    late.__module__, late.__qualname__ = rebuild.__module__, rebuild.__qualname__
    monkeypatch.setattr(reductions, "rebuild_storage_fd", late)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(loading, "_LOOK_SECONDS", 0.3)


@pytest.mark.parametrize(
    "how, patience, words",
    [
        ("killed", 60, r"Loading process \d+ was killed by SIGKILL"),
        ("bus error", 60, r"Loading process \d+ was killed by SIGBUS"),
        ("stopped", 60, r"Loading process \d+ is stopped \(continue it with kill -CONT \d+"),
        ("hangs", 1.5, r"2 loading processes gave no batch for a long time"),
        ("full", 60, r"could not hand over a sample \(its error is printed above\)"),
    ],
)
def test_failures_end_with_the_remedy(quick, how, patience, words, capfd):
    handler = signal.getsignal(signal.SIGCHLD)
    began = time.monotonic()
    loader = WatchedLoader(Failing(how), 2, patience, batch_size=2, collate_fn=list)
    with pytest.raises(
        WorkerError, match=rf"{words}.*/dev/shm.*MB are free.*--shm-size.*DATALOADER.NUM_WORKERS; with 0"
    ):
        list(loader)
    assert time.monotonic() - began < 30 and issubclass(WorkerError, SetupError) and WorkerError.exit_code == 4
    assert not multiprocessing.active_children()
    assert handler is None or signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    if how == "full":
        assert "No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("how, words", [("stopped", "is stopped"), ("killed", "was killed by SIGKILL")])
def test_a_process_that_fails_while_a_sample_is_fetched_from_it(quick, slow_fetch, how, words, thread):
    def load():
        with pytest.raises(WorkerError, match=words):
            list(WatchedLoader(Failing(f"{how} after a batch"), 2, batch_size=2, collate_fn=list))
        return "told"

    if thread == "main":
        assert load() == "told"
    else:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(load).result(timeout=60) == "told"
    assert not multiprocessing.active_children()


def test_the_next_loader_works(quick):
    """Nothing of the failed one is left in this process, such as a pending error."""
    for how in ("stopped", "killed"):
        with pytest.raises(WorkerError):
            list(WatchedLoader(Failing(how), 2, batch_size=2, collate_fn=list))
        assert len(list(WatchedLoader(Failing("fine"), 2, batch_size=2, collate_fn=list))) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_slow_samples_are_waited_for_and_none_is_lost(quick, workers):
    loader = WatchedLoader(Failing("slow"), workers, 60, batch_size=2, collate_fn=list)
    assert [int(number) for batch in loader for number in batch] == list(range(40)) and len(loader) == 20


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_stays_what_it_is(workers):
    with pytest.raises(KeyError, match="seven"):
        list(WatchedLoader(Failing("a bug"), workers, batch_size=2, collate_fn=list))


def test_a_loader_that_is_left_ends_its_processes():
    batches = iter(WatchedLoader(Failing("fine"), 2, batch_size=2, collate_fn=list))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


class TestSharedMemory:
    @pytest.mark.parametrize("free, status, words", [
        (8 << 20, doctor.WRONG, r"only 8 are free.*--shm-size.*NUM_WORKERS to 0"),
        (64 << 20, doctor.NOTE, r"64 MiB are free.*--shm-size"),
        (8 << 30, doctor.OK, r"8 GiB are free"),
    ])  # fmt: skip
    def test_doctor(self, free, status, words):
        found = doctor.check_shared_memory((free, 64 << 30))
        assert found.status == status
        assert re.search(words, found.sentence)

    def test_doctor_looks_at_this_machine(self):
        assert "shared_memory" in doctor.CHECKS and doctor.CHECKS["shared_memory"]().status in ("ok", "note", "wrong")

    def test_a_system_without(self, monkeypatch, tmp_path):
        monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "nothing")
        assert shared_memory.shared_memory() is None and doctor.check_shared_memory().status == doctor.OK
        assert "MB are free" not in shared_memory.remedy()

    @pytest.mark.parametrize("free, workers, warned", [(50e6, 8, True), (50e6, 0, False), (500e9, 8, False)])
    def test_start_up_warns(self, monkeypatch, tmp_path, caplog, free, workers, warned):
        monkeypatch.setattr(start, "shared_memory", lambda: (int(free), int(1e12)))
        start._warn_of_shared_memory(micro_cfg(tmp_path, ["DATALOADER.NUM_WORKERS", str(workers)]))
        assert ("8 loading processes may need 0.2 GB of shared memory" in caplog.text) == warned
