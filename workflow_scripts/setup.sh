# Sourced by the shell of a step: runs what the site wants to happen first, $setup. Where that fails the shell ends with a
# message instead of starting the step.
set -e +u # modules read variables that may be unset

trap 'status=$?
echo "error: setup failed with status $status, so the step was not started; setup (docs/slurm.md) is: $setup" >&2
exit 1' EXIT

# Only login shells know `module` from the start.
if ! command -v module >/dev/null; then
    for init in "$MODULESHOME/init/bash" /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh; do
        if [ -r "$init" ]; then
            . "$init"
            break
        fi
    done
fi

eval "$setup"
trap - EXIT
