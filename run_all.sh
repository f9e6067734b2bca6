#!/usr/bin/env bash
# Every configuration of the study, one line each. Results: results/README.md
#
#   bash run_all.sh                              every claim, in both forms, on the embedded images
#   STEPS=300 bash run_all.sh                    a quick look: 300 steps each
#   bash run_all.sh C4 D7 gn-none-lars-0.5       those of some claims, with what was tried to flip them
#   bash run_all.sh tries                        all that was tried to flip a claim
#   bash run_all.sh why map long wide fashion full blog  what no claim needs; blog is for a GPU
#   bash run_all.sh --list                       print the commands and run nothing
#   DATA=folder:data/cifar10-jpeg SEEDS="0 1 2" OUT=runs/16 bash run_all.sh C3 C4 -- --width 16
#
# DATA: byol.py's --data (shapes). SEEDS (0). JOBS: runs at a time (one on each core, or with --device cuda on
# each GPU). STEPS: every run's length, not the table's. OUT: the runs' folder (runs). What stands after -- goes
# to every command. A finished run is skipped, a cut-off one resumes, a failed one stops no other and is named at
# the end. In a Slurm array each element runs its command, counted from 0.
#
# A line makes two runs: NAME-code, the form of the blog's code (LARS on all parameters, no warm-up), and
# NAME-paper, the BYOL paper's (LARS on weights, a linear warm-up over a tenth of the run); if its name ends
# in -code or -paper, that one alone. NAME@SWITCH is NAME with one thing changed.

