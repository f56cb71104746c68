"""Concept priors by CLIP: the cosine between a whole image and a word, CCKT's first way.

Shapes: N images, V views of an image, K words, D embedding dimension, S side of the teacher's input.
"""

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as T

from ovdet2.data.images import read_image
from ovdet2.errors import DataError, NumericalError

RESIZE = ("crop", "squash")


class ClipBackend:
    """score = sigmoid(max over views of cos(image, word) / tau).

    The views are the whole image and, with ``tiles`` = n > 1, the n x n cells of an even grid over it (edges at rounded
    pixels, no overlap; what a cell edge cuts, the whole image holds). Sigmoid ascends, so the maximum may be taken of
    the cosines.
    """

    kind = "prediction"

    def __init__(self, teacher, vocabulary, tiles=1, resize="crop", temperature=0.07, batch_size=64, num_workers=0):
        """
        Args:
            teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
            vocabulary: :class:`~ovdet2.vocabulary.Vocabulary` of K words, embedded by the same teacher.
            tiles: n, at least 1.
            resize: "crop" is CLIP's own transform (shorter side to S, square out of the centre), which never sees the
                ends of a long image; "squash" warps the whole of it to S x S.
            temperature: tau; 0.07 in CCKT.
            batch_size: views per forward pass.
            num_workers: processes that decode.
        """
        self.teacher, self.vocabulary = teacher, vocabulary
        self.tiles, self.resize, self.temperature = tiles, resize, temperature
        self.batch_size, self.num_workers = batch_size, num_workers

    @property
    def source(self):
        return {
            "backend": "clip",
            "teacher": self.teacher.fingerprint.to_dict(),
            "templates": self.vocabulary.templates,
            "resize": self.resize,
            "tiles": self.tiles,
            "temperature": self.temperature,
        }

    def lists(self, records, skip):
        """As every backend; raises NumericalError for embeddings that are not finite."""
        interpolation = self.teacher.clip.visual.preprocess_cfg.get("interpolation", "bicubic")
        samples = _Views(records, self.tiles, self.resize, self.teacher.image_size, InterpolationMode(interpolation))
        together = max(1, self.batch_size // (1 + self.tiles**2))
        loader = DataLoader(samples, batch_size=together, num_workers=self.num_workers, collate_fn=list)
        for batch in loader:
            for fault in (found for _, found in batch if isinstance(found, str)):
                skip(fault)
            good = [(image_id, found) for image_id, found in batch if not isinstance(found, str)]
            if good:
                scores = self.score(torch.stack([found for _, found in good]))
                yield from ((image_id, None, row) for (image_id, _), row in zip(good, scores))

    def score(self, pixels):
        """
        Args:
            pixels: Tensor [N, V, 3, S, S] uint8, RGB.

        Returns:
            Tensor [N, K] float32 in [0, 1], on the CPU.
        """
        embeddings = self.teacher.encode_image(pixels.flatten(0, 1).to(self.teacher.mean) / 255, self.batch_size)
        if not torch.isfinite(embeddings).all():
            raise NumericalError("the teacher's embeddings are not finite: try another --device.")
        cosine = embeddings @ self.vocabulary.embeddings.to(embeddings).T
        return (cosine.view(*pixels.shape[:2], -1).amax(dim=1) / self.temperature).sigmoid().cpu()


def views(image, tiles, resize, side, interpolation=InterpolationMode.BICUBIC):
    """The views of an image.

    Args:
        image: array [H, W, 3] uint8.
        tiles, resize: of :class:`ClipBackend`.
        side: S.
        interpolation: of the teacher's transform; always anti-aliased.

    Returns:
        Tensor [V, 3, S, S] uint8, the whole image first, then the cells by rows.
    """
    height, width = image.shape[:2]
    rows, columns = ([round(i * length / tiles) for i in range(tiles + 1)] for length in (height, width))
    parts = [image]
    if tiles > 1:
        parts += [image[rows[i] : rows[i + 1], columns[j] : columns[j + 1]] for i in range(tiles) for j in range(tiles)]
    return torch.stack([_resized(part, resize, side, interpolation) for part in parts])


def _resized(image, resize, side, interpolation):
    picture = T.to_pil_image(image)  # Pillow resamples, as in CLIP's own transform
    size = [side, side] if resize == "squash" else [side]
    return T.pil_to_tensor(T.center_crop(T.resize(picture, size, interpolation), [side, side]))


class _Views(torch.utils.data.Dataset):
    """(image id, views) of a record, or (image id, what is wrong with its file)."""

    def __init__(self, records, *how):
        self.records, self.how = records, how

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        try:
            return record["image_id"], views(read_image(record["file_name"], "RGB"), *self.how)
        except DataError as error:
            return record["image_id"], str(error)
