"""What the tests of the launcher run in several processes."""

import os
import signal
import sys
import time

from detectron2.utils import comm

from ovdet2.engine.launch import launch
from ovdet2.errors import DataError, exit_on_error


def meet(folder, failing_rank=None):
    """Every process leaves a file with its pid and its ranks; then one may fail while the others wait for it."""
    ranks = comm.get_rank(), comm.get_local_rank(), comm.get_world_size(), comm.get_local_size()
    (folder / f"rank{comm.get_rank()}").write_text(" ".join(map(str, (os.getpid(), *ranks))))
    comm.synchronize()
    if comm.get_rank() == failing_rank:
        raise DataError("image 7 is damaged:\nits json ends early")
    comm.synchronize()


def end(how):
    """Rank 1 ends in one of several ways; rank 0 waits for it, unless both end."""
    if how == "both leave with code 0":
        sys.exit(0)
    if comm.get_rank() == 1:
        if how == "code 7":
            sys.exit(7)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("seven")
    comm.synchronize()


def outlive(folder):
    """Wait for ever, once all are there."""
    meet(folder)
    while True:
        time.sleep(0.1)


def run_machine(output, main, machine_rank, address, args, processes=1, machines=2):
    """Body of the parent of one machine: its messages go to the file ``output``."""
    with open(output, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    with exit_on_error():
        launch(main, processes, machines, machine_rank, address, args, use_cuda=False)
