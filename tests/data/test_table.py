"""Tables of images: which rows are read, where their files are, and what their labels mean."""

import json
import random

import pytest
import torch

from tests.helpers.data import (
    RANDOM,
    STILL,
    all_labels,
    all_values,
    encoded,
    eval_loader,
    write_grays,
)
from util.data.classes import check_classes
from util.data.datasets import open_train_val, open_val
from util.data.report import describe, lines_of
from util.data.table import COLUMNS
from util.errors import InputError
from util.settings.data import DataSettings


def write_table(path, *lines, encoding="utf-8", end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode(encoding))
    return path


def write_json_lines(path, *rows):
    return write_table(path, *(json.dumps(row) for row in rows))


def opened(table, task="classification", **settings):
    """Training and validation images of a table."""
    data = DataSettings(data_csv=str(table), **{n: v and str(v) for n, v in settings.items()})
    return open_train_val(data, STILL, STILL, seed=0, task=task)


def train(table, task="classification", **settings):
    return opened(table, task, **settings)[0]


def refusal(*args, **settings):
    with pytest.raises(InputError) as error:
        opened(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    write_grays(tmp_path, range(1, 10))
    return tmp_path


def rows_of(*labels, first=1):
    return [f"{number:03d}.png,{label}" for number, label in enumerate(labels, start=first)]


# Files


@pytest.mark.parametrize(
    ("name", "delimiter", "options"),
    [
        ("a.csv", ",", {}),
        ("a.csv", ";", {}),
        ("a.csv", "\t", {}),
        ("a.TSV", "\t", {}),
        ("a.txt", ",", {"encoding": "utf-8-sig"}),
        ("a.csv", ",", {"end": "\r\n"}),
        ("a.csv", ",", {"end": "\n\n"}),
    ],
)
def test_a_table_is_read_however_it_is_written(folder, name, delimiter, options):
    lines = ["Path,Label", "003.png,Ärmel", '"001.png" , "b"'.replace(" ", ""), "002.png,b"]
    lines = [line.replace(",", delimiter) for line in lines]
    images = train(write_table(folder / name, *lines, **options))
    assert all_values(images) == [3, 1, 2]
    assert images.classes == ("b", "Ärmel")
    assert all_labels(images) == [1, 0, 0]


def test_json_lines_are_read(folder):
    rows = {"file_name": "002.png", "label": 1}, {"file_name": "001.png", "label": 0}
    images = train(write_json_lines(folder / "a.jsonl", *rows))
    assert (all_values(images), all_labels(images)) == ([2, 1], [1, 0])


def test_a_label_may_hold_the_delimiter_in_quotes(folder):
    lines = ["path,label", '001.png,"crane, bird"', '002.png,"crane, ""machine"""']
    assert train(write_table(folder / "a.csv", *lines)).classes == (
        'crane, "machine"',
        "crane, bird",
    )


def test_paths_start_from_the_table_the_folder_given_or_the_root(folder):
    write_grays(folder / "images" / "b", [50])
    lines = ["path,label", "b/050.png,x", f"{folder}/001.png,y"]
    for table, place in (
        (folder / "images" / "a.csv", None),
        (folder / "elsewhere" / "a.csv", folder / "images"),
    ):
        images = train(write_table(table, *lines), data_path=place)
        assert all_values(images) == [50, 1]
        assert images.name(0) == str(folder / "images" / "b" / "050.png")


def test_a_name_without_suffix_stands_for_the_image_that_has_it(folder):
    (folder / "v1.2").mkdir()
    (folder / "v1.2" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(40, "JPEG"))
    (folder / "plain").write_bytes(encoded(60))
    lines = ["ImageId", "002", "v1.2/ILSVRC2012_val_00000001", "plain"]
    assert all_values(train(write_table(folder / "a.csv", *lines))) == [2, 40, 60]
    (folder / "002.jpg").write_bytes(b"")
    assert "002 may be 002.jpg or 002.png: write the suffix" in refusal(folder / "a.csv")


def test_missing_files_are_refused_if_all_are_missing_and_else_said_and_broken(folder):
    table = write_table(folder / "a.csv", "path,label", "001.png,a", "gone.png,b", "003.png,c")
    images = train(table)
    assert images.notes == [f"1 of 3 files looked for is missing, such as {folder}/gone.png"]
    ((name, reason),) = [entry for batch in eval_loader(images) for entry in batch.broken]
    assert (name, "No such file" in reason) == (f"{folder}/gone.png", True)
    (folder / "empty").mkdir()
    message = f"such as {folder}/empty/001.png: give the folder that their paths start from by"
    assert f"{message} --data_path" in refusal(table, data_path=folder / "empty")
    assert "nowhere is not a folder: give" in refusal(table, data_path=folder / "nowhere")


# Columns


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("path,label,split,group", "path label split group"),
        ("image_id,label", "image_id label"),
        ("ImageId,PredictionString", "ImageId PredictionString"),
        ("Image Index,Finding Labels,Follow-up #,Patient ID", "Image_Index Finding_Labels"),
        ("file-name,CLASS,Set,patient_id,age", "file-name CLASS Set patient_id"),
        ("id,name,file,category,subset", "file category subset"),
        ("path,image,label,target", "path label"),
    ],
)
def test_columns_are_found_by_their_usual_names(folder, header, names):
    values = {"path": "001.png", "split": "train"}
    chosen = [name.replace("_", " ") if " " in header else name for name in names.split()]
    columns = header.split(",")
    roles = dict(zip(chosen, ("path", "label", "split", "group"), strict=False))
    cells = [values.get(roles.get(name), f"x{n}") for n, name in enumerate(columns)]
    images = train(write_table(folder / "a.csv", header, ",".join(cells)))
    assert all_values(images) == [1]
    assert images.classes == (cells[columns.index(chosen[1])],)


