"""One source of training images, as the configuration and methods name it."""

from dataclasses import dataclass

from ovdet2.data.samples import BOXES


@dataclass(frozen=True)
class SourceSpec:
    """A data set that is drawn from in training, with its own batch size, sampler and image sizes.

    Attributes:
        name: of the source in logs and checkpoints, unique in a run.
        datasets: names of registered data sets of one kind.
        images_per_step: images of a step over all processes.
        kind: what the data sets know of their images, one of :data:`~ovdet2.data.samples.KINDS`.
        sampler: as DATALOADER.SAMPLER_TRAIN; empty: that one for boxes, "TrainingSampler" otherwise.
        min_sizes, max_size: as INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN; empty and 0: those.
        ratio: steps of this source to those of the others, where sources alternate.
    """

    name: str
    datasets: tuple[str, ...]
    images_per_step: int
    kind: str = BOXES
    sampler: str = ""
    min_sizes: tuple[int, ...] = ()
    max_size: int = 0
    ratio: float = 1.0
