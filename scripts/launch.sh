# shellcheck shell=sh
# Sourced after environment.sh, from the repository root; needs PYTHON.

# check_config train|test CONFIG [argument ...]: check the configuration and the key=value arguments before any process
# starts. It skips flags and their values, which may contain "=".
check_config() {
    purpose=$1 config=$2 before=
    shift 2
    for argument in "$@"; do
        shift
        case $before in
        --dense | --accept_changes | --*=* | [!-]* | '') case $argument in [!-]*=*) set -- "$@" "$argument" ;; esac ;;
        esac
        before=$argument
    done
    # The first check takes a moment; the second one imports the model and names missing weights too.
    "$PYTHON" -m utils.config "$purpose" "$config" "$@" 2>/dev/null ||
        "$PYTHON" -m tools.check_config "$purpose" "$config" "$@"
}

# launch PROGRAM [argument ...]: run the program in one process for each visible GPU, or in one process on the CPU.
# NUM_GPUS sets another number, and DEVICE=cpu leaves the GPUs alone. A single process is started without torchrun. One
# machine uses a free port unless MASTER_PORT is set. Several machines (NNODES above 1) need NODE_RANK and MASTER_ADDR.
launch() {
    case ${DEVICE:-} in
    cpu) gpus=0 ;;
    *) gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || fail "$PYTHON cannot import torch" ;;
    esac
    processes=${NUM_GPUS:-$((gpus > 0 ? gpus : 1))}
    nodes=${NNODES:-1}
    case $processes in 0* | *[!0-9]*) fail "NUM_GPUS must be a number from 1, got '$processes'" ;; esac
    case $nodes in 0* | *[!0-9]*) fail "NNODES must be a number from 1, got '$nodes'" ;; esac
    [ "$gpus" -eq 0 ] || [ "$processes" -le "$gpus" ] || fail "NUM_GPUS is $processes, but $gpus are visible"
    # On a CPU, loader workers and the model share the cores: a thread that spins while it waits slows the others down.
    [ "$gpus" -gt 0 ] || export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    [ "$processes" -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's own default, set here to avoid its warning

    if [ "$processes" -eq 1 ] && [ "$nodes" -eq 1 ]; then
        unset RANK WORLD_SIZE LOCAL_RANK # of another launcher
        exec "$PYTHON" "$@"
    fi
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

    # Signals are passed on, and the processes decide: they save, and end with 143 or 130.
    trap 'kill -TERM "$launched" 2>/dev/null || :' TERM USR1
    trap 'kill -INT "$launched" 2>/dev/null || :' INT
    "$PYTHON" -m utils.launch --nproc-per-node "$processes" "$@" &
    launched=$!
    status=0
    while :; do
        wait "$launched" && status=0 || status=$?
        kill -0 "$launched" 2>/dev/null || break # otherwise a signal has ended the wait, not the program
    done
    exit "$status"
}
