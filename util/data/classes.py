"""Checks that a label means the same class in every set of images, checkpoint and head."""

import logging
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from torch import Tensor

from util.data.images import IndexedImages, class_names
from util.data.streams import StreamedImages
from util.errors import InputError, counted, first_few

_logger = logging.getLogger(__name__)


def check_classes(
    train_set: IndexedImages | StreamedImages | None,
    val_set: IndexedImages | None,
    num_classes: int | None,
    classes: Sequence[str] | None = None,
) -> int:
    """Return the number of a head's outputs, after checking that labels mean the same everywhere.

    A label is an index into the sorted classes of its own set: if the validation images lacked a
    class, the labels after it would silently shift. So all names have to agree, in the same order.
    For the same reason a head larger than the number of classes counts as a mistake, unless a
    checkpoint's `classes` show that it was trained on exactly these.

    Args:
        train_set: None in an evaluation.
        num_classes: the user's choice, or the size of a checkpoint's head; None to infer it.
        classes: a checkpoint's class names in the order of its outputs, if it has them.

    Raises:
        InputError: a set has no labels, fewer than two classes, or other classes than another
            set or the checkpoint; or the number is unknown or contradicts the data.
    """
    names = {"checkpoint": tuple(classes)} if classes else {}
    for role, images in (("training images", train_set), ("validation images", val_set)):
        if images is not None:
            names[role] = _checked_class_names(role, images, _places(train_set, val_set))
    named = {role: known for role, known in names.items() if known is not None}
    reference = next(iter(named), None)
    for role, known in named.items():
        if known != named[reference]:
            raise _differing_classes(role, known, reference, named[reference])

    if isinstance(train_set, IndexedImages) and train_set.is_table:
        _check_trained(train_set)
    words = getattr(getattr(val_set, "reader", None), "has_word_labels", False)
    if words and train_set is not None and names["training images"] is None:
        raise InputError(
            "the labels of the training images are numbers, those of the validation images are "
            f"names ({first_few(names['validation images'])}): give both as the same"
        )

    for role, known in names.items():
        if known is None and reference is not None:
            _logger.warning(
                "the labels of the %s are numbers without names: they are taken for indices into "
                "the classes of the %s (0 is %s, 1 is %s)",
                *(role, reference, *named[reference][:2]),
            )

    # Validation images cannot show which other classes a stream without names has.
    trained_on_is_known = reference is not None and reference == next(iter(names))
    if num_classes is None:
        if not trained_on_is_known:
            raise InputError(
                f"the number of classes of the {next(iter(names), 'data')} is unknown: "
                "give --num_classes"
            )
        return len(named[reference])
    if reference is None:
        return num_classes
    found = len(named[reference])
    if num_classes < found or (num_classes > found and not classes):
        raise InputError(
            f"a head of {num_classes} classes does not match the {found} of the {reference} "
            f"({first_few(named[reference])}): correct --num_classes or the path of the images"
        )
    return num_classes


def _check_trained(images: IndexedImages) -> None:
    """Refuse names of classes in a table that only validation images have."""
    sizes = images.class_sizes()
    untrained = [name for label, name in enumerate(images.classes or ()) if not sizes[label]]
    if untrained and images.reader.has_word_labels:
        raise InputError(
            f"{counted(len(untrained), 'class', 'classes')} of {images.place} "
            f"({first_few(untrained)}) {'has' if len(untrained) == 1 else 'have'} no training "
            "image: correct these labels, leave their rows out, or move some to training"
        )


def match_classes(
    images: IndexedImages, num_outputs: int, classes: Sequence[str] | None
) -> list[int] | None:
    """Find the output of a head for each label of validation images, by the names of classes.

    Args:
        num_outputs: of the head.
        classes: names of the outputs, if they are known.

    Returns:
        None if labels are outputs: the classes are the same, or one side has no names.

    Raises:
        InputError: the head lacks a class, or see `check_classes`.
    """
    names = _checked_class_names("validation images", images, _places(None, images))
    if classes is None or names is None:
        check_classes(None, images, num_outputs, classes)
        return None
    new = sorted(set(names) - set(classes))
    if new:
        raise InputError(
            f"{counted(len(new), 'class', 'classes')} of the validation images ({first_few(new)}) "
            f"{'is' if len(new) == 1 else 'are'} not among the {len(classes)} of the checkpoint "
            f"({first_few(classes)}): leave these images out, or give another path"
        )
    output_of = {name: output for output, name in enumerate(classes)}
    outputs = [output_of[name] for name in names]
    return None if outputs == list(range(num_outputs)) else outputs


