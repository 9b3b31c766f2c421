"""The command line: kinds of values, the parser, and every option of every program."""

import argparse
import math
import re
from pathlib import Path

import pytest

import main_knn
import main_pretrain
from tests.helpers.runs import MAINS
from util.arguments import (
    MAX_COUNT,
    MAX_WORKERS,
    Parser,
    check_arguments,
    finite_float,
    fraction,
    given_options,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    process_count,
    ratio,
    seed_number,
    take,
)
from util.settings.compute import ComputeSettings

every_main = pytest.mark.parametrize("main", MAINS.values(), ids=MAINS.keys())

# A kind of value -> what it takes, and what it refuses with which words.
KINDS = {
    ratio: (
        {"0.75": 0.75, "1e-9": 1e-9},
        dict.fromkeys(["0", "1", "1.5", "-0.1", "nan", "inf"], "strictly between 0 and 1, not "),
    ),
    fraction: (
        {"0": 0.0, "1": 1.0, "0.5": 0.5},
        dict.fromkeys(["-0.1", "1.1", "nan", "inf"], "must be between 0 and 1, not "),
    ),
    positive_int: (
        {"1": 1, str(MAX_COUNT): MAX_COUNT},
        {
            "0": "must be at least 1, not ",
            "-1": "must be at least 1, not ",
            str(MAX_COUNT + 1): f"must be at most {MAX_COUNT}, not ",
        },
    ),
    natural_int: (
        {"0": 0, "7": 7},
        {
            "-1": "must be at least 0, not ",
            str(MAX_COUNT + 1): f"must be at most {MAX_COUNT}, not ",
        },
    ),
    process_count: (
        {"0": 0, str(MAX_WORKERS): MAX_WORKERS},
        {"-1": "must be at least 0, not ", "1001": f"must be at most {MAX_WORKERS}, not "},
    ),
    seed_number: (
        {"0": 0, str(2**63 - 1): 2**63 - 1},
        {"-1": "must be at least 0, not ", str(2**63): "must be at most "},
    ),
    finite_float: (
        {"-1.5": -1.5, "0": 0.0, "1e300": 1e300},
        dict.fromkeys(["nan", "inf", "-inf"], "must be finite, not "),
    ),
    natural_float: (
        {"0": 0.0, "2.5": 2.5},
        {"-1": "must be at least 0, not ", "nan": "must be finite, not "},
    ),
    positive_float: (
        {"1e-30": 1e-30},
        {
            "0": "must be above 0, not ",
            "-1": "must be above 0, not ",
            "nan": "must be finite, not ",
            "inf": "must be finite, not ",
        },
    ),
}
TAKEN = [(kind, text, value) for kind, (taken, _) in KINDS.items() for text, value in taken.items()]
REFUSED = [(kind, text, words) for kind, (_, bad) in KINDS.items() for text, words in bad.items()]


