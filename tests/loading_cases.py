"""Data sets whose loading processes fail in several ways."""

import os
import signal
import time

import torch
from torch.utils.data import Dataset


class Failing(Dataset):
    """Numbers; loading number 5 fails as ``how`` says."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 5:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.how.endswith("after a batch"):  # which is about to be fetched from it
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGSTOP if self.how.startswith("stopped") else signal.SIGKILL)
            if self.how == "bus error":  # of shared memory that is full
                os.kill(os.getpid(), signal.SIGBUS)
            if self.how == "hangs":
                time.sleep(1000)
            if self.how == "slow":
                time.sleep(1.0)
            if self.how == "full":  # as torch raises it in the thread that hands over
                return Unsendable()
            if self.how == "a bug":
                raise KeyError("seven")
        return torch.tensor([index])


class Unsendable:
    """Cannot be pickled: "No space left on device"."""

    def __reduce__(self):
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
