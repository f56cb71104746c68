"""The harness of the benchmarks: turns, ratios, warm-up, errors, memory, tables."""

import argparse

import numpy as np
import pytest
import torch

from ovdet2.bench.harness import Benchmark, Candidate, Comparison, positive, row_text, size_of, size_text, table_head
from ovdet2.bench.memory import peak_above
from ovdet2.bench.turns import Elapsed, Row, naming, rows_of, take_turns
from ovdet2.errors import NumericalError, SetupError, UsageError
from tests import benchmark_cases


class FakeClock:
    """Stands still but for :meth:`sleep`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_turns_alternate_and_the_first_is_not_counted():
    clock, order = FakeClock(), []

    def passes(name, *seconds):
        left = list(seconds)

        def run():
            order.append(name)
            clock.sleep(left.pop(0))
            return len(left)

        return run

    found = take_turns({"a": passes("a", 90, 1, 2, 3), "b": passes("b", 70, 2, 6, 6)}, 3, clock)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [elapsed.seconds for elapsed in found["a"]] == [1, 2, 3]
    assert found["b"] == [Elapsed(2, 2), Elapsed(6, 1), Elapsed(6, 0)]
    rows = rows_of(found, "a")
    assert rows["a"] == Row(2, 1, 1, 1) and rows["b"] == Row(6, 3, 2, 3)  # median of 6 / 2; within a turn 2, 3 and 2
    assert take_turns({"a": lambda: clock.sleep(5)}, 1, clock, warm_up=0)["a"] == [Elapsed(5)]


@pytest.mark.parametrize("options, passes", [([], 5), (["--warm-up", "0"], 2), (["--warm-up", "1"], 3)])
def test_the_number_of_warm_up_turns_is_an_option(options, passes):
    calls = []
    counted = [Candidate("counted", lambda: None, lambda *_: calls.append(1))]
    benchmark = Benchmark("none", "", {}, lambda _: iter([Comparison(counted)]), turns=2, warm_up=3, memory=False)
    benchmark.main([*options, "--device", "cpu"])
    assert len(calls) == passes
    with pytest.raises(UsageError, match="--warm-up is -1: .* at least 0"):
        benchmark.main(["--warm-up", "-1"])


def test_a_pass_may_take_its_own_time():
    found = take_turns({"a": lambda: Elapsed(7.0, "value")}, 2, FakeClock())
    assert found["a"] == [Elapsed(7.0, "value")] * 2


def test_an_error_names_the_candidate():
    def fail(error):
        raise error

    with pytest.raises(NumericalError, match="candidate 'b': the loss is not finite"):
        take_turns({"a": lambda: None, "b": lambda: fail(NumericalError("the loss is not finite"))}, 1, FakeClock())
    with pytest.raises(ZeroDivisionError) as caught, naming("c"):
        fail(ZeroDivisionError())
    assert any("'c'" in note for note in caught.value.__notes__)


def test_memory_of_a_known_allocation():
    assert 63 < peak_above(lambda: np.ones(2**26, np.uint8).sum()) < 75
    assert peak_above(lambda: None) < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_of_a_known_allocation_on_a_gpu():
    assert 64 <= peak_above(lambda: torch.ones(2**26, dtype=torch.uint8, device="cuda"), "cuda") < 70


def test_a_benchmark_prints_and_returns_its_rows(capsys):
    threads = torch.get_num_threads()
    found = benchmark_cases.main(["--rounds", 3, "--no-memory", "--sizes", "1", "8", "--threads", "2"])
    assert list(found) == [("1", "1"), ("1", "8"), ("2", "1"), ("2", "8")] and torch.get_num_threads() == threads
    assert found["1", "1"].ratio == 1 and found["1", "8"].ratio > 0 and found["1", "8"].peak is None
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("filling, ") and title.endswith("2 threads, wall clock, timed turns: 3, ratios to 1")
    assert lines[0] == "| scale | candidate | median, s | ratio (range) | peak, MiB |"
    assert all(line.count("|") == lines[0].count("|") for line in lines) and len(lines) == 6


def test_memory_is_measured_in_a_separate_process():
    ((key, row),) = benchmark_cases.main(["--turns", 0, "--scales", "2"]).items()
    assert key == ("2", "40") and 79 < row.peak < 100 and row.seconds is None
    with pytest.raises(SetupError, match="(?s)memory of the candidate '0' .*nothing to fill"):
        benchmark_cases.main(["--turns", 0, "--sizes", "0"])


@pytest.mark.parametrize("options", [["--turns", "-1"], ["--turns", "0", "--no-memory"], ["--threads", "0"]])
def test_numbers_out_of_range(options):
    with pytest.raises(UsageError, match="at least 1"):
        benchmark_cases.main(options)


def test_text_of_tables_and_sizes():
    assert table_head(["image"]).splitlines()[1] == "|---|---|---:|---:|---:|"
    assert row_text(["8x9"], "a", Row()) == "| 8x9 | a | - | - | - |"
    assert row_text([], "a", Row(1.23456, 2, 1.5, 2.25, 99.6)) == "| a | 1.235 | 2.000 (1.500 to 2.250) | 100 |"
    assert row_text([], "a", Row(0.00123456, 1.0, 1.0, 1.0)) == "| a | 0.00123 | 1 | - |"
    assert size_of("800x1066") == (800, 1066) and size_text((800, 1066)) == "800x1066" and positive("3") == 3
    for text in ("800", "0x8", "axb", "1x2x3"):
        with pytest.raises(argparse.ArgumentTypeError):
            size_of(text)