@pytest.mark.parametrize("role", ["path", "label"])
def test_a_column_that_may_be_either_of_two_is_refused(folder, role):
    first, second = COLUMNS[role][1][:2]
    rest = "label" if role == "path" else "path"
    message = refusal(write_table(folder / "a.csv", f"{first},{second},{rest}", "1,2,3"))
    assert f"has 2 columns that may be the {role} ({first}, {second}): rename the one" in message


def test_a_table_without_paths_or_header_names_what_it_has(folder):
    table = write_table(folder / "a.csv", "001.png,cat", "002.png,dog")
    assert "has no column of paths, only 001.png, cat: name the columns in" in refusal(table)


def test_without_labels_a_table_serves_for_pretraining_only(folder):
    table = write_table(folder / "a.csv", "path,age", "001.png,3", "002.png,5")
    images = train(table)
    assert (all_values(images), all_labels(images), images.classes) == ([1, 2], [None, None], None)
    message = f"have no labels: {table} has no column of labels, only path, age: name it 'label'"
    with pytest.raises(InputError, match=message):
        check_classes(images, None, None)
    assert "has no column of labels" in refusal(table, task="regression")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["path,label", "001.png"], "line 2 of {} does not have 2 columns as the first line has"),
        (["path,label", "", "1,a,b"], "line 3 of {} does not have 2 columns"),
        (["path,label", '001.png,"a'], "{} ends within quotes that are never closed"),
        (["path,label", ",a"], "line 2 of {} has no path: fill it in"),
        (["path,split", "001.png,"], "line 2 of {} has no split: fill it in, or rename the col"),
        (["path,split", "001.png,some"], "has the split 'some': write train, val or test"),
        (["path,patient", "001.png,"], "line 2 of {} has no patient: fill it in"),
        (["path,label"], "{} has no rows: list the images in it"),
        ([], "{} is empty"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(folder, lines, reason):
    table = write_table(folder / "a.csv", *lines)
    assert reason.format(table) in refusal(table)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{]"], "line 1 of {} is not JSON"),
        (["[1]"], "line 1 of {} is not an object"),
        (['{"path": "001.png"}', '{"label": 1}'], "line 2 of {} has no path"),
        (['{"path": "001.png", "label": {}}'], "line 1 of {} has a label that is neither text"),
        (['{"path": "001.png", "label": [[1]]}'], "line 1 of {} has a label that is neither text"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(folder, lines, reason):
    table = write_table(folder / "a.jsonl", *lines)
    assert reason.replace("{}", str(table), 1) in refusal(table)


def test_other_files_are_no_tables(folder):
    assert "a.xlsx is not a table: give a file that ends in" in refusal(folder / "a.xlsx")
    assert "a.csv does not exist: correct the path of the table" in refusal(folder / "a.csv")
    table = write_table(folder / "a.csv", "path,label", "001.png,ä", encoding="utf-16")
    assert f"{table} is not UTF-8: save it in that encoding" in refusal(table)
    with pytest.raises(InputError, match="give it by --data_csv"):
        open_train_val(DataSettings(data_path=str(table)), STILL, STILL, seed=0)


# Splits


def test_the_column_of_splits_decides_and_test_rows_are_not_read(folder):
    splits = ("Train", "val", "test", "training", "Validation", "TEST", "train2017")
    rows = [f"{row},{split}" for row, split in zip(rows_of(*"bababab"), splits, strict=True)]
    train_set, val_set = opened(write_table(folder / "a.csv", "path,label,split", *rows))
    assert (all_values(train_set), all_values(val_set)) == ([1, 4, 7], [2, 5])
    assert train_set.classes == val_set.classes == ("a", "b")
    assert train_set.notes == ["not read: 2 rows of test"]
    assert val_set.notes == []


def test_classes_are_those_of_all_rows_that_are_read(folder):
    lines = ["path,label,split", "001.png,b,train", "002.png,a,val", "003.png,c,test"]
    train_set, val_set = opened(write_table(folder / "a.csv", *lines))
    assert train_set.classes == val_set.classes == ("a", "b")
    assert (all_labels(train_set), all_labels(val_set)) == ([1], [0])
    # A class that is not trained can only be a mistake, or in the wrong split.
    with pytest.raises(InputError, match=r"1 class of .*a\.csv \(a\) has no training image"):
        check_classes(train_set, val_set, None)
    train_set, val_set = opened(write_table(folder / "b.csv", *lines, "000.png,a,train"))
    assert check_classes(train_set, val_set, None) == 2


@pytest.mark.parametrize("joined", ["a,b", "a, c"])
def test_labels_joined_by_commas_are_no_classes_of_their_own(folder, joined):
    lines = ["path,label", "001.png,a", "002.png,b", f'003.png,"{joined}"']
    images = train(
        write_table(folder / "a.csv", "path,label", *lines[1:3], "000.png,a|b"), "multilabel"
    )
    assert images.classes == ("a", "b")
    message = refusal(write_table(folder / "b.csv", *lines), "multilabel")
    assert "commas separate the labels of some images" in message
    assert "separated by |" in message
    lines = ["path,label", "001.png,a", '002.png,"mild, early"']  # a name with a comma
    assert train(write_table(folder / "c.csv", *lines), "multilabel").classes == (
        "a",
        "mild, early",
    )


def test_without_training_rows_a_table_is_refused(folder):
    table = write_table(folder / "a.csv", "path,split", "001.png,val", "002.png,test")
    assert "has no rows of the split train, only of validation (1) and test (1)" in refusal(table)


def test_without_a_column_of_splits_all_rows_are_for_training(folder):
    train_set, val_set = opened(write_table(folder / "a.csv", "path,label", *rows_of(*"aba")))
    assert (len(train_set), val_set) == (3, None)


def test_a_group_or_an_image_on_both_sides_is_refused_with_its_name(folder):
    lines = ["path,split,patient", "001.png,train,Ann", "002.png,val,Bob", "003.png,val,Ann"]
    table = write_table(folder / "a.csv", *lines)
    assert f"the group Ann is in both the training images of {table} and" in refusal(table)
    lines = ["path,split", "001.png,train", "002.png,val", "001.png,val"]
    table = write_table(folder / "a.csv", *lines)
    assert f"the image {folder}/001.png is in both" in refusal(table)
    first, second = (write_table(folder / name, "path", "001.png") for name in ("b.csv", "c.tsv"))
    assert "001.png is in both" in refusal(first, val_csv=second)


def test_a_repeated_row_is_said_and_one_with_another_label_refused(folder):
    lines = ["path,label", "001.png,a", "002.png,b", "./001.png,a"]
    images = train(write_table(folder / "a.csv", *lines))
    assert (len(images), images.notes) == (3, ["1 row repeats an image"])
    message = refusal(write_table(folder / "a.csv", *lines, "001.png,b"))
    assert "001.png twice with different labels: 'a' in line 2 and 'b' in line 5" in message


# Held-out fraction


@pytest.fixture
def many(tmp_path):
    write_grays(tmp_path, range(200))
    return tmp_path


def held_out(table, fraction, seed=0):
    data = DataSettings(data_csv=str(table), val_fraction=fraction)
    train_set, val_set = open_train_val(data, STILL, STILL, seed=seed)
    own, others = ({one.name(i) for i in range(len(one))} for one in (train_set, val_set))
    assert len(own) + len(others) == 200 and not own & others
    return others, train_set.notes


def test_the_same_images_are_held_out_whatever_the_order_seed_and_number(many):
    rows = rows_of(*["a", "b"] * 100, first=0)
    held, notes = held_out(write_table(many / "a.csv", "path,label", *rows), 0.2)
    assert 25 < len(held) < 55
    assert notes == [f"held out by --val_fraction 0.2: {len(held)} images"]
    random.Random(0).shuffle(rows)
    assert held_out(write_table(many / "b.csv", "path,label", *rows), 0.2, seed=1)[0] == held
    assert held_out(many / "b.csv", 0.3)[0] > held


def test_groups_are_held_out_as_a_whole(many):
    rows = [f"{number:03d}.png,{number % 25}" for number in range(200)]
    held, notes = held_out(write_table(many / "a.csv", "path,case", *rows), 0.2)
    groups = {int(name[-7:-4]) % 25 for name in held}
    assert len(held) == 8 * len(groups)
    assert notes == [
        f"held out by --val_fraction 0.2: {len(groups)} of 25 groups, {len(held)} images"
    ]


def test_a_fraction_that_cannot_be_held_out_is_refused(folder):
    table = write_table(folder / "a.csv", "path,case", "001.png,a", "002.png,a")
    for fraction, which in ((0.01, "none"), (0.99, "all")):
        message = f"--val_fraction {fraction} holds out {which} of the 1 group of {table}"
        with pytest.raises(InputError, match=message):
            held_out(table, fraction)
    table = write_table(folder / "a.csv", "path,split", "001.png,train", "002.png,val")
    with pytest.raises(InputError, match="has splits in the column 'split': leave out"):
        held_out(table, 0.5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"data_csv": "a.csv", "dataset": "folder"}, "leave out --dataset"),
        ({"data_csv": "a.csv", "num_samples": 3}, "leave out --num_samples"),
        ({"data_csv": "a.csv", "class_folder": "last"}, "leave out --class_folder"),
        ({"data_csv": "a.csv", "val_fraction": 0.1, "val_csv": "b.csv"}, "--val_csv gives the val"),
        ({"data_csv": "a.csv", "val_fraction": 0.1, "val_path": "b"}, "--val_path gives the val"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        DataSettings(**settings)


# Validation images of another table


def test_a_second_table_has_the_classes_of_the_first(folder):
    first = write_table(folder / "a.csv", "path,label", *rows_of(*"abc"))
    second = write_table(folder / "b.csv", "path,label", *rows_of(*"cb", first=4))
    train_set, val_set = opened(first, val_csv=second)
    assert (val_set.classes, all_labels(val_set)) == (("a", "b", "c"), [2, 1])
    assert check_classes(train_set, val_set, None) == 3
    write_table(second, "path,label", *rows_of(*"cde", first=4))
    train_set, val_set = opened(first, val_csv=second)
    assert all_labels(val_set) == [None] * 3
    with pytest.raises(InputError, match="2 classes are not among those of the training images"):
        check_classes(train_set, val_set, None)


def test_imagenets_list_of_validation_images_fits_the_folders_of_training(tmp_path):
    for value, wnid in enumerate(("n01", "n02", "n03")):
        write_grays(tmp_path / "CLS-LOC" / "train" / wnid, [value])
    write_grays(tmp_path / "CLS-LOC" / "val", [7, 8])
    lines = ["ImageId,PredictionString", "008,n03 85 1 499 272 n03 1 2 3 4 ", "007,n01 1 2 3 4 "]
    table = write_table(tmp_path / "LOC_val_solution.csv", *lines)
    paths = {"val_csv": str(table), "val_path": str(tmp_path / "CLS-LOC" / "val")}
    data = DataSettings(data_path=str(tmp_path / "CLS-LOC" / "train"), **paths)
    train_set, val_set = open_train_val(data, RANDOM, STILL, seed=0)
    assert (all_values(val_set), all_labels(val_set)) == ([8, 7], [2, 0])
    assert check_classes(train_set, val_set, None) == 3
    # Without training images, the classes are those of the table.
    assert open_val(DataSettings(**paths), STILL, seed=0).classes == ("n01", "n03")


def test_numbers_mean_classes_by_their_names_before_indices(folder):
    for name in ("1", "2", "10"):
        write_grays(folder / "train" / name, [0])
    for labels, expected, classes in (
        (("10", "2"), [2, 1], ("1", "2", "10")),
        (("0", "2"), [0, 2], None),
    ):
        table = write_table(folder / "a.csv", "path,label", *rows_of(*labels))
        data = DataSettings(data_path=str(folder / "train"), val_csv=str(table))
        _, val_set = open_train_val(data, STILL, STILL, seed=0)
        assert (all_labels(val_set), val_set.classes) == (expected, classes)


def test_rows_of_the_table_that_another_replaces_are_not_read(folder):
    lines = ["path,label,split", "001.png,a,train", "002.png,b,train", "003.png,c,val"]
    first = write_table(folder / "a.csv", *lines)
    second = write_table(folder / "b.csv", "path,label", "004.png,b")
    train_set, val_set = opened(first, val_csv=second)
    assert train_set.classes == val_set.classes == ("a", "b")
    assert train_set.notes == ["not read: 1 row of validation"]


def test_a_second_table_with_splits_gives_its_validation_rows_or_its_only_split(folder):
    first = write_table(folder / "a.csv", "path", "009.png")
    lines = ["path,split", "001.png,test", "002.png,val", "003.png,train"]
    second = write_table(folder / "b.csv", *lines)
    _, val_set = opened(first, val_csv=second)
    assert all_values(val_set) == [2]
    assert val_set.notes == ["not read: 1 row of test, 1 row of train"]
    write_table(second, *lines[:2])
    assert all_values(opened(first, val_csv=second)[1]) == [1]
    write_table(second, lines[0], lines[1], lines[3])
    assert "has no rows of the split validation, only of test (1) and train (1)" in refusal(
        first, val_csv=second
    )


def test_a_table_may_have_validation_images_in_class_folders(folder):
    write_grays(folder / "new" / "b", [50])
    write_grays(folder / "new" / "a", [51])
    table = write_table(folder / "a.csv", "path,label", *rows_of(*"ab"))
    train_set, val_set = opened(table, val_path=folder / "new")
    assert all_values(val_set) == [51, 50]
    assert check_classes(train_set, val_set, None) == 2


def test_validation_images_alone_are_not_for_training():
    with pytest.raises(InputError, match="--val_csv gives only the validation images: give"):
        open_train_val(DataSettings(val_csv="a.csv"), STILL, STILL, seed=0)


# Labels


def test_numbers_are_indices_and_name_the_classes(folder):
    images = train(write_table(folder / "a.csv", "path,label", *rows_of(3, 1, "0.0", 3)))
    assert (all_labels(images), images.classes) == ([3, 1, 0, 3], ("0", "1", "2", "3"))
    assert check_classes(images, None, None) == 4


def test_numbers_alone_are_the_outputs_of_a_head(folder):
    table = write_table(folder / "a.csv", "path,label", *rows_of(812, 3))
    val_set = open_val(DataSettings(val_csv=str(table)), STILL, seed=0)
    assert (all_labels(val_set), val_set.classes) == ([812, 3], None)
    assert check_classes(None, val_set, 1000) == 1000


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a", "", "b"], "1 of 3 is missing (empty, -1 or null): give each image one class"),
        (["0.5", "2", "1"], "0.5 cannot be the index of a class: give each image one class, or"),
        (["0.5", "2", "-1"], "learn numbers with --task regression"),
        (["a|b", "a"], "some images have several (a|b): learn them with --task multilabel"),
        (["a;b", "a"], "some images have several (a;b): learn them with --task multilabel"),
        (['"1, 2"', "1"], "some images have several (1, 2): learn them with --task multilabel"),
        (["1001", "1007"], "are 2 numbers up to 1007, which are no indices: count the classes"),
    ],
)
def test_labels_that_are_no_classes_are_not_learned_and_the_advice_fits(folder, labels, reason):
    table = write_table(folder / "a.csv", "path,label", *rows_of(*labels))
    images = train(table)
    assert all_labels(images) == [None] * len(labels)
    with pytest.raises(InputError) as error:
        check_classes(images, None, None)
    assert f"have no labels: in the column 'label' of {table}, " in str(error.value)
    assert reason in str(error.value)