GN="--enc-norm gn --mlp-norm none" NONE="--enc-norm none --mlp-norm none"
WS="--enc-norm gn+ws --mlp-norm none" LARS="--opt lars"
PROJ="--proj-norm bn --pred-norm none" PRED="--proj-norm none --pred-norm bn"
CONVS="conv|downsample.0" MLPS="(projection|prediction)" EARLY="encoder.layer[12]"
ON_MLPS="$LARS --lr 0.2 --lars-layers '$MLPS'"
WIDE="--width 64 --stem imagenet --size 32 --batch-size 64"
BLOG="--width 64 --stem imagenet --size 96 --batch-size 256"
# claims       name                    steps   flags
CONFIGURATIONS="
C3,C5,B3,X1    bn-bn-sgd               6000    --enc-norm bn --mlp-norm bn --lr 0.8
C2,C3          bn-none-sgd             6000    --enc-norm bn --mlp-norm none --lr 0.8
C2             bn-none-lars            6000    --enc-norm bn --mlp-norm none $LARS --lr 0.2
C4,B5          gn-none-sgd             6000    $GN --lr 0.8
C5,C6          gn-bn-sgd               6000    --enc-norm gn --mlp-norm bn --lr 0.8
C6,D7          gn-none-lars-0.2        6000    $GN $LARS --lr 0.2
C7,D10         gn-none-lars-0.1        6000    $GN $LARS --lr 0.1
D10            gn-none-lars-0.5        6000    $GN $LARS --lr 0.5
D6,D7          gn-none-lars-early      6000    $GN $LARS --lr 0.2 --lars-layers '$EARLY'
D8             gn-none-sgd-early       6000    $GN --lr 0.2 --lr-mult '$EARLY=10'
D7,D9          gn-none-lars-mlps       6000    $GN $LARS --lr 0.2 --lars-layers 'projection|prediction'
X1             gnws-none-lars          6000    $WS $LARS --lr 0.2
B1             bn-none-sgd-short       2000    --enc-norm bn --mlp-norm none --lr 0.8
B2             bn-ln-sgd-short         2000    --enc-norm bn --mlp-norm ln --lr 0.8
B3             bn-none-moco            6000    --enc-norm bn --mlp-norm none --loss moco --lr 0.02
B4             bn-bn.none-sgd          6000    --enc-norm bn --proj-norm bn --pred-norm none --lr 0.8
B4             bn-none.bn-sgd          6000    --enc-norm bn --proj-norm none --pred-norm bn --lr 0.8
C1             bn-none-sgd-long        24000   --enc-norm bn --mlp-norm none --lr 0.8
D1,D4          gn-none-sgd-wd1e-5      24000   $GN --lr 0.2 --weight-decay 1e-5
D2             gn-none-sgd-wd1e-4      24000   $GN --lr 0.2 --weight-decay 1e-4
D3             gn-none-sgd-wd1e-6      24000   $GN --lr 0.2 --weight-decay 1e-6
D3             gn-none-sgd-wd1e-3      24000   $GN --lr 0.2 --weight-decay 1e-3
D5             gnws-none-sgd           24000   $WS --lr 0.2
D11            gn-none-sgd-0.2-clip-0.1-code 6000 $GN --lr 0.2 --clip 0.1
D11            none-none-sgd-0.2-clip-0.1-code 6000 $NONE --lr 0.2 --clip 0.1
D11            gn-none-sgd-0.8-clip-0.1-code 6000 $GN --lr 0.8 --clip 0.1
D11            gn-none-adamw-1e-4      6000    $GN --opt adamw --lr 1e-4
D11            gn-none-adamw-3e-4      6000    $GN --opt adamw --lr 3e-4
D11            gn-none-adamw-1e-3      6000    $GN --opt adamw --lr 1e-3
D11            gn-none-adamw-3e-3      6000    $GN --opt adamw --lr 3e-3
tries,C6 gn-bn-sgd@half-the-rate-code 6000 --enc-norm gn --mlp-norm bn --lr 0.4
tries,C6 gn-bn-sgd@warm-up-of-600-code 6000 --enc-norm gn --mlp-norm bn --lr 0.8 --warmup 0.1
tries,C6 gn-bn-sgd@weight-standardization-code 6000 --enc-norm gn+ws --mlp-norm bn --lr 0.8
tries,C6 gn-none-lars-0.2@weight-standardization-code 6000 $WS $LARS --lr 0.2
tries,C7,D10 gn-none-lars-0.1@half-the-rate-code 6000 $GN $LARS --lr 0.05
tries,C1 bn-none-sgd-long@half-the-rate-code 24000 --enc-norm bn --mlp-norm none --lr 0.4
tries,D1,D4 gn-none-sgd-wd1e-5@half-the-rate-code 24000 $GN --lr 0.1 --weight-decay 1e-5
tries,D1,D4 gn-none-sgd-wd1e-5@twice-the-rate-paper 24000 $GN --lr 0.4 --weight-decay 1e-5
tries,D1,D4 gn-none-sgd-wd1e-5@weight-standardization-paper 24000 $WS --lr 0.2 --weight-decay 1e-5
tries,D1,D4 gn-none-sgd-wd1e-5@batch-128-paper 24000 $GN --lr 0.2 --weight-decay 1e-5 --batch-size 128
tries,D1,D4 gn-none-sgd-wd1e-5@BN-in-the-projection-paper 24000 --enc-norm gn $PROJ --lr 0.2 --weight-decay 1e-5
tries,D1,D4 gn-none-sgd-wd1e-5@BN-in-the-prediction-code 24000 --enc-norm gn $PRED --lr 0.2 --weight-decay 1e-5
tries,D2 gn-none-sgd-wd1e-4@warm-up-of-600-code 24000 $GN --lr 0.2 --weight-decay 1e-4 --warmup 0.025
tries,D5 gnws-none-sgd@half-the-rate-code 24000 $WS --lr 0.1
tries,D5 gnws-none-sgd@twice-the-rate-paper 24000 $WS --lr 0.4
tries,D5 gnws-none-sgd@batch-128-paper 24000 $WS --lr 0.2 --batch-size 128
tries,D5 gnws-none-sgd@four-times-the-rate-paper 24000 $WS --lr 0.8
tries,D5 gnws-none-sgd@ten-times-the-decay-paper 24000 $WS --lr 0.2 --weight-decay 1e-3
tries,D5 gnws-none-sgd@five-times-the-decay 24000 $WS --lr 0.2 --weight-decay 5e-4
tries,D5 gnws-none-sgd@twice-the-decay-paper 24000 $WS --lr 0.2 --weight-decay 2e-4
tries,D5 gnws-none-sgd@BN-in-the-projection-code 24000 --enc-norm gn+ws $PROJ --lr 0.2
tries,D5 gnws-none-sgd@BN-in-the-prediction-code 24000 --enc-norm gn+ws $PRED --lr 0.2
tries,D7 gn-none-lars-early@LARS-on-all-paper 6000 $GN $LARS --lr 0.2 --lars-on all --lars-layers '$EARLY'
tries,D7 gn-none-lars-0.2@LARS-on-all-paper 6000 $GN $LARS --lr 0.2 --lars-on all
tries,D7 gn-none-lars-mlps@LARS-on-all-paper 6000 $GN $LARS --lr 0.2 --lars-on all --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@LARS-on-weights-code 6000 $GN $LARS --lr 0.2 --lars-layers '$MLPS.*weight'
tries,D9 gn-none-lars-mlps@half-the-rate-paper 6000 $GN $LARS --lr 0.1 --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@twice-the-rate 6000 $GN $LARS --lr 0.4 --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@four-times-the-rate 6000 $GN $LARS --lr 0.8 --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@eight-times-the-rate 6000 $GN $LARS --lr 1.6 --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@sixteen-times-the-rate-paper 6000 $GN $LARS --lr 3.2 --lars-layers '$MLPS'
tries,D9 gn-none-lars-mlps@warm-up-of-150-paper 6000 $GN $ON_MLPS --warmup 0.025
tries,D9 gn-none-lars-mlps@warm-up-of-2400-paper 6000 $GN $ON_MLPS --warmup 0.4
tries,D9 gn-none-lars-mlps@decay-0-paper 6000 $GN $ON_MLPS --weight-decay 0
tries,D9 gn-none-lars-mlps@decay-1e-4-paper 6000 $GN $ON_MLPS --weight-decay 1e-4
tries,D9 gn-none-lars-mlps@decay-3e-4-paper 6000 $GN $ON_MLPS --weight-decay 3e-4
tries,D9 gn-none-lars-mlps@decay-1e-3-paper 6000 $GN $ON_MLPS --weight-decay 1e-3
tries,D9 gn-none-lars-mlps@batch-128-paper 6000 $GN $ON_MLPS --batch-size 128
tries,D9 gn-none-lars-mlps@weight-standardization-paper 6000 $WS $ON_MLPS
tries,D9 gn-none-lars-mlps@BN-in-the-projection-paper 6000 --enc-norm gn $PROJ $ON_MLPS
tries,D9 gn-none-lars-mlps@BN-in-the-prediction-code 6000 --enc-norm gn $PRED $ON_MLPS
tries,D9 gn-none-lars-mlps@four-times-the-steps-paper 24000 $GN $ON_MLPS
tries,C1 bn-none-sgd-long@warm-up-of-150-code 24000 --enc-norm bn --mlp-norm none --lr 0.8 --warmup 0.00625
tries,D1,D4 gn-none-sgd-wd1e-5@warm-up-of-150-code 24000 $GN --lr 0.2 --weight-decay 1e-5 --warmup 0.00625
tries,D5 gnws-none-sgd@warm-up-of-150-code 24000 $WS --lr 0.2 --warmup 0.00625
tries,C1 bn-none-sgd-long@warm-up-of-300-code 24000 --enc-norm bn --mlp-norm none --lr 0.8 --warmup 0.0125
tries,D1,D4 gn-none-sgd-wd1e-5@warm-up-of-300-code 24000 $GN --lr 0.2 --weight-decay 1e-5 --warmup 0.0125
tries,D5 gnws-none-sgd@warm-up-of-300-code 24000 $WS --lr 0.2 --warmup 0.0125
tries,C1 bn-none-sgd-long@warm-up-of-450-code 24000 --enc-norm bn --mlp-norm none --lr 0.8 --warmup 0.01875
tries,D1,D4 gn-none-sgd-wd1e-5@warm-up-of-450-code 24000 $GN --lr 0.2 --weight-decay 1e-5 --warmup 0.01875
tries,D5 gnws-none-sgd@warm-up-of-450-code 24000 $WS --lr 0.2 --warmup 0.01875
tries,C1 bn-none-sgd-long@warm-up-of-600-code 24000 --enc-norm bn --mlp-norm none --lr 0.8 --warmup 0.025
tries,D1,D4 gn-none-sgd-wd1e-5@warm-up-of-600-code 24000 $GN --lr 0.2 --weight-decay 1e-5 --warmup 0.025
tries,D5 gnws-none-sgd@warm-up-of-600-code 24000 $WS --lr 0.2 --warmup 0.025
full gn-none-sgd-wd1e-5@the-original-length 131200 $GN --lr 0.2 --weight-decay 1e-5
full gnws-none-sgd@the-original-length 131200 $WS --lr 0.2
why            gn-none-sgd-0.2-code    6000    $GN --lr 0.2
why            none-none-sgd-0.2-code  6000    $NONE --lr 0.2
why            none-none-lars-0.2-paper 6000   $NONE $LARS --lr 0.2
why            clip-early-code         6000    results/clip.py early $GN --lr 0.2 --clip 0.1 --batch-size 32
why            clip-late-code          6000    results/clip.py late $GN --lr 0.2 --clip 0.1 --batch-size 32
why            gn-none-sgd-0.02-code   6000    $GN --lr 0.02
why            clip-scaled-code        6000    results/clip.py scaled $GN --lr 0.02 --clip 1 --batch-size 32
why            bn-none-sgd-0.8-clip-0.1-code 6000 --enc-norm bn --mlp-norm none --lr 0.8 --clip 0.1
why            gnws-none-sgd-0.2-clip-0.1-code 6000 $WS --lr 0.2 --clip 0.1
why            gn-bn-sgd-0.8-clip-0.1-code 6000 --enc-norm gn --mlp-norm bn --lr 0.8 --clip 0.1
why            bn-bn-sgd-0.8-clip-0.1-code 6000 --enc-norm bn --mlp-norm bn --lr 0.8 --clip 0.1
why            gn-none-adamw-1e-3-clip-0.1-code 6000 $GN --opt adamw --lr 1e-3 --clip 0.1
why            bn-bn-sgd-0.2-code      6000    --enc-norm bn --mlp-norm bn --lr 0.2
why            bn-untrained            200     --enc-norm bn --mlp-norm bn --lr 1e-9
why            bn-bn-adamw-1e-3-code   6000    --enc-norm bn --mlp-norm bn --opt adamw --lr 1e-3
long           bn-bn-sgd-0.8-long-code 24000   --enc-norm bn --mlp-norm bn --lr 0.8
long           bn-bn-sgd-0.2-long-code 24000   --enc-norm bn --mlp-norm bn --lr 0.2
long           bn-bn-sgd-0.8-clip-0.1-long-code 24000 --enc-norm bn --mlp-norm bn --lr 0.8 --clip 0.1
long           gn-bn-sgd-0.4-long-code 24000   --enc-norm gn --mlp-norm bn --lr 0.4
long           none-none-sgd-1-clip-0.03-long-code 24000 $NONE --lr 1 --clip 0.03
long           gn-none-sgd-1-clip-0.03-long-code 24000 $GN --lr 1 --clip 0.03
long           gn-none-sgd-1-clip-0.03-wd0-long-code 24000 $GN --lr 1 --clip 0.03 --weight-decay 0
long           none-none-sgd-0.2-clip-0.1-long-code 24000 $NONE --lr 0.2 --clip 0.1
long           gn-none-sgd-0.2-clip-0.1-long-code 24000 $GN --lr 0.2 --clip 0.1
long           gn-none-lars-0.2-long-paper 24000 $GN $LARS --lr 0.2
fashion        fashion-gn-none-sgd-0.8-code 3000 --data fashion-mnist $GN --lr 0.8
fashion        fashion-gn-none-sgd-0.2-clip-0.1-code 3000 --data fashion-mnist $GN --lr 0.2 --clip 0.1
fashion        fashion-none-none-sgd-0.2-clip-0.1-code 3000 --data fashion-mnist $NONE --lr 0.2 --clip 0.1
fashion        fashion-gn-none-lars-0.2-code 3000 --data fashion-mnist $GN $LARS --lr 0.2
wide           wide-bn-bn-sgd-code     3000    --enc-norm bn --mlp-norm bn --lr 0.8 $WIDE
wide           wide-bn-bn-sgd-0.2-code 3000    --enc-norm bn --mlp-norm bn --lr 0.2 $WIDE
wide           wide-bn-bn-sgd-0.2-twice-code 6000 --enc-norm bn --mlp-norm bn --lr 0.2 $WIDE
wide           wide-bn-untrained-code  200     --enc-norm bn --mlp-norm bn --lr 1e-9 $WIDE
wide           wide-gn-none-sgd-code   3000    $GN --lr 0.8 $WIDE
wide           wide-gn-none-sgd-0.2-clip-0.1-code 3000 $GN --lr 0.2 --clip 0.1 $WIDE
wide           wide-none-none-sgd-0.2-clip-0.1-code 3000 $NONE --lr 0.2 --clip 0.1 $WIDE
wide           wide-gn-none-sgd-0.2-code 3000  $GN --lr 0.2 $WIDE
wide           wide-gn-none-lars-0.2-paper 3000 $GN $LARS --lr 0.2 $WIDE
wide           wide-gn-none-lars-0.2-code 3000 $GN $LARS --lr 0.2 $WIDE
wide           wide-gn-bn-sgd-code     3000    --enc-norm gn --mlp-norm bn --lr 0.8 $WIDE
wide           wide-gn-none-sgd-paper  3000    $GN --lr 0.8 $WIDE
wide           wide-gn-none-lars-0.5-code 3000 $GN $LARS --lr 0.5 $WIDE
wide           wide-gn-none-lars-0.1-code 3000 $GN $LARS --lr 0.1 $WIDE
wide           wide-gn-none-adamw-1e-3-paper 3000 $GN --opt adamw --lr 1e-3 $WIDE
wide           wide-gn-none-sgd-0.8-clip-0.1-code 3000 $GN --lr 0.8 --clip 0.1 $WIDE
wide           wide-bn-none-sgd-code   3000    --enc-norm bn --mlp-norm none --lr 0.8 $WIDE
wide           wide-gn-none-lars-early-paper 3000 $GN $LARS --lr 0.2 --lars-layers '$EARLY' $WIDE
wide           wide-gn-none-lars-mlps-paper 3000 $GN $LARS --lr 0.2 --lars-layers 'projection|prediction' $WIDE
wide           wide-gnws-none-sgd-paper 3000   $WS --lr 0.2 $WIDE
blog           blog-bn-bn-sgd-code     2000    --enc-norm bn --mlp-norm bn --lr 0.8 $BLOG
blog           blog-gn-none-sgd-code   2000    $GN --lr 0.8 $BLOG
blog           blog-gn-none-sgd-0.2-clip-0.1-code 2000 $GN --lr 0.2 --clip 0.1 $BLOG
blog           blog-gn-none-lars-0.2-code 2000 $GN $LARS --lr 0.2 $BLOG
blog           blog-gn-none-lars-0.2-paper 2000 $GN $LARS --lr 0.2 $BLOG
blog           blog-gn-bn-sgd-code     2000    --enc-norm gn --mlp-norm bn --lr 0.8 $BLOG
blog           blog-gn-none-lars-0.1-code 2000 $GN $LARS --lr 0.1 $BLOG
blog           blog-gn-none-adamw-1e-3-paper 2000 $GN --opt adamw --lr 1e-3 $BLOG
why            no-decay-code           24000   $GN --lr 0.2 --weight-decay 0 --warmup 0.0125
why            harm-lengths-paper       6000    results/harm.py lengths $GN --lr 0.2 --batch-size 32
why            harm-units-paper         6000    results/harm.py units $GN --lr 0.2 --batch-size 32
why            harm-both-paper          6000    results/harm.py both $GN --lr 0.2 --batch-size 32
why            lars-all-0.05-code      3000    $GN $LARS --lr 0.05
why            lars-weights-0.05-code  3000    $GN $LARS --lr 0.05 --lars-layers '$CONVS|$MLPS.*weight'
why            lars-norms-0.05-code    3000    $GN $LARS --lr 0.05 --lars-layers 'encoder|$MLPS.*weight'
why            lars-biases-0.05-code   3000    $GN $LARS --lr 0.05 --lars-layers '$CONVS|$MLPS'
why            growth-sgd-paper        6000    results/growth.py $GN --lr 0.2 --batch-size 32
why            growth-sgd-code         2000    results/growth.py $GN --lr 0.2 --batch-size 32
why            growth-lars-code        2000    results/growth.py $GN $LARS --lr 0.2 --batch-size 32
"
for lr in 0.02 0.05 0.1 0.2 0.5 1 2; do
    for decay in 1e-6 1e-5 1e-4 1e-3 1e-2 1e-1; do
        CONFIGURATIONS+="map map-sgd-$lr-$decay-paper 3000 $GN --lr $lr --weight-decay $decay"$'\n'
        CONFIGURATIONS+="map map-lars-$lr-$decay 3000 $GN --lr $lr --weight-decay $decay $LARS"$'\n'
    done
    for clip in 0.01 0.03 0.1 0.3 1 3; do
        CONFIGURATIONS+="map map-clip-$lr-$clip-code 3000 $GN --lr $lr --clip $clip"$'\n'
    done
    for warmup in 0 0.01 0.03 0.1 0.3 1; do
        CONFIGURATIONS+="map map-warmup-$lr-$warmup-code 3000 $GN --lr $lr --warmup $warmup"$'\n'
    done
