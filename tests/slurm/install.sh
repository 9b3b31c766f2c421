#!/usr/bin/env bash
# Installs what tests/slurm/test_slurm.py starts, from Debian's or Ubuntu's packages. Where that cannot be,
# it says so in one line and succeeds all the same, since the tests are skipped then.
set -uo pipefail

leave() {
    echo "SLURM $*"
    exit 0
}

PATH+=:/usr/sbin
type slurmctld slurmd sbatch munged >/dev/null 2>&1 && leave "is installed"
command -v apt-get >/dev/null || leave "is not installed: there is no apt-get"
[ "$(id -u)" -eq 0 ] || leave "is not installed: this needs root"
export DEBIAN_FRONTEND=noninteractive
output=$(apt-get update 2>&1 && apt-get install -y --no-install-recommends slurm-wlm munge 2>&1) ||
    leave "is not installed: $(tail -n 1 <<<"$output")"
leave "is installed"