# Several labels an image


@pytest.mark.parametrize("separator", ["|", ";", " | "])
def test_several_labels_are_a_vector_of_0_and_1(folder, separator):
    lines = ["path,label", *rows_of(separator.join("cb"), "a", "", "b")]
    images = train(write_table(folder / "a.csv", *lines), "multilabel")
    assert (images.task, images.classes) == ("multilabel", ("a", "b", "c"))
    (batch,) = eval_loader(images)
    _, labels = batch.to(torch.device("cpu"))
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert images.class_sizes() == {0: 1, 1: 2, 2: 1}


def test_json_lines_have_lists_of_labels(folder):
    labels = [["b", "a"], [], ["a", "a"], "b"]
    rows = [{"path": f"{n:03d}.png", "labels": own} for n, own in enumerate(labels, start=1)]
    images = train(write_json_lines(folder / "a.jsonl", *rows), "multilabel")
    assert images.reader.labels == [[0, 1], [], [0], [1]]
    message = refusal(
        write_json_lines(folder / "a.jsonl", *rows, {"path": "005.png"}), "multilabel"
    )
    assert "1 of 5 is missing (null): give each image its classes, separated by |" in message


def test_several_indices_name_the_classes(folder):
    table = write_table(folder / "a.csv", "path,label", *rows_of("3|0", "1"))
    images = train(table, "multilabel")
    assert (images.reader.labels, images.classes) == ([[0, 3], [1]], ("0", "1", "2", "3"))


