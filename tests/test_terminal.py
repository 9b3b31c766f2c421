"""No end of standard output or error ends a program or changes its exit code."""

import os
import pty
import textwrap

import pytest

from tests.helpers.processes import command, finish, start

PROGRAM = """
    import sys, time
    from util.terminal import keep_streams

    keep_streams()
    with open(sys.argv[1], "w") as file:
        for number in range(20):
            print(number, "to standard output" * 5000, flush=True)
            sys.stderr.write("to standard error\\n")
        file.write("done")
"""


def words_for(path, program=PROGRAM):
    return [*command(), "-c", textwrap.dedent(program), str(path)]


@pytest.mark.parametrize(
    "ends",
    [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "| true", "2>&1 | head -c 1"],
)
def test_a_program_goes_on_without_a_reader(tmp_path, ends):
    path = tmp_path / "file"
    shell = ["bash", "-o", "pipefail", "-c", f'"$@" {ends}', "bash"]
    code, _, err = finish(start([*shell, *words_for(path)], PYTHONPATH="."))
    assert code == 0
    assert set(err.splitlines()) <= {"to standard error"}
    assert path.read_text() == "done"  # nothing printed went into the file instead


def test_a_progress_bar_outlives_its_terminal(tmp_path):
    program = """
        import sys
        from tqdm import tqdm
        from util.terminal import keep_streams

        keep_streams()
        bar = tqdm(total=1000, mininterval=0, disable=None)
        assert not bar.disable
        print("started", flush=True)
        sys.stdin.read()
        for _ in range(1000):
            bar.update()
        bar.close()
        open(sys.argv[1], "w").write("done")
    """
    path, (terminal, end) = tmp_path / "file", pty.openpty()
    process = start(words_for(path, program), stdin=-1, stderr=end, PYTHONPATH=".")
    os.close(end)
    assert process.stdout.readline() == "started\n"
    os.close(terminal)
    assert finish(process)[0] == 0
    assert path.read_text() == "done"
