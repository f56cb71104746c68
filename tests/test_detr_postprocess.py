"""The post-processor against a full sort, for any number of words."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.modeling.detr.postprocess import PostProcessor, top_values
from tests import detr_cases


class TestTopValues:
    @settings(max_examples=60, deadline=None)
    @given(rows=st.integers(1, 3), length=st.integers(1, 400), count=st.integers(1, 120), seed=st.integers(0, 9))
    def test_equals_a_sort(self, rows, length, count, seed):
        values = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
        top, places = top_values(values, count)
        assert torch.equal(top, values.sort(dim=1, descending=True).values[:, :count])
        assert torch.equal(values.gather(1, places), top)
        assert all(len(set(row)) == len(row) for row in places.tolist())

    def test_equal_values(self):
        """Any of them, but none twice."""
        top, places = top_values(torch.zeros(2, 1000), 100)
        assert (top == 0).all() and all(len(set(row)) == 100 for row in places.tolist())


class TestDetections:
    @pytest.mark.parametrize("words", [1, 5, 700])
    def test_equal_a_plain_reference(self, words):
        outputs = detr_cases.outputs(2, 2, 7, words)
        sizes = [(50, 80), (64, 33)]
        found = PostProcessor(20)(outputs, sizes)
        for image, (height, width) in enumerate(sizes):
            logits, boxes = outputs.pred_logits[1, image].double(), outputs.pred_boxes[1, image].double()
            candidates = sorted(
                ((logits[q, k].sigmoid().item(), q, k) for q in range(7) for k in range(words)), reverse=True
            )[:20]
            instances = found[image]
            assert instances.image_size == (height, width) and len(instances) == len(candidates)
            for row, (score, query, word) in enumerate(candidates):
                x, y, w, h = boxes[query].tolist()
                box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
                box = [min(max(value, 0), limit) for value, limit in zip(box, (width, height, width, height))]
                assert instances.pred_classes[row] == word
                assert instances.scores[row].item() == pytest.approx(score, abs=1e-6)
                assert instances.pred_boxes.tensor[row].tolist() == pytest.approx(box, abs=1e-4)

    def test_batch_equals_singles(self):
        outputs = detr_cases.outputs(1, 3, 6)
        sizes = [(50, 80), (64, 33), (10, 10)]
        batch = PostProcessor(7)(outputs, sizes)
        for image, size in enumerate(sizes):
            [single] = PostProcessor(7)(detr_cases.only(outputs, image), [size])
            assert torch.equal(single.scores, batch[image].scores)
            assert torch.equal(single.pred_boxes.tensor, batch[image].pred_boxes.tensor)

    def test_order_of_words_permutes_the_classes(self):
        outputs, words = detr_cases.outputs(1, 1, 6), torch.tensor([4, 2, 0, 1, 3])
        moved = replace(outputs, pred_logits=outputs.pred_logits[..., words])
        [plain], [permuted] = PostProcessor(10)(outputs, [(50, 50)]), PostProcessor(10)(moved, [(50, 50)])
        assert torch.equal(words[permuted.pred_classes], plain.pred_classes)
        assert torch.equal(permuted.scores, plain.scores)

    def test_fewer_candidates_than_wanted(self):
        [found] = PostProcessor(300)(detr_cases.outputs(1, 1, 4, words=2), [(50, 50)])
        assert len(found) == 8

    def test_threshold(self):
        outputs = detr_cases.outputs(1, 1, 6)
        [everything] = PostProcessor(30)(outputs, [(50, 50)])
        [some] = PostProcessor(30, score_threshold=0.5)(outputs, [(50, 50)])
        assert 0 < len(some) < len(everything) == 30 and torch.equal(some.scores, everything.scores[: len(some)])
        assert (some.scores >= 0.5).all() and (everything.scores[len(some) :] < 0.5).all()

    def test_threshold_of_zero_keeps_what_underflows(self):
        outputs = detr_cases.outputs(1, 1, 3)
        outputs.pred_logits.fill_(-200)
        [found] = PostProcessor(15)(outputs, [(50, 50)])
        assert len(found) == 15

    def test_one_query_may_have_several_classes(self):
        """There is no suppression: a box is reported once per word."""
        outputs = detr_cases.outputs(1, 1, 1, words=4)
        [found] = PostProcessor(100)(outputs, [(50, 50)])
        assert sorted(found.pred_classes.tolist()) == [0, 1, 2, 3]
