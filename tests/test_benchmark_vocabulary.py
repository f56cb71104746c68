"""tools/benchmark_vocabulary.py at a small size: every vocabulary is asked for and timed."""

import benchmark_vocabulary as tool
import pytest

from ovdet2.errors import UsageError
from ovdet2.vocabulary.bank import WordBank


def test_every_number_of_words_is_timed(capsys, monkeypatch):
    asked, plain_set = [], WordBank.set
    monkeypatch.setattr(WordBank, "set", lambda self, words: (asked.append(len(words)), plain_set(self, words))[1])
    options = ["--config-file", "configs/ovshapes/detr_text_r18.yaml", "--size", "64x96", "--turns", "2"]
    ratios = tool.main([*options, "--words", "40", "3", "--dim", "8", "--device", "cpu"])
    assert list(ratios) == [3, 40] and ratios[3] == 1 and ratios[40] > 0
    assert asked == [40, 3, 3, 40, 40, 3]  # the order turns around
    assert capsys.readouterr().out.count(" words: ") == 2


def test_no_words():
    with pytest.raises(UsageError, match="--words"):
        tool.main(["--words", "0"])
