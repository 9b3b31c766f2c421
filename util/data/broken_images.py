"""Unreadable images: each is logged once, all are counted, and their number is limited."""

import logging

from PIL import Image, UnidentifiedImageError

from util.compute.distributed import all_gather_objects, is_main_process
from util.data.damage import BrokenImageError
from util.errors import InputError, counted

logger = logging.getLogger(__name__)

MAX_LISTED = 20


def reason_of(error: Exception) -> str:
    """Return why an image is broken, in one line that is the same every time."""
    if isinstance(error, UnidentifiedImageError):  # its own text contains a memory address
        return "not an image of a known format"
    text = " ".join(str(error).split())
    if isinstance(error, Image.DecompressionBombError):
        return f"{text.partition(', could')[0]}: resize it, or read a TIFF by --channels and --tile"
    if isinstance(error, BrokenImageError | InputError) or type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text}"


def too_many_broken(broken: list[tuple[str, str]]) -> InputError:
    """Return the error to raise when these consecutive images are broken."""
    name, reason = broken[-1]
    return InputError(
        f"{counted(len(broken), 'image')} in a row cannot be read, the last being {name} "
        f"({reason}): repair or remove the broken files"
    )


class BrokenImages:
    """Counts unreadable images, logs each once, and stops the run above a limit.

    Args:
        num_images: size of the dataset.
        max_fraction: fraction of the dataset that may be broken, in [0, 1].
    """

    def __init__(self, num_images: int, max_fraction: float) -> None:
        self.num_images = num_images
        self.max_fraction = max_fraction
        self.count = 0  # on this process, since `take_count`
        self.count_elsewhere = 0  # on the other processes, as of the last `check`
        self.reasons: dict[str, str] = {}  # of every distinct file, in the order found

    def add(self, broken: list[tuple[str, str]]) -> None:
        """Count every (file name, reason), and log each file the first time."""
        for name, reason in broken:
            self.count += 1
            if name not in self.reasons:
                self.reasons[name] = reason
                logger.warning("Broken image, replaced or left out: %s (%s)", name, reason)

    def take_count(self) -> int:
        """Return how often all processes read a broken image since the last call."""
        count, self.count, self.count_elsewhere = self.count, 0, 0
        return sum(all_gather_objects([count]))

    def check(self) -> None:
        """Stop the run if too large a fraction of the dataset is broken.

        Every process has to call this, and all reach the same decision.

        Raises:
            InputError: with the number of broken files, the limit and their names.
        """
        self.reasons = dict(all_gather_objects(list(self.reasons.items())))
        self.count_elsewhere = sum(all_gather_objects([self.count])) - self.count
        names = list(self.reasons)
        found = len(names)
        if found <= self.max_fraction * self.num_images:
            return
        first = f"{names[0]} ({self.reasons[names[0]]})"
        listed = ", ".join([first, *names[1:MAX_LISTED]])
        more = f" and {found - MAX_LISTED} more" if found > MAX_LISTED else ""
        raise InputError(
            f"{found} of {self.num_images} images ({found / self.num_images:.2%}) cannot be read, "
            f"above the limit of {self.max_fraction:.2%}: repair or remove them, "
            f"or raise --max_broken: {listed}{more}"
        )

    def state_dict(self) -> dict[str, int | dict[str, str]]:
        """Return plain values to resume from, for all processes as of the last `check`."""
        return {"count": self.count + self.count_elsewhere, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, int | dict[str, str]]) -> None:
        """Continue from the values of `state_dict`."""
        self.count = int(state["count"]) if is_main_process() else 0
        self.reasons = {str(name): str(reason) for name, reason in state["reasons"].items()}
