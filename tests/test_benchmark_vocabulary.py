"""The benchmark of vocabularies at a small size: every number of words is set and timed."""

import pytest

from ovdet2.bench import vocabulary as bench
from ovdet2.errors import UsageError
from ovdet2.vocabulary.bank import WordBank


def test_every_number_of_words_is_timed(capsys, monkeypatch):
    given, plain_set = [], WordBank.set
    monkeypatch.setattr(WordBank, "set", lambda self, words: (given.append(len(words)), plain_set(self, words))[1])
    options = ["--config-file", "configs/ovshapes/detr_text_r18.yaml", "--size", "64x96", "--turns", "2"]
    found = bench.main([*options, "--words", "40", "3", "--dim", "8", "--device", "cpu"])
    assert list(found) == [("64x96", "3 words"), ("64x96", "40 words")]
    assert found["64x96", "3 words"].ratio == 1 and found["64x96", "40 words"].ratio > 0
    assert given == [40, 3, 3, 40, 40, 3]  # the order turns around
    assert capsys.readouterr().out.count(" words |") == 2


def test_no_words():
    with pytest.raises(UsageError, match="--words"):
        bench.main(["--words", "0"])
