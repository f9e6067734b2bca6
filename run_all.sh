#!/usr/bin/env bash
# Every configuration of the study, one line each. Results: results/README.md
#
#   bash run_all.sh                                 all of them, on the embedded images
#   bash run_all.sh C4 D7                           those of some claims
#   bash run_all.sh map scan                        rate against weight decay, and what explains a verdict; only if named
#   bash run_all.sh wide -- --device cuda           some at the original's width and view size; only if named
#   bash run_all.sh --list                          print the commands and run nothing
#   DATA=folder:data/cifar10-jpeg JOBS=2 SEEDS="0 1 2" OUT=results bash run_all.sh C3 C4 -- --width 16
#
# DATA: byol.py's --data (shapes). SEEDS (0). JOBS: runs at a time (1); each gets a GPU of its own where there are several.
# STEPS: the length of every run, in place of the table's. OUT: where the runs' folders go (runs). What stands after --
# goes to every byol.py. A finished run is skipped, a cut-off one resumes. In a Slurm array each element runs its command.

NO_BATCH="--enc-norm gn --mlp-norm none"    # no batch statistics anywhere
LARS="--opt lars --warmup 0"                # as in the blog's code: results/notes.md
SLOW="--warmup 0.1"                         # where weight decay decides: results/notes.md
WIDE="--width 64 --stem imagenet --size 96" # the original's
BATCH="--batch-size 32"                     # where a line names none: results/notes.md says why

