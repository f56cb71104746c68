"""Fresh processes for tests, without the seconds that each would import torch and Detectron2 anew.

A fork server of `multiprocessing`, one per test worker and started when it is first needed, imports them once. Every
process of a test is forked from it: it shares nothing with the test's own process, and it may fail or be killed.

`run_program` runs a program of the project as a user would. The fixture `quick_launch` (conftest.py, used by every test)
makes `ovdet2.engine.launch` start its processes here. Those of test_launch.py's programs are spawned, as a user's are.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from torch.distributed.launcher.api import elastic_launch

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")

SERVER.set_forkserver_preload(
    ["open_clip", "matplotlib.figure", "hypothesis", "pytest", "ovdet2.engine", "ovdet2.report.html_report", __name__]
)


def run_program(*arguments, env=None):
    """Run a script with its arguments from the root of the checkout, in a fresh process.

    Args:
        arguments: path of the script, absolute or relative to the root, and its arguments; all become strings.
        env: dict of environment variables beside those of this process.

    Returns:
        subprocess.CompletedProcess: returncode (minus its number if a signal killed it), stdout and stderr as text.
    """
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_run_script, args=(command, os.environ | (env or {}), streams))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in streams))


def _run_script(command, environment, streams):
    """Body of the process of :func:`run_program`."""
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str((ROOT / command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def quick_elastic_launch(config, main):
    """In place of torch's `elastic_launch`: the same, with processes of the fork server."""
    return elastic_launch(replace(config, start_method="forkserver"), _WithEnvironment(main))


class _WithEnvironment:
    """Calls a function in a process of the fork server, whose environment is that of the server's start."""

    def __init__(self, main):
        self.main, self.environment = main, dict(os.environ)
        self.__name__ = self.__qualname__ = main.__qualname__

    def __call__(self, *arguments):
        os.environ.update(self.environment)
        return self.main(*arguments)
