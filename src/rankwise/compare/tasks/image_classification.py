"""Images into classes: one label for each picture.

Pictures are files that a table names, or what a data set of the hub holds. Each is made the model's input by the image
processor that comes with the model; nothing is drawn or cut at random.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.compare.sections import Text
from rankwise.compare.tasks.base import Data, DataSection, Examples, Splits
from rankwise.compare.tasks.classification import LabelledData, LabelTask
from rankwise.errors import DataError

if TYPE_CHECKING:
    from rankwise.compare.tables import Table


class ImageData(LabelledData):
    """Images and their labels."""

    image: Text
    """The column of the images: paths from the folder of the table's file."""
    label: Text
    """The column of what is to be predicted."""

    @property
    def columns(self) -> dict[str, str]:
        """Of the images and the labels."""
        return {"image": self.image, "label": self.label}


class ImageClassification(LabelTask):
    """One label for each image. Scores: accuracy and the mean F1 over the labels."""

    type: Literal["image_classification"] = "image_classification"

    data_section: ClassVar[DataSection] = ImageData
    opens_as: ClassVar[str] = "IMAGE_CLS"
    peft_type: ClassVar[str | None] = None
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    example_model: ClassVar[str] = "path/to/a/vision/model"

    def read(self, table: Table, data: Data) -> Examples:
        """Images, each looked at, and labels."""
        assert isinstance(data, ImageData)
        images = table.values("image", data.image)
        labels = table.values("label", data.label)
        return Examples(
            table.source,
            {
                "image": [_found(image, table, row) for row, image in enumerate(images, start=1)],
                "label": [self.target(label, table.source, row) for row, label in enumerate(labels, start=1)],
            },
        )

    def contents(self, examples: Examples) -> Any:
        """The images by a digest of each, wherever they lie."""
        return [[_digest(image) for image in examples["image"]], examples["label"]]

    def open_processor(self, model: str) -> Any:
        """The image processor that comes with the model."""
        from rankwise.base_models import open_image_processor

        return open_image_processor(model, argument="model")

    def dataset(self, examples: Examples, splits: Splits, processor: Any) -> Any:
        """Pixels, read when they are asked for, and the numbers of labels."""
        from torch.utils.data import Dataset

        images, targets = examples["image"], self.targets(examples, splits)

        class Pixels(Dataset):
            def __len__(self) -> int:
                return len(images)

            def __getitem__(self, row: int) -> dict[str, Any]:
                pixels = processor(images=[_opened(images[row])], return_tensors="pt")["pixel_values"][0]
                return {"pixel_values": pixels, "labels": targets[row]}

        return Pixels()

    def collator(self, processor: Any) -> Any:
        """Images stacked, which a processor makes all of one size."""
        from transformers import default_data_collator

        return default_data_collator


def _found(image: Any, table: Table, row: int) -> Any:
    """The path of an image file that is there and opens; or the image, where the table holds images themselves.

    Raises:
        DataError: naming the table and the row, counted from 1.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str) or table.folder is None:
        raise DataError(f"{table.source} has no image and no path of one in row {row}: {image!r:.80}")
    path = table.folder / image
    try:
        with Image.open(path) as opened:
            opened.verify()
    except FileNotFoundError as error:
        raise DataError(f"{table.source} names an image in row {row} that is missing: {image!r}") from error
    except (OSError, SyntaxError) as error:  # pillow calls a broken PNG a syntax error
        raise DataError(f"{table.source} names an image in row {row} that pillow cannot read: {image!r}") from error
    return path


def _opened(image: Any) -> Any:
    """The image in red, green and blue.

    Raises:
        DataError: the file turned out to be cut off.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise DataError(f"{image} is cut off: pillow cannot read it whole") from error


def _digest(image: Any) -> str:
    """A digest of a file, or of the pixels of an image without one."""
    content = image.read_bytes() if isinstance(image, Path) else image.tobytes() + repr(image.size).encode()
    return hashlib.sha256(content).hexdigest()
