"""Flags that reach a batch script: sbatch gets exactly their values, or they are refused."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from scripts import launch
from tests.helpers.runs import refusal

pytestmark = [pytest.mark.faults]

SURROGATE = "\udcff"  # a byte of a path that is not UTF-8
BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\u202e"]
BREAKS += ["\t", "\x01", SURROGATE]
# Each would be further options, of the same line or the next, to a parser like sbatch's.
ESCAPES = ["a\n#SBATCH --nice=77", "a\\'\"\n#SBATCH --nice=77 #", "a\\'\" --nice=77 #", "a\\b"]
KEPT = ["a b", " a", "it's", 'a"b', "a#b", "$HOME", "`id`", "$(id)", "a;b", "a&b|c", "*?", "~", "ü"]
KEPT += ["a=b", "-x", "--nice=77", "a --nice=77", "a' --nice=77 '", 'a" --nice=77 "', "#SBATCH"]
VALUES = ["--partition", "--time", "--account", "--qos", "--constraint", "--mem", "--cpus_per_task"]
VALUES += ["--slurm_comment", "--slurm_mail-user"]


def name_of(text):
    """A name of a test's case."""
    return ascii(text)[1:-1]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """An empty folder to work in, and an sbatch that records that it was called."""
    programs, folder = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text(
            f"#!/bin/sh\n: > {programs}/{name}_called\necho Submitted batch job 7\n"
        )
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "start_here", None)  # starts a job on this machine
    return folder


def refused(capsys, cluster, *flags, output_dir="run", where="slurm"):
    """The sentence with which the launcher ends before it has written anything."""
    words = ["--main", "pretrain", "--cluster", where, *flags, "--", "--output_dir", output_dir]
    sentence = refusal(capsys, *words, main=launch.main)
    assert not list(cluster.iterdir())
    assert not (cluster.parent / "bin" / "sbatch_called").exists()
    return sentence


def batch_file(*flags, output_dir="run"):
    """The batch script that sbatch receives, and what the launcher prints."""
    words = ["--main", "pretrain", "--cluster", "slurm", *flags, "--", "--output_dir", output_dir]
    printed = StringIO()
    with redirect_stdout(printed):
        launch.main(words)
    folder = re.search("^folder of all logs: (.*)$", printed.getvalue(), re.M)[1]
    return Path(folder, "7_submission.sh").read_text(), printed.getvalue()


def options_of(script):
    """Read the options of a batch script as sbatch does: name -> value."""
    options = {}
    for line in script.split("\n")[1:]:
        if line.strip() and not line.startswith("#"):
            break  # the commands begin
        for word in words_of(line.removeprefix("#SBATCH")) if line.startswith("#SBATCH") else ():
            name, _, value = word.removeprefix("--").partition("=")
            options[name] = value
    return options


def words_of(line):
    """Split a line as sbatch does: a backslash precedes any character, also between quotes."""
    words, word, quote, position = [], None, "", 0
    while position < len(line):
        letter = line[position]
        if letter == "\\":
            position += 1
            word = (word or "") + line[position : position + 1]
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote, word = letter, word or ""
        elif not quote and letter == "#":
            break
        elif not quote and letter.isspace():
            words += [] if word is None else [word]
            word = None
        else:
            word = (word or "") + letter
        position += 1
    assert not quote, "sbatch: unmatched quote"
    return words if word is None else [*words, word]


@pytest.mark.parametrize("text", [f"a{c}b" for c in BREAKS] + ["a\n"] + ESCAPES, ids=name_of)
@pytest.mark.parametrize("flag", VALUES)
def test_a_value_that_sbatch_would_not_keep_is_refused(capsys, cluster, flag, text):
    assert flag in refused(capsys, cluster, f"{flag}={text}")


@pytest.mark.parametrize("text", BREAKS + ESCAPES, ids=name_of)
def test_a_name_of_an_option_cannot_be_more_than_a_name(capsys, cluster, text):
    assert "flag" in refused(capsys, cluster, f"--slurm_a{text}=b")
    assert "flag" in refused(capsys, cluster, f"--slurm_a{text}")


@pytest.mark.parametrize("flag", [*VALUES, "--job_dir"])
def test_an_empty_value_is_refused_instead_of_left_out(capsys, cluster, flag):
    assert f"{flag} is empty" in refused(capsys, cluster, f"{flag}=")


@pytest.mark.parametrize("where", ["slurm", "local"])
@pytest.mark.parametrize("text", BREAKS, ids=name_of)
def test_a_folder_for_logs_is_one_line(capsys, cluster, text, where):
    sentences = [
        refused(capsys, cluster, f"--job_dir=a{text}b", where=where),
        refused(capsys, cluster, output_dir=f"a{text}b", where=where),
    ]
    assert all("by --job_dir" in sentence for sentence in sentences)


@pytest.mark.parametrize("text", BREAKS[:-1], ids=name_of)
def test_a_working_folder_whose_name_is_several_lines_is_refused_for_logs(
    capsys, cluster, monkeypatch, text
):
    folder = cluster / f"a{text}b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "by --job_dir" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("where", "text"),
    [("slurm", t) for t in ("a\\b", "100%", "%t", "x%uy", "%%", "%%j", "%8j", "%J", "%A/%a")]
    + [("local", t) for t in ("%t", "a%tb/%j")],
)
def test_logs_cannot_go_elsewhere_than_printed(capsys, cluster, where, text):
    assert "by --job_dir" in refused(capsys, cluster, f"--job_dir={text}", where=where)
    assert "by --job_dir" in refused(capsys, cluster, output_dir=text, where=where)


@pytest.mark.parametrize("text", KEPT)
def test_sbatch_gets_exactly_the_value(cluster, text):
    script, _ = batch_file(*(f"{flag}={text}" for flag in VALUES))
    options = options_of(script)
    plain, _ = batch_file("--job_dir=plain")
    names = {flag.removeprefix("--slurm_").strip("-").replace("_", "-") for flag in VALUES}
    assert {options.pop(name) for name in names} == {text}
    assert set(options) == set(options_of(plain))  # none is new


@pytest.mark.parametrize("text", [*KEPT, "a %j b", "%j", "x%jy/z"])
@pytest.mark.parametrize("flag", ["--job_dir", "--output_dir"])
def test_logs_are_in_exactly_the_folder(cluster, flag, text):
    if flag == "--job_dir":
        folder = cluster / text
        script, printed = batch_file(f"--job_dir={text}")
    else:
        folder = cluster / text / "jobs"
        script, printed = batch_file(output_dir=str(cluster / text))
    log = f"{folder}/%j_0_log.out"
    assert options_of(script)["output"] == log
    assert f"log of task 0: {log.replace('%j', '7')}\n" in printed
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert launch.shlex.split(srun)[3] == f"{folder}/%j_%t_log.out"
    watch = re.search("^to watch it: (.*)$", printed, re.M)[1]
    assert launch.shlex.split(watch)[-1] == log.replace("%j", "7")
