"""Starting the processes of a run: one or several, on CPU (gloo) or CUDA (NCCL), ours or torchrun's."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from ovdet2 import errors
from ovdet2.io.files import read_json, write_json

_TIMEOUT = timedelta(minutes=30)


def launch(main, processes_per_machine, machines=1, machine_rank=0, dist_url="auto", args=(), use_cuda=None):
    """Run ``main(*args)`` in every process of a group, and end all of them when one fails.

    Under torchrun (RANK and WORLD_SIZE in the environment) this process joins that group and the other arguments are
    ignored. With one process in all, ``main`` is simply called.

    Args:
        main: function at module level, since the processes are spawned.
        processes_per_machine: at least 1; on CUDA at most the number of GPUs.
        machines, machine_rank: how many machines run this command, and which of them this is.
        dist_url: "tcp://host:port" of machine 0, the same on all; "auto" on a single machine.
        args: tuple handed to ``main``.
        use_cuda: NCCL and one GPU per process, or gloo on the CPU; None: CUDA if there is one.

    Raises:
        OVDetError: the first one a process raised, with its message and exit code. Under torchrun the process prints
            the message and ends with the code, without returning here.
        UsageError: the numbers do not fit together, or torchrun started more processes than there are GPUs.
        SetupError: a process was killed by a signal.
    """
    use_cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
    if torchrun_rank():
        return _run_under_torchrun(main, args, use_cuda)
    _check(processes_per_machine, machines, machine_rank, dist_url, use_cuda)
    if processes_per_machine * machines == 1:
        main(*args)
        return
    with tempfile.TemporaryDirectory(prefix="ovdet2-") as folder:
        if dist_url == "auto":
            # A file needs no free port, which another process could take between looking and using.
            dist_url = f"file://{folder}/rendezvous"
        group = dist_url, processes_per_machine, machines, machine_rank, use_cuda
        context = mp.spawn(
            _spawned, args=(main, args, group, folder), nprocs=processes_per_machine, join=False, daemon=False
        )
        _wait(context, folder)


def torchrun_rank():
    """(rank, number of processes) if torchrun started this process, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def _check(processes, machines, machine_rank, dist_url, use_cuda):
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise errors.UsageError(
            f"{processes} processes on {machines} machines, this one being number {machine_rank}: give at least one of "
            "each and a machine rank from 0 on."
        )
    if machines > 1 and not dist_url.startswith("tcp://"):
        raise errors.UsageError(f"--dist-url is {dist_url!r}: with several machines give tcp://<machine 0>:<port>.")
    if use_cuda and processes > torch.cuda.device_count():
        raise errors.UsageError(
            f"{processes} processes need as many GPUs, this machine has {torch.cuda.device_count()}: lower --num-gpus."
        )


def _run_under_torchrun(main, args, use_cuda):
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise errors.UsageError(
            f"torchrun started a process for GPU {local_rank}, counted from 0, and this machine shows "
            f"{torch.cuda.device_count()}: lower --nproc-per-node."
        )
    _join_group("env://", None, None, local_rank, local_size, use_cuda)
    try:
        with errors.exit_on_error():
            main(*args)
    except SystemExit as ended:
        _leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except Exception:
        traceback.print_exc()
        _leave(1)
    dist.destroy_process_group()


def _spawned(local_rank, main, args, group, folder):
    """Body of one spawned process. An OVDetError leaves its message in ``folder`` and its code as exit status."""
    dist_url, processes, machines, machine_rank, use_cuda = group
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    try:
        _join_group(
            dist_url, machine_rank * processes + local_rank, machines * processes, local_rank, processes, use_cuda
        )
        main(*args)
    except errors.OVDetError as error:
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        write_json(Path(folder) / f"error{local_rank}.json", {"kind": kind.__name__, "message": str(error)})
        _leave(error.exit_code)
    dist.destroy_process_group()
    _leave(0)


def _leave(code):
    """Exit without tearing the interpreter down: the process group's destructors may wait for the other processes, and
    on a busy machine gloo's threads were seen to abort a process that had done its work."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.terminate()
    os._exit(code)


def _join_group(url, rank, world_size, local_rank, local_size, use_cuda):
    """Initialise torch's process group and Detectron2's group of the processes on this machine."""
    if use_cuda:
        torch.cuda.set_device(local_rank)
    ranks = {} if rank is None else {"rank": rank, "world_size": world_size}
    try:
        dist.init_process_group("nccl" if use_cuda else "gloo", init_method=url, timeout=_TIMEOUT, **ranks)
    except (RuntimeError, ValueError, OSError) as error:
        raise errors.SetupError(
            f"the processes cannot reach each other at {url} ({error}): check --dist-url and that the port is free."
        ) from error
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:
        # Detectron2 0.6 has no such function: its own launcher sets the variable.
        for first in range(0, dist.get_world_size(), local_size):
            members = list(range(first, first + local_size))
            local_group = dist.new_group(members)
            if dist.get_rank() in members:
                comm._LOCAL_PROCESS_GROUP = local_group
    comm.synchronize()


def _wait(context, folder):
    """Join the spawned processes; torch terminates the others when one fails."""
    try:
        while not context.join():
            pass
    except mp.ProcessRaisedException:
        # Often the echo of another process's error: its peers see the connection close.
        _raise_reported(folder)
        raise
    except mp.ProcessExitedException as error:
        _raise_reported(folder)
        if error.exit_code > 0:
            raise SystemExit(error.exit_code) from None
        name = signal.Signals(-error.exit_code).name
        raise errors.SetupError(
            f"process {error.error_index} was killed by {name}; SIGKILL mostly means that memory ran out: "
            "lower SOLVER.IMS_PER_BATCH, DATALOADER.NUM_WORKERS or the number of processes."
        ) from None
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _raise_reported(folder):
    for path in sorted(Path(folder).glob("error*.json")):
        report = read_json(path)
        raise getattr(errors, report["kind"])(report["message"])