def test_several_labels_of_validation_images_are_among_those_of_training(folder):
    lines = ["path,label,split", "001.png,b|c,train", "002.png,a|b,val"]
    train_set, val_set = opened(write_table(folder / "a.csv", *lines), "multilabel")
    assert train_set.classes == val_set.classes == ("a", "b", "c")
    assert (train_set.reader.labels, val_set.reader.labels) == ([[1, 2]], [[0, 1]])
    first = write_table(folder / "b.csv", "path,label", "001.png,b|c")
    second = write_table(folder / "c.csv", "path,label", "002.png,c", "003.png,")
    _, val_set = opened(first, "multilabel", val_csv=second)
    assert val_set.reader.labels == [[1], []]
    assert next(iter(eval_loader(val_set))).labels.tolist() == [[0, 1], [0, 0]]
    write_table(second, "path,label", "002.png,c|a")
    assert "1 class is not among those of the training images (a): correct" in refusal(
        first, "multilabel", val_csv=second
    )


def test_images_of_which_none_has_a_label_are_refused(folder):
    table = write_table(folder / "a.csv", "path,label", *rows_of("", ""))
    assert f"in the column 'label' of {table}, no image has any: give" in refusal(
        table, "multilabel"
    )


# Numbers


def test_numbers_are_labels_of_a_regression(folder):
    lines = ["path,split,target", "001.png,train,-1", "002.png,train,2.5e1", "003.png,val,7"]
    train_set, val_set = opened(write_table(folder / "a.csv", *lines), "regression")
    (batch,) = eval_loader(train_set)
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [-1, 25]
    assert next(iter(eval_loader(val_set))).labels.tolist() == [7]
    assert train_set.classes is train_set.class_sizes() is None
    assert train_set.notes == ["labels from -1 to 25, 12 on average"]


