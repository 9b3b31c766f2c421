# Makes .venv and installs requirements into it, in the versions that requirements-pinned.txt pins,
# once for each content of the files.
# Sourced by the other scripts in the root of the repository, which call install_into_venv FILE.
fail() {
    echo "error: $*" >&2
    exit 1
}

install_into_venv() {
    local requirements=$1
    local python=.venv/bin/python
    local stamp=.venv/installed-${requirements%.txt}
    local wanted
    wanted=$(cat requirements*.txt)

    if [ ! -x "$python" ] || [ -e .venv/making ]; then
        local base=${PYTHON:-python3}
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "Python 3.10 or newer is needed: install it, or name one with PYTHON=/path/to/python3"
        echo "making .venv with $("$base" --version)"
        make_venv "$base" .venv ||
            fail "the venv module does not work: on Debian or Ubuntu, run apt-get install python3-venv"
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ ! -e .venv/installing ]; then
        echo "$requirements is installed in .venv"
    else
        echo "installing $requirements into .venv: a few minutes and gigabytes the first time"
        install_packages .venv -c requirements-pinned.txt -r "$requirements" ||
            fail "pip could not install $requirements: see above"
    fi
    # The check imports torchvision, which takes seconds, so it is repeated only after a change.
    local checked=.venv/checked-builds
    if [ ! -f "$checked" ] || [ "$(list_builds)" != "$(cat "$checked")" ]; then
        check_torchvision "$python"
        list_builds >"$checked"
    fi
    echo "$wanted" >"$stamp"
}

# Makes the environment FOLDER with the Python BASE, unless it is there. The file `making` is in it
# until it is complete: one that was stopped halfway is made again.
#     make_venv BASE FOLDER
make_venv() {
    local base=$1 folder=$2
    [ ! -e "$folder/making" ] || rm -rf "$folder/bin" "$folder"
    [ ! -x "$folder/bin/python" ] || return 0
    mkdir -p "$folder"
    touch "$folder/making"
    run_in "$folder" "$base" -m venv "$folder" || {
        rm -rf "$folder/bin" "$folder"
        return 1
    }
    rm "$folder/making"
}

# Installs into the environment FOLDER what pip's ARGUMENTS name. The file `installing` is in it until
# that has succeeded.
#     install_packages FOLDER ARGUMENTS
install_packages() {
    local folder=$1
    shift
    local python=$folder/bin/python
    [ ! -e "$folder/installing" ] || forget_incomplete_packages "$python"
    touch "$folder/installing"
    run_in "$folder" "$python" -m pip install --quiet --no-input --disable-pip-version-check "$@" ||
        return 1
    rm "$folder/installing"
}

# Runs a program whose temporary files, gigabytes for pip, are in the environment FOLDER, where those
# that it leaves when it is killed are removed the next time.
run_in() {
    local folder=$1 temporary code=0
    shift
    rm -rf "$folder/tmp"
    mkdir "$folder/tmp"
    temporary=$(cd "$folder/tmp" && pwd)
    TMPDIR=$temporary run_attached "$@" || code=$?
    rm -rf "$temporary"
    return $code
}

# Makes pip install again what it was stopped at: it writes INSTALLER after all files of a package,
# and moves the files of an old version to names with ~.
forget_incomplete_packages() {
    "$1" - <<'PYTHON'
import csv
import shutil
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
for path in site.glob("~*"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    complete = record.is_file() and (info / "INSTALLER").is_file()
    if complete:
        files = [row[0] for row in csv.reader(record.read_text().splitlines()) if row]
        complete = all((site / file).exists() for file in files if not file.endswith(".pyc"))
    if not complete:
        shutil.rmtree(info)
PYTHON
}

# Runs a program and its children, which end when a signal ends this script: bash alone would leave
# them running. They are a group of their own, which gets no Ctrl-C but from here.
run_attached() {
    local group="" stopped="" code=0
    # Set before the program starts: a signal just after that would leave it running, or be lost.
    trap 'stopped=129; end_attached' HUP
    trap 'stopped=130; end_attached' INT
    trap 'stopped=143; end_attached' TERM
    set -m
    "$@" &
    set +m
    group=$!
    [ -z "$stopped" ] || end_attached
    wait "$group" || code=$?
    trap - HUP INT TERM
    return $code
}

# Ends the program of run_attached, whose variables it reads, and this script with it; if the program
# is only about to start, run_attached calls this again.
end_attached() {
    [ -n "$group" ] || return 0
    kill -TERM -"$group" || true
    wait "$group" || true
    exit "$stopped"
}

# Lists the installed torch and torchvision, with the time when each was installed.
list_builds() {
    ls -ld .venv/lib/python*/site-packages/torch{,vision}-*.dist-info 2>/dev/null || true
}

# A torchvision wheel over a torch of another build installs without complaint and fails at import.
check_torchvision() {
    local output
    output=$("$1" -c 'import torchvision.ops; torchvision.ops.nms' 2>&1) && return
    echo "$output" | tail -n 1 >&2
    fail "torch and torchvision in .venv do not match: remove .venv and run this again, or install" \
        "the pair that requirements-pinned.txt names from one and the same index"
}
