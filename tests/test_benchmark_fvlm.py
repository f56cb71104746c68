"""tools/benchmark_fvlm.py at a small size: equal losses, every part is timed, freezing saves memory."""

import benchmark_fvlm as tool
import pytest
import torch
from detectron2.utils.events import EventStorage

SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50",
]  # fmt: skip


@pytest.mark.slow
def test_the_networks_differ_in_what_is_trained_alone(capsys):
    args = ["--size", "128x160", "--turns", "1", "--device", "cpu", "--threads", str(torch.get_num_threads())]
    args, contiguous = args + SMALL, [*args, "--trained-contiguous", *SMALL]
    found = []
    for name, options in (("frozen", args), ("trained", args), ("trained", contiguous)):
        torch.manual_seed(0)
        with EventStorage():
            found.append(tool.build(name, tool.parse_args(options))([tool.make_record(128, 160)]))
    for name, value in found[0].items():
        assert [losses[name].item() for losses in found[1:]] == pytest.approx([value.item()] * 2, rel=1e-4), name
    results = tool.main(contiguous)
    assert results["time"] > 0 and 0 < results["memory"] < 1
    printed = capsys.readouterr().out
    assert all(printed.count(f"{part} forward") == 2 for part in tool.PARTS)
