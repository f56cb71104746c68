"""Resume with other settings than those of the saved run: applied with a message, or refused by key."""

import pytest
import torch
from torch import nn

from ovdet2.engine import AtomicCheckpointer, Trainer
from ovdet2.engine.resume import carried_over, changes, parameter_names
from ovdet2.errors import DataError, UsageError
from tests.micro_training import micro_cfg, write_data

STEADY = ["SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "()", "SOLVER.MAX_ITER", "6"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def resumed(root, *options):
    """A trainer that has gone on from the newest checkpoint, if there is one."""
    trainer = Trainer(micro_cfg(root / "out", ["DATASETS.TEST", "()", *STEADY, *options]))
    trainer.resume_or_load(resume=True)
    return trainer


def trained(root, *options):
    """The same, at the end of its training."""
    trainer = resumed(root, *options)
    trainer.train()
    return trainer


def rates(trainer):
    """{name: learning rate}"""
    names = {parameter: name for name, parameter in trainer._trained.named_parameters()}
    return {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


def moments(trainer):
    """{name: state of the optimizer}"""
    names = {parameter: name for name, parameter in trainer._trained.named_parameters()}
    return {names[parameter]: state for parameter, state in trainer.optimizer.state.items()}


def rewrite(root, change):
    path = root / "out" / "model_final.pth"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
class TestApplied:
    def test_base_rate_and_decay(self, root, optimizer, caplog):
        before = moments(trained(root, "SOLVER.OPTIMIZER", optimizer))
        options = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", "0.001", "SOLVER.WEIGHT_DECAY", "0.5"]
        again = resumed(root, *options, "SOLVER.MAX_ITER", "8")
        assert again.start_iter == 6 and set(rates(again).values()) == {0.001}
        assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.5}
        assert "apply from here on: " in caplog.text and "SOLVER.BASE_LR 0.001 (before: 0.01); " in caplog.text
        assert "SOLVER.MAX_ITER 8 (before: 6)" in caplog.text and "SOLVER.WEIGHT_DECAY 0.5" in caplog.text
        for name, state in moments(again).items():
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(before[name][key])) for key in state)
        again.train()
        assert set(rates(again).values()) == {0.001}

    def test_the_schedule_goes_on_with_the_new_rate(self, root, optimizer):
        trained(root, "SOLVER.OPTIMIZER", optimizer, "SOLVER.STEPS", "(4,)")
        options = ["SOLVER.OPTIMIZER", optimizer, "SOLVER.STEPS", "(4, 8)", "SOLVER.BASE_LR", "0.5"]
        assert set(rates(resumed(root, *options, "SOLVER.MAX_ITER", "10")).values()) == {0.05}
        assert rates(trained(root, *options, "SOLVER.MAX_ITER", "10"))["stem.weight"] == pytest.approx(0.005)

    def test_factors_regroup_and_each_moment_follows_its_parameter(self, root, optimizer, caplog):
        before = moments(trained(root, "SOLVER.OPTIMIZER", optimizer))
        again = resumed(root, "SOLVER.OPTIMIZER", optimizer, "SOLVER.LR_FACTORS", "[['head', 0.1]]")
        found = rates(again)
        assert found["stem.weight"] == 0.01 and found["head.weight"] == found["head.bias"] == pytest.approx(0.001)
        assert len(again.optimizer.param_groups) == 2 and moments(again).keys() == before.keys()
        for name, state in moments(again).items():
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(before[name][key])) for key in state)
        assert "SOLVER.LR_FACTORS [['head', 0.1]] (before: [])" in caplog.text

    def test_a_parameter_that_was_frozen_starts_without_momentum(self, root, optimizer, caplog):
        def rename(saved):
            names = saved["trainer"]["optimizer_parameters"]
            names[names.index("head.bias")] = "removed.bias"

        trained(root, "SOLVER.OPTIMIZER", optimizer)
        rewrite(root, rename)
        again = resumed(root, "SOLVER.OPTIMIZER", optimizer)
        assert rates(again).keys() - moments(again).keys() == {"head.bias"}
        assert "did not train 1 entry (head.bias)" in caplog.text
        trained(root, "SOLVER.OPTIMIZER", optimizer, "SOLVER.MAX_ITER", "8")

    def test_nothing_is_reported_without_a_change(self, root, optimizer, caplog):
        trained(root, "SOLVER.OPTIMIZER", optimizer)
        resumed(root, "SOLVER.OPTIMIZER", optimizer)
        assert "Other settings" not in caplog.text and "did not train" not in caplog.text

    def test_a_checkpoint_of_an_earlier_version(self, root, optimizer):
        def strip(saved):
            del saved["trainer"]["solver_settings"], saved["trainer"]["optimizer_parameters"]

        trained(root, "SOLVER.OPTIMIZER", optimizer)
        rewrite(root, strip)
        again = resumed(root, "SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", "0.5")
        assert set(rates(again).values()) == {0.5} and moments(again)
        with pytest.raises(UsageError, match=r"earlier version.*resume with the saved run's SOLVER.LR_FACTORS"):
            resumed(root, "SOLVER.OPTIMIZER", optimizer, "SOLVER.LR_FACTORS", "[['head', 0.1]]")


