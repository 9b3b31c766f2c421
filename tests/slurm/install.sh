#!/usr/bin/env bash
# Installs SLURM for tests/slurm/test_slurm.py from Debian's or Ubuntu's packages. If that is not
# possible, it prints the reason in one line and exits with 0, since the tests are skipped then.
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
