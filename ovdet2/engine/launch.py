"""Start the processes of a run, on CPU (gloo) or CUDA (NCCL), by torch's elastic launcher or under torchrun."""

import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from ovdet2 import errors

_TIMEOUT = timedelta(minutes=30)
_MONITOR_INTERVAL = 0.05  # seconds between two checks of the processes
_STOP_SECONDS = 600  # in which a stopped training writes its checkpoint; torch's default is 30
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(
    main: Callable[..., object],
    processes_per_machine: int,
    machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
    use_cuda: bool | None = None,
) -> None:
    """Run ``main(*args)`` in every process of a group, and end all of them when one fails.

    Under torchrun (RANK and WORLD_SIZE in the environment) this process joins that group and the other arguments are
    ignored. With one process in all, ``main`` is simply called. Otherwise torch's elastic launcher starts the
    processes, without restarts.

    Args:
        main: function at module level, since the processes are spawned.
        processes_per_machine: at least 1; on CUDA at most the number of GPUs.
        machines, machine_rank: how many machines run this command, and which of them this is.
        dist_url: "tcp://host:port" of machine 0, the same on all; "auto" on a single machine. Machines wait up to 30
            minutes for each other.
        args: tuple handed to ``main``.
        use_cuda: NCCL and one GPU per process, or gloo on the CPU; None: CUDA if there is one.

    Raises:
        OVDetError: the first one that a process of this machine raised, with its message and exit code. Under torchrun
            the process prints the message and ends with the code, without returning here.
        ChildFailedError: another exception in a process, with its traceback.
        UsageError: the numbers do not fit together, or torchrun started more processes than there are GPUs.
        SetupError: a process was killed by a signal, or the machines cannot reach each other.
        SystemExit: a process ended itself with a code other than 0, or this process received SIGTERM, SIGHUP or
            SIGQUIT (128 + its number).
        KeyboardInterrupt: this process received SIGINT. Like any other failure it ends all processes of the machine.
    """
    use_cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
    if torchrun_rank():
        _check_torchrun(use_cuda)
        _run_in_group(main, args, use_cuda)
        return
    _check(processes_per_machine, machines, machine_rank, dist_url, use_cuda)
    if processes_per_machine * machines == 1:
        main(*args)
        return
    with tempfile.TemporaryDirectory(prefix="ovdet2-") as folder, _agent_surroundings():
        config = _launch_config(processes_per_machine, machines, machine_rank, dist_url, folder)
        if machines > 1 and threading.current_thread() is threading.main_thread():
            # Waiting for the other machines happens inside torch, where Python's Ctrl-C is not handled. No process is
            # started yet; when they start, torch installs its own handler.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            elastic_launch(config, _spawned)(main, tuple(args), use_cuda)
        except ChildFailedError as failed:
            _raise_first_error(failed, folder)
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stopped.sigval) from None
        except (dist.DistError, RendezvousError, OSError) as error:
            raise _unreachable(config.rdzv_endpoint, error) from error


def torchrun_rank() -> tuple[int, int] | None:
    """(rank, number of processes) if torchrun started this process, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None


def _check(processes: int, machines: int, machine_rank: int, dist_url: str, use_cuda: bool) -> None:
    if processes < 1 or machines < 1 or not 0 <= machine_rank < machines:
        raise errors.UsageError(
            f"{processes} processes on {machines} machines, this one being number {machine_rank}: give at least one of "
            "each and a machine rank from 0 on."
        )
    if not (_is_address(dist_url) or (machines == 1 and dist_url == "auto")):
        raise errors.UsageError(
            f"--dist-url is {dist_url!r}: give tcp://<machine 0>:<port>, or auto on a single machine."
        )
    if use_cuda and processes > torch.cuda.device_count():
        raise errors.UsageError(
            f"{processes} processes need as many GPUs, this machine has {torch.cuda.device_count()}: lower --num-gpus."
        )


def _is_address(dist_url: str) -> bool:
    """Whether it is tcp:// with a host and a port."""
    try:
        parts = urlsplit(dist_url)
        return parts.scheme == "tcp" and bool(parts.hostname and parts.port)
    except ValueError:  # the port is not a number
        return False


def _check_torchrun(use_cuda: bool) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise errors.UsageError(
            f"torchrun started a process for GPU {local_rank}, counted from 0, and this machine shows "
            f"{torch.cuda.device_count()}: lower --nproc-per-node."
        )