class TestRefused:
    @pytest.mark.parametrize("first, second", [("SGD", "AdamW"), ("AdamW", "SGD")])
    def test_another_optimizer(self, root, first, second):
        trained(root, "SOLVER.OPTIMIZER", first)
        with pytest.raises(
            UsageError, match=f"SOLVER.OPTIMIZER is {second}.*set SOLVER.OPTIMIZER {first}, or start anew"
        ):
            resumed(root, "SOLVER.OPTIMIZER", second)

    @pytest.mark.parametrize(
        "first, second, words",
        [
            ("MicroDetector", "BatchNormMicroDetector", r"stem.0.weight"),
            ("BatchNormMicroDetector", "MicroDetector", r"stem.weight"),
            ("MicroDetector", "CaptionedMicroDetector", r"words.weight"),
        ],
    )
    @pytest.mark.parametrize("average", ["False", "True"])
    def test_another_model(self, root, first, second, words, average):
        trained(root, "MODEL.META_ARCHITECTURE", first, "SOLVER.EMA.ENABLED", average)
        with pytest.raises(UsageError, match=f"model_final.pth is of a run of another model.*{words}.*config.yaml"):
            resumed(root, "MODEL.META_ARCHITECTURE", second, "SOLVER.EMA.ENABLED", average)

    def test_another_shape(self, tmp_path):
        AtomicCheckpointer(nn.Linear(2, 3), str(tmp_path)).save("model_final")
        with pytest.raises(UsageError, match=r"weight \(\[3, 2\], now \[3, 4\]\)"):
            AtomicCheckpointer(nn.Linear(4, 3), str(tmp_path)).resume_or_load("")


class TestDamaged:
    @pytest.mark.parametrize("key", ["optimizer", "scheduler", "random", "iteration"])
    def test_a_state_without_an_entry_falls_back_or_is_named(self, root, key):
        trained(root, "SOLVER.CHECKPOINT_PERIOD", "4")
        rewrite(root, lambda saved: saved["trainer"].pop(key))
        assert resumed(root).start_iter == 4
        (root / "out" / "model_0000003.pth").unlink()
        with pytest.raises(DataError, match="none of the checkpoints"):
            resumed(root)

    @pytest.mark.parametrize(
        "content", [b"\xff\xfe\x00model", b"model_final\x00.pth", b"", b"../../other.pth", b"no.pth"]
    )
    def test_a_pointer_of_wrong_bytes(self, root, content):
        """The newest periodic checkpoint is used."""
        trained(root, "SOLVER.CHECKPOINT_PERIOD", "4")
        (root / "out" / "last_checkpoint").write_bytes(content)
        assert resumed(root).start_iter == 4


def test_a_state_is_carried_over_by_name():
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "abc"})
    a, b, c = (model[name].weight for name in "abc")
    old = torch.optim.SGD([{"params": [a, b], "lr": 1.0}], momentum=0.9)
    saved = {"state": {0: {"momentum_buffer": 10}, 1: {"momentum_buffer": 20}}} | {
        key: value for key, value in old.state_dict().items() if key != "state"
    }
    new = torch.optim.SGD([{"params": [c], "lr": 3.0}, {"params": [b, a], "lr": 2.0}], momentum=0.5)
    merged, late = carried_over(new, parameter_names(new, model), saved, parameter_names(old, model))
    assert merged["state"] == {1: {"momentum_buffer": 20}, 2: {"momentum_buffer": 10}} and late == ["c.weight"]
    assert [(group["lr"], group["momentum"]) for group in merged["param_groups"]] == [(3.0, 0.5), (2.0, 0.5)]


def test_changes_name_both_values():
    assert changes({"A": "1", "B": "2", "C": "3"}, {"A": "1", "B": "5", "D": "6"}) == ["B 5 (before: 2)"]
