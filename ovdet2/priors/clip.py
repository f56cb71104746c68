"""Concept priors by CLIP: the cosine between a whole image and a word (CCKT-Det).

Shapes: N images, V views of an image, K words, D embedding dimension, S side of the teacher's input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ovdet2.errors import DataError, NumericalError
from ovdet2.io.images import read_image
from ovdet2.io.loading import WatchedLoader
from ovdet2.vlm.crops import crop_regions
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary

RESIZE = {"crop": "centre_crop", "squash": "warp"}  # name here -> policy of ovdet2.vlm.crops


class ClipBackend:
    """score = sigmoid(max over views of cos(image, word) / tau).

    The views are the whole image and, with ``tiles`` = n > 1, the n x n cells of an even grid over it (edges at rounded
    pixels, no overlap). An object that a cell edge cuts is complete in the whole image. Views are resized with the
    teacher's interpolation. Sigmoid is monotonic, so the maximum is taken of the cosines.
    """

    kind = "prediction"

    def __init__(
        self,
        teacher: Teacher,
        vocabulary: Vocabulary,
        tiles: int = 1,
        resize: str = "crop",
        temperature: float = 0.07,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
            vocabulary: :class:`~ovdet2.vocabulary.Vocabulary` of K words, embedded by the same teacher.
            tiles: n, at least 1.
            resize: "crop" takes the centre square, as CLIP's transform does, and drops the ends of a long image;
                "squash" warps the whole image to S x S.
            temperature: tau; 0.07 in CCKT.
            batch_size: views per forward pass.
            num_workers: processes that decode.
        """
        self.teacher, self.vocabulary = teacher, vocabulary
        self.tiles, self.resize, self.temperature = tiles, resize, temperature
        self.batch_size, self.num_workers = batch_size, num_workers

    @property
    def source(self) -> dict[str, Any]:
        return {
            "backend": "clip",
            "teacher": self.teacher.fingerprint.to_dict(),
            "templates": self.vocabulary.templates,
            "resize": self.resize,
            "tiles": self.tiles,
            "temperature": self.temperature,
        }

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, None, torch.Tensor]]:
        """The scores of all words per image, see :mod:`ovdet2.priors`.

        Raises:
            NumericalError: the embeddings are not finite.
        """
        samples = _Views(records, self.tiles, self.resize, self.teacher.image_size, self.teacher.interpolation)
        together = max(1, self.batch_size // len(view_boxes(1, 1, self.tiles)))
        loader = WatchedLoader(samples, self.num_workers, batch_size=together, collate_fn=list)
        for batch in loader:
            for fault in (views for _, views in batch if isinstance(views, str)):
                skip(fault)
            good = [(image_id, views) for image_id, views in batch if not isinstance(views, str)]
            if good:
                scores = self.score(torch.stack([views for _, views in good]))
                yield from ((image_id, None, row) for (image_id, _), row in zip(good, scores))

    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scores of the words from the views of images.

        Args:
            pixels: Tensor [N, V, 3, S, S] uint8, RGB.

        Returns:
            Tensor [N, K] float32 in [0, 1], on the CPU.
        """
        embeddings = self.teacher.encode_image(pixels.flatten(0, 1), self.batch_size)
        if not torch.isfinite(embeddings).all():
            raise NumericalError("the teacher's embeddings are not finite: try another --device.")
        cosine = embeddings @ self.vocabulary.embeddings.to(embeddings).T
        return (cosine.view(*pixels.shape[:2], -1).amax(dim=1) / self.temperature).sigmoid().cpu()


def view_boxes(height: int, width: int, tiles: int) -> torch.Tensor:
    """Boxes of the whole image, then of its n x n cells by rows if n > 1: Tensor [V, 4], XYXY in integer pixels."""
    boxes = [(0, 0, width, height)]
    if tiles > 1:
        rows, columns = ([round(i * length / tiles) for i in range(tiles + 1)] for length in (height, width))
        boxes += [(columns[j], rows[i], columns[j + 1], rows[i + 1]) for i in range(tiles) for j in range(tiles)]
    return torch.tensor(boxes)


class _Views(torch.utils.data.Dataset):
    """(image id, views) of a record, or (image id, error message) if its file cannot be read."""

    def __init__(self, records, tiles, resize, side, interpolation):
        self.records, self.tiles = records, tiles
        self.how = side, RESIZE[resize], interpolation

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        try:
            image = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1)
        except DataError as error:
            return record["image_id"], str(error)
        return record["image_id"], crop_regions(
            image, view_boxes(image.shape[1], image.shape[2], self.tiles), *self.how
        )
