"""Claims on work that several processes share."""

import json
import multiprocessing
import os
import time

from ovdet2.caches import claims
from ovdet2.caches.claims import Claims


def test_a_claim_is_held_by_one_until_released(tmp_path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a") and not second.take("a") and second.take("b")
        first.release("a")
        assert second.take("a") and not first.take("a")
        first.release("a")  # not its own any more
        assert not first.take("a")
    assert list(tmp_path.iterdir()) == []


def _die_holding(folder):
    Claims(folder).take("a")
    (folder / f".a.safetensors.{os.getpid()}-0123.tmp").write_text("half")
    os._exit(1)


def test_a_dead_process_of_this_machine_is_seen_at_once_and_its_traces_removed(tmp_path):
    other = tmp_path / ".b.safetensors.1-0123.tmp"
    other.write_text("of somebody else")
    process = multiprocessing.get_context("fork").Process(target=_die_holding, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "a.lock").is_file()
    with Claims(tmp_path) as mine:
        assert mine.take("a")
        assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "a.lock"]


def test_a_dead_process_is_seen_before_its_parent_takes_note(tmp_path):
    """A killed child stays in the table of processes until it is waited for."""
    pid = os.fork()
    if pid == 0:
        Claims(tmp_path).take("a")
        os._exit(0)
    deadline = time.monotonic() + 30
    with Claims(tmp_path, stale_seconds=1000) as mine:
        while not ((tmp_path / "a.lock").is_file() and mine.take("a")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    os.waitpid(pid, 0)


def test_a_claim_of_a_process_that_hangs_is_given_up(tmp_path):
    with Claims(tmp_path) as mine:
        owner = mine._owner
    (tmp_path / "a.lock").write_text(json.dumps(owner | {"mark": "whose number is now ours"}))
    with Claims(tmp_path, stale_seconds=0.1) as mine:
        assert not mine.take("a")
        time.sleep(0.15)
        assert mine.take("a")


def test_silence_of_another_machine_is_waited_out(tmp_path):
    lock = tmp_path / "a.lock"
    lock.write_text(json.dumps({"machine": "another", "pid": 1, "mark": "x"}))
    with Claims(tmp_path, stale_seconds=0.3) as mine:
        assert not mine.take("a")
        time.sleep(0.2)
        os.utime(lock)  # its heart beats
        assert not mine.take("a")
        time.sleep(0.2)
        assert not mine.take("a")
        time.sleep(0.2)
        assert mine.take("a")


def test_the_temporary_file_of_a_silent_machine_is_left_alone(tmp_path):
    """It may only have been suspended, and would trip over the loss of its file."""
    (tmp_path / "a.lock").write_text(json.dumps({"machine": "another", "pid": 17, "mark": "x"}))
    (tmp_path / ".a.safetensors.17-0123.tmp").write_text("half")
    with Claims(tmp_path, stale_seconds=0.05) as mine:
        mine.take("a")
        time.sleep(0.1)
        assert mine.take("a") and (tmp_path / ".a.safetensors.17-0123.tmp").is_file()


def test_a_process_number_of_another_container_says_nothing(tmp_path, monkeypatch):
    """Same host name, other process numbers: 99999999 is nobody here."""
    with Claims(tmp_path) as mine:
        owner = mine._owner
    monkeypatch.setattr(claims, "_machine", lambda: owner["machine"] + " another container")
    (tmp_path / "a.lock").write_text(json.dumps(owner | {"pid": 99999999, "mark": "x"}))
    with Claims(tmp_path, stale_seconds=60) as mine:
        assert not mine.take("a") and not mine.take("a")


def test_a_folder_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(claims.os, "link", refuse)
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a") and not second.take("a")
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_hours_behind_does_not_matter(tmp_path):
    lock = tmp_path / "a.lock"
    lock.write_text(json.dumps({"machine": "another", "pid": 1, "mark": "x"}))
    os.utime(lock, (1, 1))
    with Claims(tmp_path, stale_seconds=60) as mine:
        assert not mine.take("a") and not mine.take("a")


def test_a_torn_claim_is_given_up_like_any_other(tmp_path):
    (tmp_path / "a.lock").write_text('{"machine": "anoth')
    with Claims(tmp_path, stale_seconds=0.1) as mine:
        assert not mine.take("a")
        time.sleep(0.15)
        assert mine.take("a")


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    with Claims(tmp_path) as mine:
        mine.take("a")
        os.utime(tmp_path / "a.lock", (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "a.lock").stat().st_mtime < 1000:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_sweep_leaves_young_files(tmp_path):
    for name, age in (("young", 0), ("old", 10_000)):
        path = tmp_path / f".{name}.5-1.tmp"
        path.write_text("x")
        os.utime(path, (time.time() - age,) * 2)
    with Claims(tmp_path, stale_seconds=60) as mine:
        mine.sweep()
    assert [p.name for p in tmp_path.iterdir()] == [".young.5-1.tmp"]


def _contend(folder, queue, start):
    start.wait()
    with Claims(folder) as mine:
        won = [name for name in map(str, range(50)) if mine.take(name)]
        queue.put(won)
        start.wait()  # hold them until all have tried


def test_of_many_that_try_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Barrier(4)
    workers = [context.Process(target=_contend, args=(tmp_path, queue, start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    won = sum((queue.get(timeout=60) for _ in workers), [])
    for worker in workers:
        worker.join()
    assert sorted(won) == sorted(map(str, range(50)))