@pytest.mark.parametrize("label", ["", "old", "nan", "inf", "3,5", "1e999", "0x10"])
def test_a_label_that_is_no_finite_number_is_named_with_its_line(folder, label):
    table = write_table(folder / "a.tsv", "path\tlabel", "001.png\t1", f"002.png\t{label}")
    message = f"line 3 of {table} has the label {label!r}, but --task regression learns finite"
    assert message in refusal(table, "regression")


@pytest.mark.parametrize("label", [None, True, [1], float("nan")])
def test_a_json_label_that_is_no_number_is_refused(folder, label):
    table = write_json_lines(folder / "a.jsonl", {"path": "001.png", "label": label})
    assert "but --task regression learns finite numbers" in refusal(table, "regression")


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_sources_have_only_classes(folder, task):
    write_grays(folder / "classes" / "a", [1])
    write_grays(folder / "classes" / "b", [1])
    message = f"--task {task} takes labels from a table: give it by --data_csv"
    with pytest.raises(InputError, match=message):
        data = DataSettings(data_path=str(folder / "classes"))
        open_train_val(data, STILL, STILL, seed=0, task=task)
    with pytest.raises(InputError, match=message):
        open_val(DataSettings(val_path=str(folder / "classes")), STILL, seed=0, task=task)
    table = write_table(folder / "a.csv", "path,label", *rows_of(1, 0))
    assert "give it by --val_csv" in refusal(table, task, val_path=folder / "classes")


