#!/bin/sh
# The whole study; finished runs are kept, so it can be stopped and started again. SEEDS=0 runs one seed, JOBS=4 four at a time.
set -e
cd "$(dirname "$0")/../.."
D=experiments/normalization
[ -d data/digits-small ] || python $D/data.py

# Five clients, all of them a round, and fifty, of which five a round.
cells() { # RATE BATCH-SIZE METHOD... ; the rates are those of rates.md
    rate=$1 size=$2 files=
    shift 2
    for method in "$@"; do files="$files $D/$method.toml"; done
    fedsim sweep $files --grid training.batch-size="$size" --grid federation.clients-per-domain=1,10 \
        --grid seed="${SEEDS:-0,1,2}" --set training.lr="$rate" $options --jobs "${JOBS:-2}" --out runs/normalization
}

# Four domains, a client each, and the fifth to be scored on.
unseen() { # RATE METHOD [MODES]
    fedsim sweep $D/"$2".toml --grid federation.leave-out=mnist,street,utility,synth,mnistm --grid seed="${SEEDS:-0,1,2}" \
        --set federation.clients-per-round=4 --set training.lr="$1" --set evaluation.modes="$3" \
        --jobs "${JOBS:-2}" --out runs/normalization_unseen
}

cells 0.3 32 fedbn fedavg-bn silobn fbn adab2n ghost evonorm-b0 evonorm-s0
cells 0.1 32 gn ln in bcn-estimated fixbn
cells 1.0 32 fedwon bcn ibn-a
cells 3.0 32 affine-only
unseen 0.3 fedavg-bn global,adabn,test-batch,alpha-bn,unmix-tns
unseen 0.3 fedbn mean,pooled,adabn,test-batch,alpha-bn,unmix-tns,oracle

options="--set algorithm.agc=0.0" # as FedWon does for batches of 1 and 2
cells 0.1 1,2 fedwon
options=
cells 0.01 1 gn ln in evonorm-s0 bcn-estimated

cells 0.1 4 gn fedbn bcn bcn-estimated
cells 0.03 4 ln in evonorm-s0 fedavg-bn silobn fixbn fbn adab2n evonorm-b0 # ghost-size is 8: ghost would be fedavg-bn
cells 0.3 4 ibn-a
cells 1.0 4 fedwon
cells 3.0 4 affine-only

cells 0.03 2 gn ln in evonorm-s0 fedbn fbn bcn
cells 0.1 2 bcn-estimated
cells 0.01 2 fedavg-bn silobn fixbn adab2n ibn-a
cells 0.3 2 evonorm-b0
cells 3.0 2 affine-only

unseen 0.1 gn
unseen 0.1 in
unseen 1.0 ibn-a
unseen 1.0 fedwon