def imagenet_classes(names: Sequence[str] | None, num_outputs: int) -> list[str] | None:
    """Return the names of ImageNet-1K's classes, if these are some of them and a head has as many.

    Released heads do not name their classes.
    """
    known = ImageNetInfo("imagenet-1k").label_names()
    return known if num_outputs == len(known) and names and set(names) <= set(known) else None


def check_output_order(path: str | Path, images: IndexedImages, dataset: str) -> None:
    """Refuse class folders whose order depends on the program, for a head without class names.

    Released heads were trained with torchvision's ImageFolder, which sorts names as text.

    Args:
        path: of the head, for the message.
        images: of folders, in natural order.
        dataset: their --dataset.

    Raises:
        InputError: the orders differ.
    """
    names = images.classes or ()
    by_text = sorted(names)
    if list(names) != by_text:
        raise InputError(
            f"{path} does not name its classes, and the order of its outputs is not clear: "
            f"torchvision and MAE's code sort these folders as {', '.join(by_text[:5])} and so on, "
            f"timm and this code as {', '.join(names[:5])} and so on; choose the first with "
            f"--dataset torch/folder, the second with --dataset {dataset}"
        )


def _places(*sets: IndexedImages | StreamedImages | None) -> str:
    """Return the flags of folders of images, with the folders that they name now."""
    return " and ".join(
        f"{flag} (now {images.place})"
        for flag, images in zip(("--data_path", "--val_path"), sets, strict=True)
        if images is not None and images.listed is not None
    )


def _checked_class_names(
    role: str, images: IndexedImages | StreamedImages, places: str
) -> tuple[str, ...] | None:
    listed = images.listed
    if images.unlabeled is not None:
        lacks_folders = listed is not None and images.unlabeled == listed.unlabeled
        advice = f", and give them by {places}" if lacks_folders else ""
        raise InputError(f"the {role} have no labels: {images.unlabeled}{advice}")
    if listed is not None and listed.ambiguity:
        raise InputError(f"the classes of the {role} are not clear: {listed.ambiguity}")
    names = class_names(images.reader)
    if names is not None and "" in names:
        raise InputError(
            f"some of the {role} are outside the class folders: move each image into the folder "
            "of its class"
        )
    several = isinstance(images, IndexedImages) and images.task == "multilabel"
    if names is not None and len(names) < 2 and not several:
        advice = "use a path that has one folder per class" if listed else "add another class"
        raise InputError(f"the {role} have only one class ({names[0]}): {advice}")
    return names


def _differing_classes(
    role: str, names: tuple[str, ...], reference: str, expected: tuple[str, ...]
) -> InputError:
    missing = [name for name in expected if name not in set(names)]
    extra = [name for name in names if name not in set(expected)]
    faults = [f"{len(missing)} missing ({first_few(missing)})"] if missing else []
    faults += [f"{len(extra)} new ({first_few(extra)})"] if extra else []
    fault = " and ".join(faults) or "their order differs"
    return InputError(
        f"the classes of the {role} differ from those of the {reference}, so labels would not "
        f"mean the same: {fault}; give both the same classes in the same order"
    )


def check_labels(labels: Tensor | None, num_classes: int) -> None:
    """Refuse labels (B,), still on the host, outside the range of classes.

    Raises:
        InputError: with the first such label; or an image has none.
    """
    if labels is None:
        raise InputError("an image has no label: label every image, or remove those without one")
    wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
    if wrong:
        raise InputError(
            f"label {wrong[0]} is not one of the {num_classes} classes, 0 to {num_classes - 1}: "
            "correct --num_classes or the labels"
        )