# What a run is, and what is said


def test_a_run_is_of_these_names_and_labels_and_of_no_folder(folder):
    lines = ["path,label", *rows_of(*"abab")]
    write_grays(folder / "copy", range(1, 10))
    first, moved = (
        train(write_table(place / "a.csv", *lines)).identity()
        for place in (folder, folder / "copy")
    )
    assert first == moved
    others = [["path,label", *rows_of(*"abba")], [lines[0], *lines[:0:-1]], lines[:-1]]
    for changed in others:
        assert train(write_table(folder / "a.csv", *changed)).identity() != first


def test_the_block_tells_the_table_its_classes_and_what_is_not_read(folder):
    rows = [f"{row},train" for row in rows_of(*"aaaaab")]
    rows += ["007.png,a,val", "008.png,b,val", "009.png,,test"]
    table = write_table(folder / "a.csv", "path,label,split", *rows)
    train_set, val_set = opened(table)
    assert lines_of("training", describe(train_set)) == [
        f"6 training images from {table}",
        "  classes: 2, from a to b; smallest b (1), largest a (5)",
        "  the commonest class, a, has 83% of the images",
        "  not read: 1 row of test",
    ]
    assert lines_of("validation", describe(val_set)) == [
        f"2 validation images from {table}",
        "  classes: 2, from a to b, 1 image each",
    ]
