"""Images with annotations: read by index, broken ones replaced or left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch.utils.data import Dataset

from util.data.broken_images import reason_of, too_many_broken
from util.data.folders import DiskTree
from util.data.images import MAX_BROKEN_IN_A_ROW, names_hash
from util.data.layout import ImageList, find_images
from util.errors import InputError
from util.normalization import RGB8, PixelFormat


class AnnotatedSample(NamedTuple):
    """An image with its annotations, and the broken ones that were skipped to reach it."""

    content: object | None
    """What `AnnotatedImages.transformed` returns; None if the image is broken and left out."""
    broken: list[tuple[str, str]]


class StoredImages:
    """Image files as `util.data.colors.choose_colors` reads them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def stored(self, index: int) -> tuple[BinaryIO, None]:
        """Return an open file, and no label."""
        return self.paths[index].open("rb"), None

    def name(self, index: int) -> str:
        """Return an image's path."""
        return str(self.paths[index])


class AnnotatedImages(Dataset):
    """Images read by `[epoch, index]`, which with the seed decide everything.

    Subclasses define `path`, `read`, `transformed` and `batch`.

    Args:
        names: of the images, the same wherever the files are.
        folder: of the images.
        replace_broken: read the next image instead of a broken one, for training; else leave it
            out.
        pixels: how images are read.
        show_channels: of an image, in pictures, see `util.eval.display.choose_display`.
    """

    num_crops = 1  # of an image, for StepLoader
    classes = None  # of an image; its objects or pixels have classes
    notes = ()  # for the log

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        seed: int,
        replace_broken: bool,
        pixels: PixelFormat = RGB8,
        show_channels: Sequence[int] | None = None,
    ) -> None:
        self.names, self.folder = list(names), folder
        self.pixels, self.show_channels = pixels, show_channels
        self.seed, self.replace_broken = seed, replace_broken

    def path(self, index: int) -> str:
        """Return the path of an image, for messages."""
        raise NotImplementedError

    def read(self, index: int) -> object:
        """Read an image with its annotations.

        Raises:
            InputError: the annotations have an error that concerns more than this image.
            Exception: the image or its annotations are broken.
        """
        raise NotImplementedError

    def transformed(self, index: int, content: object, *seed_parts: int | str) -> object:
        """Transform what `read` returns; all randomness comes from the seed, see `fold_seed`."""
        raise NotImplementedError

    def batch(self, contents: Sequence[object], broken: list[tuple[str, str]]) -> object:
        """Combine what `transformed` returns into a micro-batch.

        Raises:
            InputError: the images have different types of values.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    @property
    def place(self) -> str:
        """Where the images are from, for the log."""
        return str(self.folder)

    @property
    def listed(self) -> ImageList:
        """What the folder holds, with or without annotations."""
        return find_images(DiskTree(self.place, arrays=not self.pixels.is_rgb8), "", "last")

    @property
    def num_samples(self) -> int:
        """Number of images."""
        return len(self.names)

    def file_names(self) -> list[str]:
        """Return the names of all images."""
        return self.names

    def class_sizes(self) -> None:
        """Not known: an image has objects or pixels of several classes."""

    def identity(self) -> dict[str, object]:
        """Return what distinguishes these images from others: their number and a hash of names."""
        return {
            "number of training images": len(self.names),
            "hash of their names": names_hash(self.names),
        }

    def __getitem__(self, key: tuple[int, int]) -> AnnotatedSample:
        """Return the image at (epoch, index).

        Raises:
            InputError: see `read`, or too many images in a row are broken.
        """
        epoch, index = key
        broken = []
        for offset in range(min(len(self), MAX_BROKEN_IN_A_ROW) if self.replace_broken else 1):
            candidate = (index + offset) % len(self)
            try:
                content = self.read(candidate)
            except InputError:
                raise
            except Exception as error:  # decoders raise anything on broken files
                broken.append((self.path(candidate), reason_of(error)))
                continue
            seed_parts = ("augment", self.seed, epoch, index)
            return AnnotatedSample(self.transformed(candidate, content, *seed_parts), broken)
        if self.replace_broken:
            raise too_many_broken(broken)
        return AnnotatedSample(None, broken)

    def name_at(self, key: tuple[int, int]) -> str:
        """Return the path of the image that is read at (epoch, index), for messages."""
        return self.path((key[1] + len(self[key].broken)) % len(self))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[AnnotatedSample | InputError]:
        """Return a micro-batch; errors are values, see IndexedImages."""
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [error]

    def collate(self, samples: list[AnnotatedSample | InputError]) -> object | InputError:
        """Combine samples into a batch; if one of them is an error, return the error instead."""
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
        broken = [entry for sample in samples for entry in sample.broken]
        try:
            return self.batch([s.content for s in samples if s.content is not None], broken)
        except InputError as error:
            return error
