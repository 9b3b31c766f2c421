#!/usr/bin/env bash
# Runs the quick tests with the lowest and the highest versions of PyTorch, torchvision, timm, NumPy
# and the readers of TIFF that requirements.txt allows, in an environment for each: 6 GB and 10
# minutes each on 2 CPU cores.
#     bash scripts/test_versions.sh [FOLDER]
# FOLDER keeps the environments for the next time; by default they are temporary. PYTHON_LOWER and
# PYTHON_UPPER name interpreters: by default python3.10, where there is one, and python3.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

if [ $# -gt 0 ]; then
    folder=$(realpath -m "$1")
    case $folder/ in "$PWD"/*) fail "name a folder outside the repository, not $1" ;; esac
    mkdir -p "$folder"
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi

lower=${PYTHON_LOWER:-python3.10}
[ -n "${PYTHON_LOWER:-}" ] || "$lower" -c '' 2>/dev/null || lower=python3
upper=${PYTHON_UPPER:-python3}
for package in torch torchvision timm numpy tifffile imagecodecs; do
    sed -nE "s/^$package>=([0-9.]+).*/$package==\1.*/p" requirements.txt
done >"$folder/lower.txt"
echo "pyarrow<26" >>"$folder/lower.txt" # 26 refuses NumPy 1.26 when it is imported
: >"$folder/upper.txt" # pip takes the newest

export OMP_NUM_THREADS=1
status=0
for end in lower upper; do
    python=$folder/$end/bin/python
    make_venv "${!end}" "$folder/$end"
    install_packages "$folder/$end" --upgrade -c "$folder/$end.txt" -r requirements-dev.txt
    check_torchvision "$python"
    echo "$end end: $("$python" --version)"
    "$python" -m pip list --disable-pip-version-check | grep -E '^(torch|torchvision|timm|numpy|tifffile|imagecodecs) '
    run_attached "$python" -m pytest -n 2 --dist loadgroup -q \
        -m "not slow and not faults and not slurm" || status=1
done
exit $status