def sentence_of(capsys, parse, *argv):
    """The one line with which a parser ends a program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def named(value):
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize(("kind", "text", "value"), TAKEN, ids=named)
def test_a_kind_of_value_takes_its_range(kind, text, value):
    assert kind(text) == value
    assert type(kind(text)) is type(value)


@pytest.mark.parametrize(("kind", "text", "words"), REFUSED, ids=named)
def test_a_value_out_of_range_is_refused_with_the_range(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert words in str(caught.value)
    assert not words.endswith("not ") or str(caught.value).endswith(words + text)


@pytest.mark.parametrize("kind", KINDS, ids=named)
def test_what_is_not_a_number_is_refused(kind):
    for text in ("lots", "", "1,5"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"must be a (whole )?number, not {text}"
        ):
            kind(text)


def parser_of(main, monkeypatch):
    """The parser that a main makes."""
    made = []
    parse_args = Parser.parse_args

    def keep(parser, argv):
        made.append(parser)
        return parse_args(parser, argv)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", keep)
        main.parse_args(["--finetune", "x"] if main is main_knn else [])
    return made[0]


@every_main
def test_every_option_with_a_range_refuses_what_lies_outside(main, monkeypatch, capsys):
    parser = parser_of(main, monkeypatch)
    ranged = [action for action in parser._actions if action.type in KINDS]
    assert len(ranged) >= 5  # of knn
    for action in ranged:
        flag = action.option_strings[0]
        count = action.nargs if isinstance(action.nargs, int) else 1
        for text, words in KINDS[action.type][1].items():
            # A negative number needs the = sign where an option could have that name.
            argv = [f"{flag}={text}"] if count == 1 else [flag, *[text] * count]
            sentence = sentence_of(capsys, parser.parse_args, *argv)
            assert flag in sentence
            assert words in sentence or count > 1


@every_main
def test_no_default_is_out_of_its_own_range(main, monkeypatch):
    for action in parser_of(main, monkeypatch)._actions:
        values = action.default if isinstance(action.default, list | tuple) else [action.default]
        if action.type in KINDS:
            for value in values:
                assert value is None or value == "auto" or action.type(str(value)) == value


@every_main
def test_abbreviations_are_refused(main, capsys):
    sentence = sentence_of(capsys, main.parse_args, "--data_pat", "x", "--finetune", "x")
    assert "--data_pat" in sentence


@every_main
def test_an_empty_word_is_refused(main, capsys):
    argv = ["--data_path", "", *(["--finetune", "x"] if main is main_knn else [])]
    assert "--data_path is empty" in sentence_of(capsys, main.parse_args, *argv)


@every_main
def test_help_shows_every_default(main, capsys):
    with pytest.raises(SystemExit) as caught:
        main.parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "%(" not in text
    assert "vit_large_patch16" in text or main is main_knn


def test_a_message_with_a_line_break_is_printed_in_one_line(capsys):
    assert sentence_of(capsys, Parser(prog="p").parse_args, "a\nb").endswith(r" a\nb")


@every_main
def test_paths_below_home_are_expanded_in_every_flag(main, monkeypatch):
    # A shell leaves --flag=~/path as it is, and nobody wants a folder of the name "~".
    monkeypatch.setenv("HOME", "/home/me")
    parser = parser_of(main, monkeypatch)
    takes_text = [a for a in parser._actions if a.type in (None, Path) and a.nargs != 0]
    flags = [a.option_strings[0] for a in takes_text if not a.choices]
    assert {"--data_path", "--output_dir", "--resume"} & set(flags)
    for flag in flags:
        args = parser.parse_args([*(["--finetune=x"] if main is main_knn else []), f"{flag}=~/x"])
        assert "/home/me/x" in map(str, vars(args).values())


def test_only_whole_paths_below_home_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("--files", nargs="+")
    parser.add_argument("--file", type=Path)
    given = ["~", "~/a", "b/~", "~other", "local-dir:~/c"]
    args = parser.parse_args(["--files", *given, "--file", "~/d"])
    assert args.files == ["/home/me", "/home/me/a", *given[2:]]
    assert args.file == Path("/home/me/d")


def test_the_options_that_were_given_are_those_that_differ_from_the_defaults():
    parser = Parser()
    parser.add_argument("--a", type=int, default=1)
    parser.add_argument("--b", type=float, default=math.pi)
    defaults = parser.parse_args([])
    assert given_options(parser.parse_args(["--a", "2"]), defaults) == {"--a"}
    assert given_options(parser.parse_args(["--a", "1"]), defaults) == set()


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("--mask_ration", "did you mean --mask_ratio?"),
        ("--batchsize=4", "did you mean --batch_size?"),
        ("--no_norm_pix_loss", "did you mean --no-norm_pix_loss?"),
        ("--xyzzy", "--help lists all flags"),
    ],
)
def test_a_misspelt_flag_gets_the_one_that_is_most_like_it(given, advice, capsys):
    with pytest.raises(SystemExit) as end:
        main_pretrain.parse_args([given, "0.5"])

    assert end.value.code == 2
    name = given.partition("=")[0]
    assert capsys.readouterr().err == f"main_pretrain.py: error: unknown flag {name}: {advice}\n"


def test_a_misspelt_flag_comes_before_a_missing_one(capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--output", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--ouput", "F"])

    assert "did you mean --output?" in capsys.readouterr().err


def test_negative_numbers_are_no_flags():
    parser = Parser(prog="x.py")
    parser.add_argument("--mean", type=float, nargs=2)

    assert parser.parse_args(["--mean", "-0.5", "-1"]).mean == [-0.5, -1.0]


@every_main
def test_help_begins_with_what_a_newcomer_needs(main, capsys):
    with pytest.raises(SystemExit):
        main.parse_args(["--help"])

    first = capsys.readouterr().out.split("flags to begin with:")[1].split("\n\n")[0]
    assert set(re.findall(r"^  (--\w+)", first, re.MULTILINE)) == set(main.FIRST_FLAGS)


@pytest.mark.parametrize(("rank", "printed"), [(None, True), ("0", True), ("1", False)])
def test_of_several_processes_only_the_first_prints_a_mistake(rank, printed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", "--fsdp", "--compile"])
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        check_arguments(lambda: take(ComputeSettings, main_pretrain.parse_args()))

    assert end.value.code == 2
    sentence = "main_pretrain.py: error: --compile cannot be combined with --fsdp"
    assert capsys.readouterr().err.startswith(sentence) == printed