def _launch_config(processes: int, machines: int, machine_rank: int, dist_url: str, folder: str) -> LaunchConfig:
    """The launcher's settings; each process writes its error to a json below ``folder``.

    On one machine the rendezvous (c10d) takes a free port. Given an address, it is static: machine 0 listens there, and
    ranks follow the machines' numbers.
    """
    meeting: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    if dist_url != "auto":
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": dist_url.removeprefix("tcp://")}
        meeting["rdzv_configs"] = {"rank": machine_rank, "timeout": int(_TIMEOUT.total_seconds())}
    if "signals_to_handle" in {field.name for field in fields(LaunchConfig)}:  # torch from 2.8 on
        # An ignored signal stays ignored: nohup ignores SIGHUP, and a shell ignores SIGINT for background commands.
        handled = [each.name for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
        meeting["signals_to_handle"] = ",".join(handled)
    if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:
        meeting["shutdown_timeout"] = _STOP_SECONDS
    return LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id="ovdet2",
        max_restarts=0,
        monitor_interval=_MONITOR_INTERVAL,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        **meeting,
    )


@contextlib.contextmanager
def _agent_surroundings() -> Generator[None, None, None]:
    """Silence torch's elastic launcher, and restore the signal handlers that it replaces.

    It logs every failure with its own traceback, before the error that :func:`launch` raises.
    """
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    others = ("torchelastic-events-null", "torch.multiprocessing.spawn")
    loggers = [logging.getLogger(name) for name in (*others, *names)]
    disabled = [logger.disabled for logger in loggers]
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in _SIGNALS if in_main_thread}
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, before in zip(loggers, disabled):
            logger.disabled = before
        for each, handler in handlers.items():
            signal.signal(each, handler)


def _spawned(main: Callable[..., object], args: tuple, use_cuda: bool) -> None:
    """Body of a process that :func:`launch` started."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which Python warns when the process is ended
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    _run_in_group(main, args, use_cuda, spawned=True)
    atexit.register(_leave, 0)


def _run_in_group(main: Callable[..., object], args: tuple, use_cuda: bool, spawned: bool = False) -> None:
    """Join the group that the environment describes and run ``main``; a process that fails does not return."""
    code = 0
    try:
        _join_group(use_cuda)
        main(*args)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        code = _report(error, spawned)
    if code:
        _leave(code)
    dist.destroy_process_group()


def _report(error: Exception, spawned: bool) -> int:
    """Record the error in torch's file, print what the parent process will not print, and return the exit code."""
    if isinstance(error, OSError):
        error = errors.full_disk(error) or error
    readable = isinstance(error, errors.OVDetError)
    if readable:
        # The parent raises the classes of errors.py only; a subclass from elsewhere is reported as its nearest one.
        kind = next(base for base in type(error).__mro__ if base.__module__ == errors.__name__)
        get_error_handler().record_exception(kind(str(error)))
    else:
        get_error_handler().record_exception(error)
    if not readable or os.environ.get("OVDET2_DEBUG"):
        traceback.print_exc()
    elif not spawned:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if spawned and not readable:
        # Often caused by another process that failed and closed its connection: the parent must see that one first.
        time.sleep(4 * _MONITOR_INTERVAL)
    return error.exit_code if readable else 1


def _leave(code: int) -> NoReturn:
    """Exit without the interpreter's cleanup: the process group's destructors may wait for the other processes, and on
    a busy machine gloo's threads were seen to abort a process that had finished its work."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.terminate()
    os._exit(code)


def _join_group(use_cuda: bool) -> None:
    """Initialise torch's process group and Detectron2's group of the processes on this machine."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if use_cuda:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("nccl" if use_cuda else "gloo", init_method="env://", timeout=_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise _unreachable(address, error) from error
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:
        # Detectron2 0.6 has no such function: its own launcher sets the variable.
        for first in range(0, dist.get_world_size(), local_size):
            members = list(range(first, first + local_size))
            local_group = dist.new_group(members)
            if dist.get_rank() in members:
                comm._LOCAL_PROCESS_GROUP = local_group  # pyrefly: ignore[bad-assignment]  None before
    comm.synchronize()


def _unreachable(address: str, error: Exception) -> errors.SetupError:
    return errors.SetupError(
        f"the processes cannot reach each other at {address} ({error}): check --dist-url and that the port is free."
    )


def _raise_first_error(failed: ChildFailedError, folder: str) -> NoReturn:
    """Raise what ended the run: the first OVDetError recorded, else the signal or exit code of the failed process."""
    records = sorted(Path(folder).rglob("error.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in records:
        try:
            kind, _, message = json.loads(path.read_text())["message"]["message"].partition(": ")
        except ValueError:  # its process was terminated while writing
            continue
        error = getattr(errors, kind, None)
        if error is not None:
            raise error(message) from None
    _, failure = failed.get_first_failure()
    if failure.exitcode < 0:
        raise errors.SetupError(
            f"process {failure.local_rank} was killed by {failure.signal_name()}; SIGKILL mostly means that memory ran "
            "out: lower SOLVER.IMS_PER_BATCH, DATALOADER.NUM_WORKERS or the number of processes."
        ) from None
    if not Path(failure.error_file).is_file():
        raise SystemExit(failure.exitcode) from None
    raise failed
