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

    if [ ! -x "$python" ]; then
        local base=${PYTHON:-python3}
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "Python 3.10 or newer is needed: install it, or name one with PYTHON=/path/to/python3"
        echo "making .venv with $("$base" --version)"
        "$base" -m venv .venv || {
            rm -rf .venv
            fail "the venv module does not work: on Debian or Ubuntu, run apt-get install python3-venv"
        }
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "$requirements is installed in .venv"
    else
        echo "installing $requirements into .venv: a few minutes and gigabytes the first time"
        "$python" -m pip install --quiet --disable-pip-version-check \
            -c requirements-pinned.txt -r "$requirements" ||
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