done

set -uf                             # no globbing: of SEEDS
usage() { echo "run_all.sh: $1" >&2; exit 2; }
[ -f byol.py ] || usage "run it in the folder that holds byol.py"
if [ "${BASH_VERSINFO[0]}" -lt 4 ] || [[ $(xargs --version 2>&1) != *GNU* ]]; then
    usage "needs bash 4 and GNU xargs (on macOS: brew install bash findutils, and put them first in PATH)"
fi
list='' claims=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --help | -h) sed -n '2,/^$/s/^# \{0,1\}//p' run_all.sh; exit ;;
    --list) list=1 ;;
    '' | -*) usage "'$1' is not an option; byol.py's flags stand after --" ;;
    *)
        awk '{print $1 "," $2}' <<<"$CONFIGURATIONS" | tr , '\n' | grep -qxF -- "$1" || usage "$1 is unknown"
        claims+="${claims:+|}$1"
        ;;
    esac
    shift
done
[ $# -gt 0 ] && shift
[[ " $*" =~ " "(--seed|--steps|--epochs|--out) ]] && usage "give SEEDS, STEPS or OUT, not ${BASH_REMATCH[1]}"
GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2>/dev/null | sed -nE 's/^GPU ([0-9]+).*/\1/p' | paste -sd , -)}
IFS=, read -ra gpus <<<"$GPUS"
jobs=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
case " $* " in
*[\ =]cuda:*) jobs=1 GPUS='' ;;                             # the one that is named, for all runs
*[\ =]"cuda "*) jobs=$((${#gpus[@]} > 0 ? ${#gpus[@]} : 1)) ;;
esac
for number in "${JOBS:=$jobs}" "${STEPS:=0}" ${SEEDS:=0}; do
    case $number in
    '' | 0?* | *[!0-9]* | ??????????*) usage "JOBS, STEPS, SEEDS: '$number' is no whole number up to nine digits" ;;
    esac
done
[[ $JOBS -gt 0 && $SEEDS == *[0-9]* ]] || usage "JOBS is at least 1, and SEEDS at least one number"
export OUT=${OUT:-runs} GPUS

# Append a flag and its value to `command`, unless it has the flag already.
lacks() { [[ " $command " == *" $1 "* ]] || command+=" $1 $2"; }

# $1 quoted as Python's shlex.join does, by which config.json has the command.
quote() { [[ $1 =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] && printf %s "$1" || printf "'%s'" "${1//\'/\'\"\'\"\'}"; }

# A line for each run: its name, its length and its command, separated by tabs.
runs() {
    more=$(for word in "$@"; do printf ' %s' "$(quote "$word")"; done)
    for seed in $SEEDS; do
        while read -r ids name steps flags; do
            [[ ,$ids,$name, =~ ,(${claims:-all}), || (-z $claims && $ids == [[:upper:]]*) ]] || continue
            [ "$STEPS" -eq 0 ] || steps=$STEPS
            [[ $flags == *--batch-size* ]] || flags="--batch-size 32 $flags"
            [[ $flags == results/* ]] || flags="byol.py $flags"
            for form in code paper; do
                case $name-$form in *-code-paper | *-paper-code) continue ;; esac
                run=${name%-"$form"}-$form-s$seed command="python $flags"
                lacks --steps "$steps"
                lacks --data "$(quote "${DATA:-shapes}")"
                lacks --seed "$seed"
                lacks --threads 1
                lacks --log-every $((steps < 40 ? 1 : steps / 40))
                lacks --eval-every $((steps / 2))
                [[ $form/$flags != code/*"--opt lars"* ]] || lacks --lars-on all
                [[ $form == code ]] || lacks --warmup 0.1
                lacks --out "$(quote "$OUT/$run")"
                printf '%s\t%s\t%s\n' "$run" "$steps" "$command$more"
            done
        done <<<"$CONFIGURATIONS"
    done
}

# Run one line of `runs`, its output to a .txt beside its folder, unless its log says that it is finished. Prints
# that it begins and how it went: how, its length, its seconds and what there is to say, separated by tabs.
run_one() {
    local name=$1 steps=$2 command=$3 how=failed text begin=$SECONDS
    IFS=, read -ra gpus <<<"$GPUS"
    [ -z "${SLOT:-}" ] || export CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]}
    if tail -n 1 "$OUT/$name/metrics.jsonl" 2>/dev/null | grep -q "^{\"step\": $steps, \"accuracy\".*}$" &&
        grep -qF "\"command\": \"$command\"" "$OUT/$name/config.json"; then
        how=before text="$name: finished before"
    elif printf 'begun\t0\t0\t%s\n' "$name begins, its lines are in $OUT/$name.txt" &&
        eval "$command" >>"$OUT/$name.txt" 2>&1; then
        how=finished text="$name: $(grep "^step " "$OUT/$name.txt" | tail -n 1)"
    else
        text="$name (exit status $?): $(tail -n 1 "$OUT/$name.txt")"
    fi
    printf '%s\t%s\t%s\t%s\n' "$how" "$steps" $((SECONDS - begin)) "$text"
}

[ -z "$list" ] || { runs "$@" | cut -f 3; exit; }
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    [[ $SLURM_ARRAY_TASK_ID =~ ^(0|[1-9][0-9]{0,8})$ ]] || usage "SLURM_ARRAY_TASK_ID is '$SLURM_ARRAY_TASK_ID'"
    command=$(runs "$@" | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" | cut -f 3)
    [ -n "$command" ] || usage "element $SLURM_ARRAY_TASK_ID of $(runs "$@" | wc -l) runs, counted from 0"
    eval "exec $command"
fi
mkdir -p -- "$OUT" 2>/dev/null && [ -w "$OUT" ] || usage "OUT: nothing can be written to '$OUT'"
trap 'echo "stopped; the same command resumes"; exit 130' INT
read -r total left < <(runs "$@" | awk -F '\t' '{n++; steps += $2} END {print n, steps}')
echo "$total runs, $left steps, $JOBS at a time. Ctrl-C stops them, the same command resumes; STEPS=300 is a quick look."
export -f run_one
[[ $GPUS != *,* ]] || slot=--process-slot-var=SLOT          # a number for each of the JOBS places
n=0 did=0 took=0 failed=''
while IFS=$'\t' read -r how steps seconds text; do
    [ "$how" != begun ] || { echo "$text"; continue; }
    ((n += 1, left -= steps))
    [ "$how" != finished ] || ((did += steps, took += seconds))
    [ "$how" != failed ] || failed+=$text$'\n'
    minutes=$((did > 0 ? took * left / did / JOBS / 60 : 0))
    echo "[$n/$total] $text, $([ $did -gt 0 ] && echo "$minutes" || echo '?') minutes left"
done < <(runs "$@" | tr '\t\n' '\0\0' | xargs -0 -n 3 -P "$JOBS" ${slot+"$slot"} bash -c 'run_one "$@"' _)
[ "$n" -eq "$total" ] || failed+="only $n of $total runs came to an end; the same command resumes"$'\n'
python results/report.py "$OUT" 2>&1 | grep -v '^|'         # the verdicts; its table repeats the lines above
[ -z "$failed" ] || { printf 'failed:\n%s' "$failed"; exit 1; } >&2
echo "all runs are finished, in $OUT"