# claims         name                 steps  flags
CONFIGURATIONS="
random           random-bn                0  --enc-norm bn
random           random-gn                0  --enc-norm gn
random           random-gnws              0  --enc-norm gn+ws
C3,X1            bn-bn-sgd             6000  --enc-norm bn --mlp-norm bn
C1               bn-none-sgd-slow     12000  --enc-norm bn --mlp-norm none --warmup 0.0125
C2,C3            bn-none-sgd           6000  --enc-norm bn --mlp-norm none
C2               bn-none-lars          6000  --enc-norm bn --mlp-norm none $LARS --lr 0.2
C4,B5            gn-none-sgd           6000  $NO_BATCH
C5,C6            gn-bn-sgd             6000  --enc-norm gn --mlp-norm bn
C6,D7            gn-none-lars          6000  $NO_BATCH $LARS --lr 0.2
C7,D10           gn-none-lars-0.1      6000  $NO_BATCH $LARS --lr 0.1
D10              gn-none-lars-0.5      6000  $NO_BATCH $LARS --lr 0.5
D1,D4            gn-none-sgd-wd1e-4-long 12000 $NO_BATCH --warmup 0.05 --weight-decay 1e-4
D2               gn-none-sgd-wd3e-4-long 12000 $NO_BATCH --warmup 0.05 --weight-decay 3e-4
D3               gn-none-sgd-wd1e-5-long 12000 $NO_BATCH --warmup 0.05 --weight-decay 1e-5
D3               gn-none-sgd-wd1e-3-long 12000 $NO_BATCH --warmup 0.05 --weight-decay 1e-3
D5               gnws-none-sgd-long   24000  --enc-norm gn+ws --mlp-norm none $SLOW
D7,D6            gn-none-lars-early    6000  $NO_BATCH $LARS --lr 0.2 --lars-layers encoder.layer[12]
D8               gn-none-sgd-early     6000  $NO_BATCH --lr-mult encoder.layer[12]=10
D9,D7            gn-none-lars-mlps     6000  $NO_BATCH $LARS --lr 0.2 --lars-layers projection|prediction
B1               bn-none-sgd-short     2000  --enc-norm bn --mlp-norm none
B2               bn-ln-sgd-short       2000  --enc-norm bn --mlp-norm ln
B3               bn-none-moco          6000  --enc-norm bn --mlp-norm none --loss moco --lr 0.02
B4               bn-bn.none-sgd        6000  --enc-norm bn --proj-norm bn --pred-norm none
B4               bn-none.bn-sgd        6000  --enc-norm bn --proj-norm none --pred-norm bn
X1               gnws-none-lars-warm   6000  --enc-norm gn+ws --mlp-norm none --opt lars --warmup 0.68 --lr 0.2
scan             gnws-none-sgd         6000  --enc-norm gn+ws --mlp-norm none
scan             gnws-none-sgd-slow    6000  --enc-norm gn+ws --mlp-norm none $SLOW
scan             gnws-none-sgd-24000  24000  --enc-norm gn+ws --mlp-norm none --warmup 0.025
scan             gn-none-sgd-24000    24000  $NO_BATCH $SLOW
scan             gnws-none-lars        6000  --enc-norm gn+ws --mlp-norm none $LARS --lr 0.2
scan             scan-gnws-sgd-warm    6000  --enc-norm gn+ws --mlp-norm none --warmup 0.68
scan             scan-gnws-sgd-wd3e-4  6000  --enc-norm gn+ws --mlp-norm none $SLOW --weight-decay 3e-4
scan             scan-lars-0.05        6000  $NO_BATCH $LARS --lr 0.05
scan             scan-lars-0.02        6000  $NO_BATCH $LARS --lr 0.02
scan             scan-sgd-short        6000  $NO_BATCH --warmup 0.03
scan             scan-lars-0.2-short   6000  $NO_BATCH --opt lars --warmup 0.03 --lr 0.2
scan             scan-sgd-warm         6000  $NO_BATCH --warmup 0.68
scan             scan-sgd-warm-wd1e-3  6000  $NO_BATCH --warmup 0.68 --weight-decay 1e-3
scan             gn-none-sgd-wd1e-5    6000  $NO_BATCH $SLOW --weight-decay 1e-5
scan             gn-none-sgd-wd1e-4    6000  $NO_BATCH $SLOW --weight-decay 1e-4
scan             gn-none-sgd-wd3e-4    6000  $NO_BATCH $SLOW --weight-decay 3e-4
scan             gn-none-sgd-wd1e-3    6000  $NO_BATCH $SLOW --weight-decay 1e-3
scan             scan-sgd-ema-0.99     6000  $NO_BATCH $SLOW --weight-decay 1e-4 --ema 0.99
scan             scan-sgd-ema-0.999    6000  $NO_BATCH $SLOW --weight-decay 1e-4 --ema 0.999
scan             scan-sgd-pred-fixed   6000  $NO_BATCH $SLOW --weight-decay 1e-4 --lr-mult prediction=0
scan             scan-sgd-pred-0.1     6000  $NO_BATCH --lr-mult prediction=0.1
scan             scan-sgd-12000-wd0   12000  $NO_BATCH --warmup 0.05 --weight-decay 0
scan             scan-lars-0.2-warm    6000  $NO_BATCH --opt lars --warmup 0.68 --lr 0.2
scan             scan-lars-0.1-warm    6000  $NO_BATCH --opt lars --warmup 0.68 --lr 0.1
scan             scan-lars-early-warm  6000  $NO_BATCH --opt lars --warmup 0.68 --lr 0.2 --lars-layers encoder.layer[12]
scan             scan-lars-mlps-warm   6000  $NO_BATCH --opt lars --warmup 0.68 --lr 0.2 --lars-layers projection|prediction
wide             wide-random-bn           0  $WIDE --batch-size 256 --enc-norm bn
wide             wide-random-gn           0  $WIDE --batch-size 256 --enc-norm gn
wide             wide-bn-bn-sgd        4100  $WIDE --batch-size 256 --enc-norm bn --mlp-norm bn
wide             wide-bn-none-sgd      4100  $WIDE --batch-size 256 --enc-norm bn --mlp-norm none
wide             wide-gn-none-sgd      4100  $WIDE --batch-size 256 $NO_BATCH
wide             wide-gn-bn-sgd        4100  $WIDE --batch-size 256 --enc-norm gn --mlp-norm bn
wide             wide-gn-none-lars     4100  $WIDE --batch-size 256 $NO_BATCH $LARS --lr 0.2
wide             wide-gn-none-lars-0.1 4100  $WIDE --batch-size 256 $NO_BATCH $LARS --lr 0.1
wide             wide-sgd-12000       12000  $WIDE $NO_BATCH --warmup 0.05 --weight-decay 1e-4
wide             wide-sgd-24000       24000  $WIDE $NO_BATCH $SLOW --weight-decay 1e-4
wide             wide-sgd-24000-wd1e-5 24000 $WIDE $NO_BATCH $SLOW --weight-decay 1e-5
"
# The map of rate against weight decay, run when it is named.
for decay in 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3; do
    for lr in 0.01 0.02 0.05 0.1 0.2 0.5 1; do
        CONFIGURATIONS+="map map-sgd-$lr-$decay 6000 $NO_BATCH $SLOW --lr $lr --weight-decay $decay"$'\n'
    done
