"""The benchmark of zero-shot detectors at tiny sizes, and the sizes of its full networks."""

import functools

import open_clip
import pytest
import torch

from ovdet2.bench import zero_shot as bench
from ovdet2.errors import UsageError
from ovdet2.vocabulary.word_lists import named_words

pytest.importorskip("transformers")
from tests.zero_shot_cases import tiny

NARROW = ["MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
TINY = {
    "detic-r18": bench.Setup(functools.partial(bench.detic, "lvis/detic_r18_21k.yaml", overrides=NARROW), (64, 96)),
    "grounding-dino-t": bench.Setup(functools.partial(bench.of_transformers, lambda: tiny("grounding-dino")), (64, 96)),
}


@pytest.fixture(scope="module")
def lvis():
    return named_words("lvis").names


def test_every_detector_is_timed_with_every_number_of_words(monkeypatch, capsys):
    monkeypatch.setattr(bench, "DETECTORS", TINY)
    options = [
        "--words",
        "5",
        "20",
        "--turns",
        "1",
        "--warm-up",
        "0",
        "--no-memory",
        "--device",
        "cpu",
        "--detectors",
        *TINY,
    ]
    results = bench.main(options)
    assert list(results) == [(words, name) for words in ("5", "20") for name in TINY]
    assert all(row.seconds > 0 and row.peak is None for row in results.values())
    assert results["5", "detic-r18"].ratio == 1 != results["5", "grounding-dino-t"].ratio
    printed = capsys.readouterr().out
    few, many = [line for line in printed.splitlines() if line.startswith("forward passes: ")]
    assert few.startswith("forward passes: detic-r18 1, grounding-dino-t ") and many.startswith(few.rsplit(" ", 1)[0])
    assert int(many.rsplit(" ", 1)[1]) > int(few.rsplit(" ", 1)[1]) >= 1
    assert printed.count(f"boxes: detic-r18 {bench.BOXES}, grounding-dino-t ") == 2
    assert "forward passes;" not in printed  # a note of the adapter within the table


def test_words_are_exchanged_and_their_exchange_is_not_timed():
    timed = bench.detic("lvis/detic_r18_21k.yaml", (64, 96), "cpu", NARROW)
    timed.set_words(["cat"])
    assert not timed.detect().pred_classes.any()
    timed.set_words(["cat", "dog", "car"])
    found = timed.detect()
    assert len(found) == bench.BOXES and found.pred_classes.max() == 2 and not found.has("pred_masks")


def test_more_words_than_lvis_has():
    with pytest.raises(UsageError, match="--words 1204 are more than the 1203 of LVIS"):
        bench.main(["--words", "1204", "--no-memory"])


@pytest.mark.slow
@pytest.mark.parametrize("make, millions", [(bench.owlv2, 155.0), (bench.grounding_dino, 172.3)])
def test_the_networks_have_the_published_sizes(make, millions):
    with torch.device("meta"):
        network, _ = make()
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_clips_tokens(lvis):
    ours, theirs = bench.clip_tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    for name in ("red mug", "aerosol can"):
        tokens = ours(name)["input_ids"]
        assert tokens == theirs([name])[0, : len(tokens)].tolist()
    assert max(len(ours(name)["input_ids"]) for name in lvis) <= 16  # with start and end, as OWLv2 takes


def test_pieces_of_grounding_dino(lvis):
    tokenizer = bench.piece_tokenizer(30522)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "[SEP]", ".", "?"]) == [0, 101, 102, 1012, 1029]
    assert tokenizer.tokenize("Red mug") == ["red</w>", "mug</w>"]
    ids = [token for name in lvis for token in tokenizer(name, add_special_tokens=False)["input_ids"]]
    assert 0 < min(ids) and max(ids) < 30522 and tokenizer.unk_token_id not in ids
