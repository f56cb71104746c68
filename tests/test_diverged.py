"""Numbers that are not finite: in weights that are saved, loaded, resumed from, and in each place of a detector."""

import itertools

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ovdet2.engine import AtomicCheckpointer, Trainer
from ovdet2.engine.finite import listed, not_finite
from ovdet2.errors import DataError, NumericalError
from ovdet2.modeling.detr.postprocess import PostProcessor
from tests import detr_cases, micro
from tests.micro_training import micro_cfg, write_data
from tests.test_checkpoint import model_of, value_of

BAD = [float("nan"), float("inf"), float("-inf")]


def spoil(model, name, value=float("nan")):
    """Set an entry of a weight."""
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value


def test_names_of_all_entries_at_any_depth():
    nan, fine = torch.tensor([1.0, float("nan")]), torch.ones(2)
    state = {"a": fine, "b": {0: [fine, nan], "c": (nan,)}, "n": float("nan"), "i": torch.ones(1, dtype=torch.int64)}
    assert not_finite(state) == ["b.0.1", "b.c.0"] and not_finite(nan, "w") == ["w"] and not_finite({}) == []
    assert listed(["a", "b", "c", "d"]) == "4 entries (a, b, c, ...)" and listed(["a"]) == "1 entry (a)"


class TestCheckpoints:
    @pytest.mark.parametrize("value", BAD)
    def test_are_not_written(self, tmp_path, value):
        AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_0000001")
        diverged = model_of(2.0)
        spoil(diverged, "bias", value)
        with pytest.raises(
            NumericalError, match=r"model\.bias.*model_0000002.pth is not written.*from .*model_0000001"
        ):
            AtomicCheckpointer(diverged, str(tmp_path)).save("model_0000002")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]

    @pytest.mark.parametrize("value", BAD)
    @pytest.mark.parametrize("how", ["load", "load_all"])
    def test_are_not_loaded(self, tmp_path, value, how):
        diverged = model_of(2.0)
        spoil(diverged, "weight", value)
        path = tmp_path / "other.pth"
        torch.save({"model": diverged.state_dict()}, path)
        with pytest.raises(
            DataError, match=r"other.pth: 1 of its 2 weights hold values that are not finite \(weight\).*earlier"
        ):
            getattr(AtomicCheckpointer(model_of(1.0)), how)(str(path))

    def test_resume_falls_back(self, tmp_path, caplog):
        """Earlier versions wrote such files."""
        AtomicCheckpointer(model_of(1.0), str(tmp_path)).save("model_0000001", iteration=1)
        diverged = model_of(2.0)
        spoil(diverged, "weight", float("inf"))
        torch.save({"model": diverged.state_dict(), "iteration": 2}, tmp_path / "model_0000002.pth")
        (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
        model = model_of(0.0)
        state = AtomicCheckpointer(model, str(tmp_path)).resume_or_load("")
        assert state["iteration"] == 1 and value_of(model) == 1.0
        assert "model_0000002.pth: 1 of its 2 weights hold values that are not finite" in caplog.text


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


class TestRuns:
    def trainer(self, root, *options):
        trainer = Trainer(micro_cfg(root / "out", ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2", *options]))
        trainer.resume_or_load(resume=True)
        return trainer

    @pytest.mark.parametrize("average", ["False", "True"])
    def test_a_step_that_overflows_is_not_saved(self, root, average):
        """Losses and gradients are finite: only the weights after the step are not."""
        trainer = self.trainer(root, "SOLVER.EMA.ENABLED", average)
        change = trainer.optimizer.step

        def overflow(*arguments):
            change(*arguments)
            if trainer.iter == 3:
                spoil(trainer._trained, "head.bias", float("inf"))

        trainer.optimizer.step = overflow
        with pytest.raises(NumericalError, match=r"diverged.*head\.bias.*not written.*BASE_LR.*model_0000001.pth"):
            trainer.train()
        again = self.trainer(root, "SOLVER.EMA.ENABLED", average)
        assert again.start_iter == 2 and not not_finite(again._trained.state_dict())

    def test_a_state_of_the_optimizer_that_overflowed_falls_back(self, root):
        """A second moment of infinity: its weight would never change again."""
        options = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.MAX_ITER", "4"]
        self.trainer(root, *options).train()
        path = root / "out" / "model_final.pth"
        saved = torch.load(path, weights_only=True)
        saved["trainer"]["optimizer"]["state"][0]["exp_avg_sq"].view(-1)[0] = float("inf")
        torch.save(saved, path)
        assert self.trainer(root, *options).start_iter == 2


class TestDetections:
    @pytest.mark.parametrize("field, value", itertools.product(["pred_logits", "pred_boxes"], [*BAD[:2]]))
    @pytest.mark.parametrize("threshold", [0.0, 0.9])
    def test_of_detr(self, field, value, threshold):
        outputs = detr_cases.outputs(1, 2, 40, 9)
        getattr(outputs, field)[0, 1, 17, 2] = value
        with pytest.raises(NumericalError, match="score or box that is not finite.*earlier checkpoint"):
            PostProcessor(5, threshold)(outputs, [(50, 80)] * 2)

    def places(self):
        """A weight of each place of the two-stage detector."""
        return [
            "backbone.fpn_lateral2.weight",
            "proposal_generator.rpn_head.conv.conv0.weight",
            "proposal_generator.rpn_head.objectness_logits.bias",
            "proposal_generator.rpn_head.anchor_deltas.bias",
            "roi_heads.box_head.fc1.weight",
            "roi_heads.box_predictor.cls_score.projection.weight",
            "roi_heads.box_predictor.bbox_pred.bias",
            "roi_heads.mask_head.predictor.bias",
        ]

    def test_of_vild_in_each_place(self):
        config = micro.cfg()
        config.MODEL.MASK_ON = True
        config.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
        network = micro.model(config=config)
        with torch.no_grad():
            assert len(network(micro.images(1))[0]["instances"]) > 0
            for name in self.places():
                weight = dict(network.named_parameters())[name]
                before = weight.clone()
                for value in BAD[:1] if "mask" in name else BAD:  # the sigmoid of an infinite mask logit is 0 or 1
                    weight.fill_(value)
                    with pytest.raises(NumericalError, match="diverged; use an earlier checkpoint"):
                        network(micro.images(1))
                weight.copy_(before)

    def test_training_reports_what_detectron2_meets(self):
        """The check is of evaluation: in training the step names the images."""
        network = micro.model().train()
        spoil(network, "proposal_generator.rpn_head.objectness_logits.bias")
        with EventStorage(), pytest.raises(FloatingPointError, match="Inf/NaN"):
            network(micro.images(1))

    def test_an_image_without_detections_is_fine(self):
        empty = Instances((64, 96), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
        network = micro.model()
        network.proposal_generator.forward = lambda images, *_: ([empty for _ in images.image_sizes], {})
        with torch.no_grad():
            assert len(network(micro.images(1))[0]["instances"]) == 0