done
for decay in 1e-6 1e-5 1e-4 1e-3 1e-2 1e-1; do
    for lr in 0.02 0.05 0.1 0.2 0.5 1 2; do
        CONFIGURATIONS+="map map-lars-$lr-$decay 1500 $NO_BATCH $LARS --lr $lr --weight-decay $decay"$'\n'
    done
done

set -uf                         # no globbing: [12] and | stand in flags
export LC_ALL=C
usage() {
    echo "run_all.sh: $1" >&2
    exit 2
}
[ -f byol.py ] || usage "run it in the folder that holds byol.py"

# Its arguments as one line that a shell reads back, quoted as Python's shlex.join does in a run's config.json.
quoted() {
    local word line='' apostrophe="'" escaped="'\"'\"'"      # variables: bash 3.2 reads quotes in a substitution otherwise
    for word; do
        case $word in
        '' | *[!a-zA-Z0-9_@%+=:,./-]*) line="$line '${word//$apostrophe/$escaped}'" ;;
        *) line="$line $word" ;;
        esac
    done
    printf '%s' "${line# }"
}

list=
claims=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --list) list=1 ;;
    -*) usage "$1 is not an option; byol.py's flags stand after --" ;;
    *)
        grep -Eq "^([A-Z0-9]+,)*$1[, ]|^$1 " <<<"$CONFIGURATIONS" || usage "$1 is no claim of the table"
        claims="$claims $1"
        ;;
    esac
    shift
done
[ $# -gt 0 ] && shift
more=("$@")
for number in "${JOBS:=1}" "${STEPS:=0}" ${SEEDS:=0}; do
    case $number in '' | *[!0-9]*) usage "JOBS, STEPS and SEEDS are whole numbers, not '$number'" ;; esac
done
[ "$JOBS" -gt 0 ] || usage "JOBS is at least 1"

# names[i], steps[i] and commands[i]: run i, its length, and its command as a shell reads it
names=()
steps=()
commands=()
for seed in $SEEDS; do
    while read -r ids name length flags; do
        wanted=${claims:+no}
        case $ids in map | scan | wide) wanted=no ;; esac
        for claim in $claims; do
            case ,$ids, in *,"$claim",*) wanted= ;; esac
        done
        [ -n "$ids" ] && [ -z "$wanted" ] || continue
        [ "$STEPS" -gt 0 ] && [ "$length" -gt 0 ] && length=$STEPS
        lines=40 evaluations=6
        if [ "$length" -lt 2000 ] || [ "$ids" = map ]; then lines=10 evaluations=1; fi
        names+=("$name-s$seed")
        steps+=("$length")
        case $flags in *--batch-size*) batch= ;; *) batch=$BATCH ;; esac
        # shellcheck disable=SC2086  # $flags and $batch are several words
        commands+=("$(quoted python byol.py $flags $batch --steps "$length" --data "${DATA:-shapes}" --seed "$seed" \
            --log-every $((length < lines ? 1 : length / lines)) --eval-every $((length / evaluations)) --threads 1 \
            --out "${OUT:-runs}/$name-s$seed" ${more[@]+"${more[@]}"})")
    done <<<"$CONFIGURATIONS"
done
if [ -n "$list" ]; then
    printf '%s\n' "${commands[@]}"
    exit
