"""The process of :mod:`ovdet2.bench.train_step` that trains: one step for each line that it reads.

It runs with the ovdet2 of another checkout as well, so it uses only what every version has: the trainer's constructor,
``resume_or_load`` and ``run_step``. Answers are lines of json on the stdout that it was started with; what the libraries
print goes to stderr.
"""

import argparse
import json
import os
import sys
import time


def main() -> None:
    """Command line: configuration file, threads, name of a function of ``time``, KEY VALUE ..."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config_file, threads, clock, *opts = sys.argv[1:]

    import torch
    from detectron2.utils.events import EventStorage

    import ovdet2
    from ovdet2.engine import Trainer, setup

    torch.set_num_threads(int(threads))
    now = getattr(time, clock)
    cfg = setup(argparse.Namespace(config_file=config_file, opts=opts))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    print(json.dumps({"package": os.path.dirname(ovdet2.__file__)}), file=answers, flush=True)
    with EventStorage() as storage:
        for trainer.iter, _ in enumerate(sys.stdin):
            storage.iter = trainer.iter
            started = now()
            trainer.run_step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = now() - started
            answer = {"seconds": seconds, "loss": storage.latest()["total_loss"][0]}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
