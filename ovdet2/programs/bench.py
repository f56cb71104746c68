"""Measure time and memory of a part of ovdet2 against a reference, in turns.

    ovdet2 bench detr --size 800x1066 --turns 5

``ovdet2 bench NAME --help`` lists the options of one.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence

from ovdet2.errors import UsageError, exit_on_error

MODULES = {
    "cache": ("ovdet2.bench.cache", "building and reading a region cache, and training samples with it"),
    "clip-detr": ("ovdet2.methods.clip_detr.bench", "training steps of CLIP-DETR against those of its host"),
    "detr": ("ovdet2.bench.detr", "Deformable DETR against that of transformers"),
    "evaluation": ("ovdet2.bench.evaluation", "the evaluation against pycocotools and lvis"),
    "fvlm": ("ovdet2.methods.fvlm.bench", "training steps of F-VLM, trunk frozen or trained"),
    "train-step": ("ovdet2.bench.train_step", "a training step of this checkout against that of another"),
    "vild": ("ovdet2.methods.vild.bench", "training steps of ViLD against those of Faster R-CNN"),
    "vocabulary": ("ovdet2.bench.vocabulary", "latency of a detector by the number of its words"),
    "zero-shot": ("ovdet2.bench.zero_shot", "Detic against OWLv2 and Grounding DINO of transformers"),
}


def main(argv: Sequence[str] | None = None) -> object:
    """Command line; returns what the benchmark returns.

    Raises:
        UsageError: there is no such benchmark.
    """
    name, *options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(
            "usage: ovdet2 bench NAME ...\n\n"
            + __doc__
            + "\nBenchmarks:\n"
            + "\n".join(f"  {key:12}{what}" for key, (_, what) in MODULES.items())
        )
        return None
    if name not in MODULES:
        raise UsageError(f"there is no benchmark {name!r}; there are {', '.join(MODULES)}.")
    program = importlib.import_module(MODULES[name][0]).main
    if name == "cache":
        from ovdet2.methods.vild.bench import cached_samples

        program = functools.partial(program, more=[cached_samples])
    return program(options)


if __name__ == "__main__":
    with exit_on_error():
        main()
