"""What the tests of the launcher run in several processes; as a program, the parent of one machine.

python tests/launch_cases.py <function> <processes> <machines> <machine rank> <address> <arguments of the function>
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

if __name__ in ("__main__", "__mp_main__"):
    # The package's own __init__ imports the trainer, for which a test of the launcher need not wait.
    _package = ModuleType("ovdet2.engine")
    _package.__path__ = [str(Path(__file__).parent.parent / "ovdet2" / "engine")]
    sys.modules["ovdet2.engine"] = _package

from detectron2.utils import comm

from ovdet2.engine.launch import launch
from ovdet2.errors import DataError, exit_on_error


def meet(folder, failing_rank=None):
    """Every process leaves a file with its pid and its ranks; then one may fail while the others wait for it."""
    ranks = comm.get_rank(), comm.get_local_rank(), comm.get_world_size(), comm.get_local_size()
    temporary = Path(folder) / f"writing{comm.get_rank()}"
    temporary.write_text(" ".join(map(str, (os.getpid(), *ranks))))
    temporary.rename(Path(folder) / f"rank{comm.get_rank()}")
    comm.synchronize()
    if comm.get_rank() == failing_rank:
        raise DataError("image 7 is damaged:\nits json ends early")
    comm.synchronize()


def end(how):
    """Rank 1 ends in one of several ways while rank 0 waits for it, or both leave."""
    if how == "both leave":
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


def main(function, processes, machines, machine_rank, address, *arguments):
    """The program; an argument of digits is a number."""
    arguments = tuple(int(argument) if argument.isdigit() else argument for argument in arguments)
    function = {"meet": meet, "end": end, "outlive": outlive}[function]
    with exit_on_error():
        launch(function, int(processes), int(machines), int(machine_rank), address, arguments, use_cuda=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
