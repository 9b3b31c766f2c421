"""Nothing of a test run outlives it: no process, no folder, no mount, no shared memory.

`begin` gives a run a temporary folder and starts this file as a watcher, a process of its own.
It waits for the end of the run, SIGKILL included, and then ends what the run has started and
removes its folder. What belongs to a run is found by the variable that its programs inherit.
It reads /proc; where there is none, as on macOS, only the folder is removed.
"""

import atexit
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from xml.sax.saxutils import escape

MARK = "CROSSMAE_TESTS"  # the variable; its value is the run's folder
SECONDS = 30  # after which the watcher gives up: a process in a system call cannot be ended
PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")


def begin() -> Path:
    """Begin a run of tests; return its temporary folder, which is removed when this process ends.

    Caches of libraries are in it as well, instead of in the home folder.
    """
    folder = Path(tempfile.mkdtemp(prefix="crossmae-tests.")).resolve()
    # A copy of this process that has not started a program has the variables that it was started
    # with, but this open folder, which no program inherits.
    os.open(folder, os.O_RDONLY)
    words = [sys.executable, "-I", "-S", __file__, str(folder), str(os.getpid())]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    watcher = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, **pipes)
    atexit.register(_end, watcher, folder, os.getpid())
    _use(folder)
    return folder


def _use(folder):
    tempfile.tempdir = str(folder)  # pytest has asked for the old one by now
    cache = folder / "cache"
    cache.mkdir()
    fonts = folder / "fonts.conf"  # without it, root's list of fonts is in /var/cache
    include = '<include ignore_missing="yes">/etc/fonts/fonts.conf</include>'
    fonts.write_text(
        f"<fontconfig><cachedir>{escape(str(cache))}</cachedir>{include}</fontconfig>\n"
    )
    os.environ |= {
        MARK: str(folder),
        "TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(cache),
        "HF_HOME": str(cache / "huggingface"),
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FONTCONFIG_FILE": str(fonts),
        "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime keeps a number of the machine in the home
    }


def _end(watcher, folder, owner):
    if os.getpid() == owner:  # not a copy of this process
        watcher.communicate(b"end")
        if watcher.returncode:
            print(f"the tests have left something in {folder} or a process", file=sys.stderr)


# The watcher


def watch(folder: Path, parent: int) -> int:
    """Wait for the end of a run, or its word that it is about to end; then clean up.

    Returns:
        the exit code: 1 if something is left.
    """
    # Those who stop the tests send these to every process; the watcher ends by itself.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    not_ours = set(SHARED_MEMORY.glob("*"))
    shared = set()
    seen = {}  # start times by number, which is given to another process later
    while os.getppid() == parent:
        # For those that give up both their variables and their parent.
        seen = {pid: began for pid, began in seen.items() if _start_time(pid) == began}
        new = _offspring([parent, *seen]) - {*seen, os.getpid()}
        seen |= {pid: began for pid in new if (began := _start_time(pid))}
        if unknown := set(SHARED_MEMORY.glob("*")) - not_ours - shared:
            shared |= unknown & _shared_memory_of([parent, *seen])
        if select.select([sys.stdin], [], [], 0.25)[0]:
            break
    shared |= _end_processes(folder, seen) - not_ours
    for path in shared:
        with suppress(OSError):
            path.unlink()
    for path in reversed(_mounts_below(folder)):
        subprocess.run(["umount", "-l", path], capture_output=True, check=False)
    if not _mounts_below(folder):  # whose content may lie elsewhere
        _remove(folder)
    return int(folder.exists() or bool(_processes_of(folder, seen)))


def _end_processes(folder, seen):
    """End the processes of a run; return the files of shared memory that they had."""
    end = time.monotonic() + SECONDS
    shared = set()
    while (found := _processes_of(folder, seen)) and time.monotonic() < end:
        shared |= _shared_memory_of(found)
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return shared


def _processes_of(folder, seen):
    """Numbers of the other processes that belong to a run and have not ended."""
    mark = re.compile(rb"(^|\0)%s=%s[/\0]" % (MARK.encode(), re.escape(os.fsencode(folder))))
    found = {pid for pid, began in seen.items() if _start_time(pid) == began}
    for path in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if mark.search((path / "environ").read_bytes() + b"\0") or _has_open(path, folder):
                found.add(int(path.name))
    # A child of theirs may have been started without the variable.
    found |= _offspring(found)
    return {pid for pid in found - {os.getpid(), os.getppid()} if _start_time(pid)}


def _has_open(process, folder):
    """Whether a process has a run's folder open or, without a terminal, writes a file in it.

    So do a copy of the tests' process, and daemons that drop all variables, as SLURM's; an editor
    in which somebody looks at the files has a terminal.
    """
    for fd in (process / "fd").iterdir():
        target = _target(fd)
        if target == str(folder):
            return True
        if target.startswith(f"{folder}/") and not int(_stat(process.name)[4]):
            flags = (process / "fdinfo" / fd.name).read_text().split()[3]
            if int(flags, 8) & (os.O_WRONLY | os.O_RDWR):
                return True
    return False


def _offspring(pids):
    """Numbers of the children of processes, and theirs."""
    found, new = set(), list(pids)
    while new:
        pid = new.pop()
        with suppress(OSError):  # it has ended
            for task in (PROC / str(pid) / "task").iterdir():
                children = set(map(int, (task / "children").read_text().split())) - found
                found |= children
                new += children
    return found


def _start_time(pid):
    """When a process began, in ticks since the machine did; None if it has ended."""
    with suppress(OSError):
        fields = _stat(pid)
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def _stat(pid):
    """Fields of /proc/PID/stat from the state on."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _target(link):
    with suppress(OSError):
        return str(link.readlink())
    return ""


def _shared_memory_of(pids):
    """Files in /dev/shm that processes have open or mapped."""
    names = []
    for pid in pids:
        with suppress(OSError):
            names += [_target(fd) for fd in (PROC / str(pid) / "fd").iterdir()]
        with suppress(OSError):
            lines = (PROC / str(pid) / "maps").read_text().splitlines()
            names += [line.split(maxsplit=5)[-1] for line in lines]
    paths = {Path(name) for name in names if name.startswith(f"{SHARED_MEMORY}/")}
    return {path for path in paths if path.is_file()}


def _mounts_below(folder):
    """Where file systems are mounted below a folder, in the order in which they were."""
    with suppress(OSError):
        fields = [line.split()[4] for line in (PROC / "self/mountinfo").read_text().splitlines()]
        paths = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), f) for f in fields]
        return [path for path in paths if path.startswith(f"{folder}/")]
    return []


def _remove(folder):
    """Remove a folder, also what tests have made unchangeable or unreadable."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        if shutil.which("chattr"):
            subprocess.run(["chattr", "-R", "-f", "-ia", folder], capture_output=True, check=False)
        for path, names, _ in os.walk(folder):
            for below in (Path(path, name) for name in names):
                if not below.is_symlink():  # to a folder elsewhere
                    below.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1]), int(sys.argv[2])))
