"""The first step: decode the original image."""

from __future__ import annotations

from typing import Any

from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step
from ovdet2.errors import DataError
from ovdet2.io.images import read_image, require_annotated_size


class DecodeImage(Step):
    """Sets ``pixels``, and ``height`` and ``width`` if the data set does not state them."""

    def __init__(self, image_format: str) -> None:
        """
        Args:
            image_format: INPUT.FORMAT, "RGB", "BGR" or "L".
        """
        self.image_format = image_format

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            DataError: the image cannot be read, or its size is not the annotated one.
            UsageError: unknown format.
        """
        try:
            sample.pixels = read_image(sample.file_name, self.image_format)
        except DataError as error:
            if "\\" not in sample.file_name:
                raise
            raise DataError(f"{error} Its name has backslashes: write slashes between folders.") from None
        stated: dict[str, Any] = {"file_name": sample.file_name, "image_id": sample.image_id}
        stated |= {key: sample[key] for key in ("height", "width") if sample[key]}
        require_annotated_size(stated, sample.pixels)
        sample.height, sample.width = stated["height"], stated["width"]
