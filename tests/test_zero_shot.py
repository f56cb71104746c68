"""Zero-shot detectors of ``transformers`` behind our interface, tiny, with random weights and without network."""

import json

import numpy as np
import pytest
import torch

from ovdet2 import cli
from ovdet2.data.datasets.ov_shapes import OV_SHAPES
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.ov_shapes.world.draw import draw_split
from ovdet2.zero_shot import FAMILIES, ZeroShotDetector, evaluate, token_to_word_probs

transformers = pytest.importorskip("transformers")
from tests.zero_shot_cases import MAX_TEXT, tiny  # noqa: E402  needs transformers

NAMES = ["red star", "cat", "red", "striped moon", "Cat dog"]  # several share tokens
KINDS = list(FAMILIES)
GROUNDING = ["grounding-dino", "mm-grounding-dino"]
IMAGE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)


@pytest.fixture(scope="module")
def networks():
    """{kind: (network, processor)}."""
    return {kind: tiny(kind) for kind in KINDS}


def detector(networks, kind, **options):
    return ZeroShotDetector(*networks[kind], **options)


def pairs_of(found):
    """{(class, rounded box): score} of detections."""
    boxes = [tuple(round(value, 2) for value in box) for box in found.pred_boxes.tensor.tolist()]
    return dict(zip(zip(found.pred_classes.tolist(), boxes), found.scores.tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_indices_into_the_words(kind, networks, monkeypatch):
    made = detector(networks, kind, detections=7)
    for name in ("decode", "batch_decode"):
        monkeypatch.setattr(type(made.processor), name, lambda *_, **__: pytest.fail("tokens were decoded"))
    made.set_vocabulary(NAMES)
    found = made.predict(IMAGE)
    assert made.names == tuple(NAMES) and found.image_size == (60, 90) and 0 < len(found) <= 7
    assert found.pred_classes.dtype == torch.int64 and set(found.pred_classes.tolist()) <= set(range(len(NAMES)))
    scores, boxes = found.scores, found.pred_boxes.tensor
    assert bool((scores[:-1] >= scores[1:]).all()) and bool(((scores > 0) & (scores < 1)).all())
    assert bool((boxes >= 0).all()) and bool((boxes[:, 2] <= 90).all()) and bool((boxes[:, 3] <= 60).all())
    first, second = made.predict([IMAGE, IMAGE[:, ::-1].copy()])
    assert pairs_of(first) == pairs_of(found) and pairs_of(second) != pairs_of(found)
    assert made.predict([]) == []


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
def test_owl_equals_the_processor_of_transformers(kind, networks):
    """The best word of each box, its score and its box in pixels, which OWLv2 pads to a square."""
    network, processor = networks[kind]
    prompts = [f"a photo of a {name}" for name in NAMES]
    inputs = processor(images=IMAGE, text=[prompts], return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = network(**inputs)
    [expected] = processor.post_process_grounded_object_detection(output, threshold=0, target_sizes=[(60, 90)])
    made = detector(networks, kind, detections=1000)
    made.set_vocabulary(NAMES)
    found = made.predict(IMAGE)
    assert len(found) == output.logits[0].numel()  # all pairs of a box and a word
    height_width = torch.tensor([90.0, 60.0, 90.0, 60.0])
    clipped = expected["boxes"].clamp(min=0).minimum(height_width)
    for box, score, label in zip(clipped, expected["scores"], expected["labels"]):
        same = (found.pred_boxes.tensor - box).abs().amax(dim=1) < 1e-3
        rows = same & (found.pred_classes == label)
        assert (found.scores[rows] - score).abs().min() < 1e-5
        assert found.scores[same].max() <= expected["scores"].max() + 1e-5


@pytest.mark.parametrize("kind", GROUNDING)
def test_grounding_dino_equals_its_equations(kind, networks):
    """The text of the processor; a word's probability is the mean over its tokens, found between the dots."""
    network, processor = networks[kind]
    names = NAMES[:4]
    inputs = processor(images=IMAGE, text=[names], return_tensors="pt")
    made = detector(networks, kind, detections=1000)
    made.set_vocabulary(names)
    [part] = made._passes
    assert torch.equal(part.inputs["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        output = network(**inputs)
    ids, probs, expected, first = inputs["input_ids"][0].tolist(), output.logits[0].double().sigmoid(), [], 1
    for position, token in enumerate(ids):
        if token == 1012:
            expected.append(sum(probs[:, column] for column in range(first, position)) / (position - first))
            first = position + 1
    expected = torch.stack(expected, dim=1)
    x, y, w, h = (output.pred_boxes[0].double() * torch.tensor([90.0, 60.0, 90.0, 60.0])).unbind(1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1).clamp(min=0)
    boxes = boxes.minimum(torch.tensor([90.0, 60.0, 90.0, 60.0], dtype=torch.float64))
    found = made.predict(IMAGE)
    order = expected.flatten().sort(descending=True)
    torch.testing.assert_close(found.scores.double(), order.values, atol=1e-6, rtol=0)
    assert len(found) == expected.numel() == 20 * 4
    for box, score, label in zip(found.pred_boxes.tensor, found.scores, found.pred_classes):
        same = (boxes - box).abs().amax(dim=1) < 1e-3
        assert (expected[same, label] - score).abs().min() < 1e-6


def test_omdet_turbo_equals_the_processor_of_transformers(networks):
    network, processor = networks["omdet-turbo"]
    inputs = processor(images=IMAGE, text=[NAMES], return_tensors="pt", truncation=True)
    with torch.no_grad():
        output = network(**inputs)
    options = {"threshold": 0, "target_sizes": [(60, 90)], "nms_threshold": 0.5, "max_num_det": 90}
    [expected] = processor.post_process_grounded_object_detection(output, **options)
    made = detector(networks, "omdet-turbo", detections=90)
    made.set_vocabulary(NAMES)
    found = made.predict(IMAGE)
    assert 0 < len(found) < 90  # some were suppressed
    torch.testing.assert_close(found.scores, expected["scores"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"], atol=1e-3, rtol=0)
    assert found.pred_classes.tolist() == expected["labels"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_long_vocabularies_go_in_passes(kind, networks, capsys):
    single = detector(networks, kind, detections=1000, words_per_pass=100)
    made = detector(networks, kind, detections=1000, words_per_pass=2)
    single.set_vocabulary(NAMES[:4])
    assert len(single._passes) == 1 and not capsys.readouterr().out
    made.set_vocabulary(NAMES[:4])
    out = capsys.readouterr().out
    assert out.startswith(f"{kind} takes 4 words in 2 forward passes")
    assert ("its scores depend on which words share a pass" in out) == (not FAMILIES[kind].independent)
    found, expected = made.predict(IMAGE), single.predict(IMAGE)
    assert {0, 1, 2, 3} == set(found.pred_classes.tolist()) and made.facts["forward_passes"] == 2
    if FAMILIES[kind].independent:
        assert len(found) == len(expected)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)
        assert sorted(found.pred_classes.tolist()) == sorted(expected.pred_classes.tolist())
    else:  # the words of a pass, as if they were the only ones
        other = detector(networks, kind, detections=1000)
        other.set_vocabulary(NAMES[2:4])
        last = found[found.pred_classes >= 2]
        torch.testing.assert_close(last.scores, other.predict(IMAGE).scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", GROUNDING)
def test_a_text_is_split_where_its_tokens_end(kind, networks, capsys):
    made = detector(networks, kind)
    made.set_vocabulary([f"red star {word}" for word in ("cat", "dog", "moon", "car", "blue")])
    assert "5 words in 2 forward passes" in capsys.readouterr().out
    assert [part.count for part in made._passes] == [3, 2] and made._passes[1].first == 3
    assert all(part.inputs["input_ids"].shape[1] <= MAX_TEXT for part in made._passes)
    spans = made._passes[0].spans
    assert [list(span) for span in spans] == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    with pytest.raises(UsageError, match="has 14 tokens, .* takes 1 to 13"):
        made.set_vocabulary(["cat " * 14])
    made.set_vocabulary(["st. cat?"])  # a delimiter within a word would split it
    [part] = made._passes
    assert part.inputs["input_ids"][0].tolist().count(1012) == 1 and 1029 not in part.inputs["input_ids"]


def test_probabilities_of_words():
    probs = torch.tensor([[0.1, 0.2, 0.4, 0.9]])
    assert token_to_word_probs(probs, [range(1), range(1, 3)]).tolist() == [[pytest.approx(0.1), pytest.approx(0.3)]]


@pytest.mark.parametrize("kind", ["owlv2", "mm-grounding-dino"])
def test_an_evaluation_on_ov_shapes(kind, networks, registered, tmp_path, capsys):
    """Ours and theirs stand in one table: the same evaluator, base, novel and all."""
    data, _, _ = draw_split(0, "val2017", 2, OV_SHAPES.category_ids, folder=tmp_path)
    dataset = registered(data, OV_SHAPES)
    made = detector(networks, kind, name="tiny")
    results = evaluate(made, dataset, tmp_path / "out")
    assert made.names == OV_SHAPES.names and {"AP50-novel", "AP50-base", "AP50-all"} <= set(results["bbox"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["weights"] == "tiny" and report["vocabulary"]["words"] == 65
    assert ("forward passes" in capsys.readouterr().out) == (report["forward_passes"] > 1) == (kind != "owlv2")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(UsageError, match="not a registered open-vocabulary data set"):
        evaluate(made, "nothing", tmp_path)


def test_the_command_reads_a_folder(networks, registered, tmp_path, capsys):
    network, processor = networks["owlvit"]
    for part in (network, processor):
        part.save_pretrained(tmp_path / "tiny-owl")
    data, _, _ = draw_split(0, "val2017", 1, OV_SHAPES.category_ids, folder=tmp_path)
    words = ["zero-shot", "--model", str(tmp_path / "tiny-owl"), "--dataset", registered(data, OV_SHAPES)]
    words += ["--output", str(tmp_path / "out"), "--template", "{}", "--words-per-pass", "40"]
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["weights"] == "tiny-owl" and report["vocabulary"]["templates"] == "{}"
    assert report["forward_passes"] == 2 and "tiny-owl takes 65 words in 2 forward passes." in capsys.readouterr().out


@pytest.mark.parametrize("kind, limit", [("owlv2", 16), ("omdet-turbo", 77)])
def test_the_end_of_a_long_word_is_not_read_which_is_printed(kind, limit, networks, capsys):
    made, fits, long = detector(networks, kind, template="{}"), "cat " * (limit - 2), "cat " * (limit - 2) + "dog"
    made.set_vocabulary([fits])
    assert not capsys.readouterr().out
    short = made.predict(IMAGE)
    made.set_vocabulary(["dog", long])
    assert (
        f"{kind} reads {limit} tokens of a prompt and not the end of 1 prompt: {long.strip()!r}"
        in capsys.readouterr().out
    )
    if kind == "owlv2":  # whose words do not depend on each other
        found = made.predict(IMAGE)
        assert torch.allclose(found.scores[found.pred_classes == 1], short.scores)


def test_what_is_refused(networks, tmp_path, monkeypatch):
    made = detector(networks, "owlvit")
    with pytest.raises(UsageError, match="has no words yet: call set_vocabulary"):
        made.predict(IMAGE)
    with pytest.raises(UsageError, match="remove the synonyms"):
        made.set_vocabulary("cat; kitten, dog")
    with pytest.raises(UsageError, match='has no "{}" for the word'):
        detector(networks, "owlvit", template="a cat")
    other = transformers.BertModel(transformers.BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1))
    with pytest.raises(UsageError, match="'bert' is no zero-shot detector known here: choose one of owlvit, owlv2"):
        ZeroShotDetector(other, None)
    with pytest.raises(DataError, match="needs safetensors weights and its processor"):
        ZeroShotDetector.load(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", no_network)
    with pytest.raises(SetupError, match="google/owlv2-x could not be loaded .*give its folder") as error:
        ZeroShotDetector.load("google/owlv2-x")
    assert error.value.exit_code == 4


def no_network(*_, **__):
    raise OSError("no connection")
