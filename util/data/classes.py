"""Labels mean the same class everywhere: in each set of images, in a checkpoint and in a head."""

import itertools
import os
from collections import Counter
from collections.abc import Collection, Sequence

from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor

from util.data.images import IndexedImages, class_names
from util.data.packed import PackedImages
from util.data.streams import StreamedImages
from util.errors import InputError

MAX_LISTED = 3  # classes
CLASS_FOLDERS = (ReaderImageFolder, ReaderImageInTar, PackedImages)


def check_classes(
    train_set: IndexedImages | StreamedImages | None,
    val_set: IndexedImages | None,
    num_classes: int | None,
    classes: Sequence[str] | None = None,
) -> int:
    """The number of outputs that a head needs, once labels mean the same class everywhere.

    A label is a position among the sorted classes of its own set: were one class missing among
    the held-out images, the labels behind it would silently shift. So names have to agree, all of
    them and in order. For the same reason a head larger than the number of classes is taken for a
    mistake, unless a checkpoint tells by its `classes` that it was trained on just these.

    Args:
        train_set: the images to train on, None in an evaluation.
        val_set: the held-out images, None where there are none.
        num_classes: as given by the user, or the size of a checkpoint's head; None to find it.
        classes: names of a checkpoint's classes in the order of its outputs, if it has them.

    Raises:
        InputError: a set has no labels, fewer than two classes, or other classes than another
            set or the checkpoint; the number is not known, or contradicts the data.
    """
    names = {"checkpoint": tuple(classes)} if classes else {}
    for role, images in (("training images", train_set), ("held-out images", val_set)):
        if images is not None:
            names[role] = _checked_class_names(role, images)
    named = {role: known for role, known in names.items() if known is not None}
    reference = next(iter(named), None)
    for role, known in named.items():
        if known != named[reference]:
            raise _differing_classes(role, known, reference, named[reference])

    # Held-out images alone do not tell what else a stream without names has.
    trained_on_is_known = reference is not None and reference == next(iter(names))
    if num_classes is None:
        if not trained_on_is_known:
            raise InputError(
                f"the {next(iter(names), 'data')} do not tell the number of classes: "
                "give --num_classes"
            )
        return len(named[reference])
    if reference is None:
        return num_classes
    found = len(named[reference])
    if num_classes < found or (num_classes > found and not classes):
        raise InputError(
            f"a head of {num_classes} classes does not fit the {found} of the {reference} "
            f"({_first_few(named[reference])}): correct --num_classes, or the path of the images"
        )
    return num_classes


def _checked_class_names(
    role: str, images: IndexedImages | StreamedImages
) -> tuple[str, ...] | None:
    if not getattr(images, "labelled", True):  # what a stream has shows only as it is read
        raise InputError(
            f"the {role} have no labels: sort them into one folder per class, or call the column "
            "of labels 'label' if it is a data set of Hugging Face's"
        )
    names = class_names(images.reader)
    if names is not None and "" in names:
        raise InputError(
            f"some of the {role} lie beside the class folders: move each image into the folder "
            "of its class"
        )
    if names is not None and len(names) < 2:
        raise InputError(
            f"the {role} have one class only ({names[0]}): name a path that holds one folder per "
            "class"
        )
    if isinstance(images.reader, CLASS_FOLDERS):
        _check_folder_names(role, images)
    return names


def _check_folder_names(role: str, images: IndexedImages) -> None:
    """Refuse two folders of one name: timm would make them one class without a word."""
    folders = {images.name(index).rpartition(os.sep)[0] for index in range(len(images))}
    counts = Counter(folder.rpartition(os.sep)[2] for folder in folders)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{count} folders of the {role} are called {name}, and a class is told by the name of "
            "its folder alone: give each class a name of its own"
        )


def _differing_classes(
    role: str, names: tuple[str, ...], reference: str, expected: tuple[str, ...]
) -> InputError:
    missing = [name for name in expected if name not in set(names)]
    extra = [name for name in names if name not in set(expected)]
    faults = [f"{len(missing)} are missing ({_first_few(missing)})"] if missing else []
    faults += [f"{len(extra)} are new ({_first_few(extra)})"] if extra else []
    fault = " and ".join(faults) or "the same ones are in another order"
    return InputError(
        f"the classes of the {role} are not those of the {reference}, so that labels would not "
        f"mean the same: {fault}; give both the same, in the same order"
    )


def _first_few(names: Collection[str]) -> str:
    listed = ", ".join(itertools.islice(names, MAX_LISTED))
    return f"{listed}, ..." if len(names) > MAX_LISTED else listed


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels (B,), still on the host, that are none of the classes.

    Raises:
        InputError: with the first of them.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
    if wrong:
        raise InputError(
            f"an image has the label {wrong[0]}, which is none of {num_classes} classes counted "
            "from 0: correct --num_classes, or the labels of the data"
        )
