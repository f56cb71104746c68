"""F-VLM's benchmark at a small size: equal losses, every stage is timed, freezing saves memory."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from ovdet2.bench.detectors import noise_samples
from ovdet2.bench.harness import Benchmark
from ovdet2.methods.fvlm import bench

SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50",
]  # fmt: skip
OPTIONS = ["--size", "128x160", "--turns", "1", "--device", "cpu", "--threads", str(torch.get_num_threads())]


@pytest.mark.slow
def test_the_networks_differ_only_in_what_is_trained(tmp_path):
    program, losses = Benchmark("", "", bench.OPTIONS, bench.plan), []
    for name, options in (("frozen", []), ("trained", []), ("trained", ["--trained-contiguous"])):
        args = program.parse(["--folder", str(tmp_path), *OPTIONS, *options, *SMALL])
        next(bench.plan(args))  # writes the weights
        torch.manual_seed(0)
        with EventStorage():
            losses.append(bench.build(name, args)(noise_samples((128, 160))))
    for name, value in losses[0].items():
        assert [others[name].item() for others in losses[1:]] == pytest.approx([value.item()] * 2, rel=1e-4), name


@pytest.mark.slow
def test_time_stages_and_memory(capsys):
    found = bench.main([*OPTIONS, "--trained-contiguous", *SMALL])
    frozen, trained = found["128x160", "1", "frozen"], found["128x160", "1", "trained"]
    assert frozen.ratio > 0 and trained.ratio == 1 and 0 < frozen.peak < trained.peak
    printed = capsys.readouterr().out
    assert all(printed.count(f"{stage} forward") == 2 for stage in bench.STAGES) and "weights of" in printed
