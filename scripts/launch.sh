# shellcheck shell=sh
# Sourced after environment.sh, from the repository root; needs PYTHON.

# check_config train|test CONFIG [argument ...]: check the config with the key=value arguments, fast, before any launch.
# Flags and their values, which may contain "=", are not looked at.
check_config() {
    purpose=$1 config=$2 before=
    shift 2
    for argument in "$@"; do
        shift
        case $before in
        --dense | --*=* | [!-]* | '') case $argument in [!-]*=*) set -- "$@" "$argument" ;; esac ;;
        esac
        before=$argument
    done
    "$PYTHON" -m utils.config "$purpose" "$config" "$@"
}

# launch PROGRAM [argument ...]: run it in one process per visible GPU, or in one on the CPU; NUM_GPUS processes if set.
# One node uses a free port unless MASTER_PORT is set; NNODES > 1 needs NODE_RANK and MASTER_ADDR.
launch() {
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "$PYTHON cannot import torch"
    processes=${NUM_GPUS:-$((gpus > 0 ? gpus : 1))}
    nodes=${NNODES:-1}
    case $processes in 0* | *[!0-9]*) fail "NUM_GPUS must be a number from 1, got '$processes'" ;; esac
    case $nodes in 0* | *[!0-9]*) fail "NNODES must be a number from 1, got '$nodes'" ;; esac
    [ "$gpus" -eq 0 ] || [ "$processes" -le "$gpus" ] || fail "NUM_GPUS is $processes, but $gpus are visible"
    # On a CPU, loader workers and model share the cores: threads that spin while they wait cost either side its turn.
    [ "$gpus" -gt 0 ] || export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    [ "$processes" -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's default, without its banner

    if [ "$nodes" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES is $nodes: set MASTER_ADDR to the address of node 0"
        [ -n "${NODE_RANK:-}" ] || fail "NNODES is $nodes: set NODE_RANK, from 0 to $((nodes - 1))"
        set -- --nnodes "$nodes" --node-rank "$NODE_RANK" \
            --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" "$@"
    elif [ -n "${MASTER_PORT:-}" ]; then
        set -- --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT" "$@"
    else
        set -- --standalone "$@"
    fi

    # torchrun ends with a long report: what the processes wrote into this file (utils/errors.py) is repeated below it.
    SIDE4VIDEO_ERROR_FILE=$(mktemp)
    export SIDE4VIDEO_ERROR_FILE
    trap 'rm -f "$SIDE4VIDEO_ERROR_FILE"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    status=0
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$processes" "$@" || status=$?
    [ "$status" -eq 0 ] || awk '!seen[$0]++' "$SIDE4VIDEO_ERROR_FILE" >&2
    exit "$status"
}