fi
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    [ "$SLURM_ARRAY_TASK_ID" -lt ${#names[@]} ] || usage "element $SLURM_ARRAY_TASK_ID of ${#names[@]} runs, counted from 0"
    eval "exec ${commands[SLURM_ARRAY_TASK_ID]}"
fi

mkdir -p "${OUT:=runs}" || exit 1
gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)
pids=()                         # of the runs under way, by slot
running=()                      # which run each is
failed=
finished=0
total=0
for length in "${steps[@]}"; do total=$((total + length + 100)); done
covered=0                       # steps of finished runs, with 100 each for start and evaluation
skipped=0                       # those of runs that were finished before
tell=60                         # when to show the progress next, in seconds

# Whether run $1 is finished. The log's last line says so; byol.py itself looks closer at any other run.
is_finished() {
    local run=$OUT/${names[$1]}
    tail -n 1 "$run/metrics.jsonl" 2>/dev/null | grep -q "^{\"step\": ${steps[$1]}, \"accuracy\"" &&
        grep -qF "\"command\": \"${commands[$1]}\"" "$run/config.json"
}

# Steps done so far, of finished runs and of those under way, and the time that the rest takes at this rate.
progress() {
    local s at now=$covered left=0
    for ((s = 0; s < JOBS; s++)); do
        [ -n "${pids[s]:-}" ] || continue
        at=$(tail -n 1 "$OUT/${names[running[s]]}.txt" | sed -n 's/^step *\([0-9]*\).*/\1/p')
        now=$((now + ${at:-0}))
    done
    [ $now -le $skipped ] || left=$(((total - now) * SECONDS / (now - skipped)))
    printf '[%d/%d runs, %d%% of the steps, %dh%02dm left] ' $finished ${#names[@]} \
        $((100 * now / total)) $((left / 3600)) $((left / 60 % 60))
}

# The run of slot $1 has ended: count it, report it.
settle() {
    local i=${running[$1]} status last
    wait "${pids[$1]}"
    status=$?
    pids[$1]=
    finished=$((finished + 1))
    covered=$((covered + steps[i] + 100))
    last=$(tail -n 1 "$OUT/${names[i]}.txt")
    [ $status -eq 0 ] || failed="$failed${names[i]} (exit status $status): $last"$'\n'
    progress
    printf '%s: %s\n' "${names[i]}" "$last"
}

# Wait until no more than $1 runs are under way; `slot` is then a free one.
await() {
    local s busy
    while :; do
        busy=0
        for ((s = 0; s < JOBS; s++)); do
            if [ -n "${pids[s]:-}" ] && ! kill -0 "${pids[s]}" 2>/dev/null; then settle $s; fi
            if [ -n "${pids[s]:-}" ]; then busy=$((busy + 1)); else slot=$s; fi
        done
        [ $busy -gt "$1" ] || return 0
        if [ $SECONDS -ge "$tell" ]; then
            tell=$((SECONDS + 60))
            progress
            echo
        fi
        sleep 0.5
    done
}

interrupted() {
    echo "stopping; the same command resumes"
    for ((s = 0; s < JOBS; s++)); do
        [ -z "${pids[s]:-}" ] || kill -TERM "${pids[s]}" 2>/dev/null
    done
    wait
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

for i in "${!names[@]}"; do
    if is_finished "$i"; then
        finished=$((finished + 1))
        covered=$((covered + steps[i] + 100))
        skipped=$((skipped + steps[i] + 100))
        echo "[$finished/${#names[@]}] ${names[i]}: finished before"
        continue
    fi
    await $((JOBS - 1))
    (
        if [ "$gpus" -gt 1 ]; then export CUDA_VISIBLE_DEVICES=$((slot % gpus)); fi
        eval "exec ${commands[i]}"
    ) >>"$OUT/${names[i]}.txt" 2>&1 &
    pids[slot]=$!
    running[slot]=$i
done
await 0
if [ -n "$failed" ]; then
    printf 'failed:\n%s' "$failed" >&2
    exit 1
fi
echo "all ${#names[@]} runs are finished, in $OUT"
