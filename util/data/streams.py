"""Images read sequentially: webdatasets and streams of Hugging Face datasets."""

import io
import itertools
import logging
import random
from collections.abc import Iterator
from functools import cached_property
from typing import BinaryIO

from torch.utils.data import IterableDataset, get_worker_info

from util.data import hub, shards
from util.data.batch import Sample
from util.data.broken_images import reason_of, too_many_broken
from util.data.images import MAX_BROKEN_IN_A_ROW, Transform, class_names, names_hash
from util.data.labels import index_of
from util.errors import InputError, RunError, counted
from util.seeding import fold_seed

logger = logging.getLogger(__name__)


class StreamedImages(IterableDataset):
    """Images read sequentially, without end: an exhausted source starts again and logs it.

    They are a function of (seed, epoch, rank, world size, worker, number of workers).

    Args:
        source: an iterable timm dataset that does not convert its images.
        name: the source's name, such as `wds/...`.
    """

    def __init__(
        self, source: IterableDataset, transform: Transform, *, seed: int, name: str
    ) -> None:
        self.reader = source.reader
        self.transform = transform
        self.seed = seed
        self.name = self.place = name
        self.is_sharded = hasattr(self.reader, "sample_shuffle_size")  # a webdataset
        if self.is_sharded:
            self.place += f" ({counted(len(self.file_names()), 'shard')})"
        self.listed, self.notes = None, []
        self.num_samples = self.reader.num_samples
        self.classes = class_names(self.reader)
        self.num_classes = len(self.classes) if self.classes else None
        self.epoch, self.rank, self.world_size = 0, 0, 1

    @property
    def num_crops(self) -> int:
        """Crops per image."""
        return self.transform.num_crops

    @cached_property
    def unlabeled(self) -> str | None:
        """Why there are no labels to learn, as far as the first images show; None if there are."""
        try:
            if self.is_sharded:
                return shards.why_unlabeled(_shards_of(self.reader)[0])
            return hub.why_unlabeled(self.reader) if hasattr(self.reader, "unlabeled") else None
        except Exception as error:  # training meets it again, if it lasts
            logger.warning("the labels of %s cannot be checked: %s", self.name, reason_of(error))
            return None

    def file_names(self) -> list[str]:
        """Return the names of a webdataset's shards; none for other streams."""
        return list(self.reader.split_info.filenames) if self.is_sharded else []

    def class_sizes(self) -> None:
        """Not known before the images are read."""

    def content_hash(self) -> None:
        """Not known before the images are read."""

    def identity(self) -> dict[str, object]:
        """Return what distinguishes these images from others: their number, in a stream."""
        return {
            "number of training images": self.num_samples,
            "hash of their names": None,
            "hash of the names of classes": names_hash(self.classes),
        }

    def set_position(self, epoch: int, rank: int, world_size: int, num_workers: int) -> None:
        """Choose the epoch of the next iteration, and split it over ranks and workers."""
        self.epoch = epoch
        self.rank = self.reader.dist_rank = rank
        self.world_size = self.reader.dist_num_replicas = world_size
        self.reader.set_loader_cfg(num_workers=num_workers)
        self.reader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample | InputError | RunError]:
        """Yield samples; an error is the last value, see `IndexedImages.__getitems__`."""
        try:
            yield from self._samples()
        except InputError as error:
            yield error
        except Exception as error:
            yield RunError(f"cannot continue reading {self.name}: {reason_of(error)}")

    def _samples(self) -> Iterator[Sample]:
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        share = self.rank * num_workers + (worker.id if worker else 0)
        broken, num_broken, num_images = [], 0, 0
        for restart in itertools.count():
            num_images_before = num_images
            if self.is_sharded:
                parts, num_shares = (self.seed, self.epoch, restart), self.world_size * num_workers
                source = _read_shards(self.reader, parts, share, num_shares, broken)
            else:
                source = (("", image, label) for image, label in self.reader)
            seed_parts = ("augment", self.seed, self.epoch, share)
            for name, record, label in source:
                try:
                    image = self.transform.read(record)
                    crops = self.transform(image, *seed_parts, num_images)
                except Exception as error:  # decoders raise anything on broken files
                    broken.append((name or self._name_of(record), reason_of(error)))
                    num_broken += 1
                    if num_broken == MAX_BROKEN_IN_A_ROW:
                        raise too_many_broken(broken) from error
                    continue
                yield Sample(crops, index_of(label), broken.copy())
                broken.clear()
                num_broken, num_images = 0, num_images + 1
            if num_images == num_images_before and broken:
                raise too_many_broken(broken)
            if num_images == num_images_before:
                raise InputError(
                    f"{self.name} has no shard for one of the workers: lower --num_workers, so "
                    "that all processes together have at most one worker per shard"
                )
            logger.warning(
                "%s: in epoch %d, loader process %d has read all of its images (%d) and starts "
                "over",
                *(self.name, self.epoch + 1, share, num_images),
            )

    def _name_of(self, record: object) -> str:
        """Name a record that is not from a shard, by its path if it has one."""
        path = record.get("path") if isinstance(record, dict) else None
        return path or f"{self.name}: {fold_seed(repr(record)):x}"


def _read_shards(
    reader: object,
    seed_parts: tuple[int, ...],
    share: int,
    num_shares: int,
    broken: list[tuple[str, str]],
) -> Iterator[tuple[str, BinaryIO | None, int | None]]:
    """Yield (name, file, label) of a share of a webdataset, shuffled; errors go to `broken`.

    timm's own iteration silently drops unlabeled and broken images.
    """
    import webdataset

    def samples() -> Iterator[tuple[str, shards.ShardSample]]:
        for shard in urls[share::num_shares]:

            def note_broken(error: Exception, shard: str = shard) -> bool:
                broken.append((shard, f"cannot be read to its end: {type(error).__name__}"))
                return True

            for sample in shards.read_shard(shard, note_broken):
                yield f"{shard}/{sample.key}", sample

    urls = _shards_of(reader)
    random.Random(fold_seed("shards", *seed_parts)).shuffle(urls)
    sizes = {"bufsize": reader.sample_shuffle_size, "initial": reader.sample_initial_size}
    rng = random.Random(fold_seed("shuffle", *seed_parts, share))
    for name, sample in webdataset.shuffle(**sizes, rng=rng)(samples()):
        image = None if sample.image is None else io.BytesIO(sample.image)
        yield name, image, sample.label


def _shards_of(reader: object) -> list[str]:
    return [f"{reader.root}/{name}" for name in reader.split_info.filenames]
