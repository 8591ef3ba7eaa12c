#!/bin/sh
# The rate of every method and batch size: five clients, seed 100, a fifth of the training images held out to choose by.
set -e
cd "$(dirname "$0")/../.."
D=experiments/normalization
[ -d data/digits-small ] || python $D/data.py

rates() { # BATCH-SIZES RECIPE... [OPTION...]
    sizes=$1
    shift
    fedsim sweep "$@" --grid training.batch-size="$sizes" --grid training.lr="${RATES:-0.01,0.03,0.1,0.3,1.0,3.0}" \
        --set federation.validation=0.2 --set seed=100 --set rounds=15 --set evaluation.every=15 --set evaluation.modes= \
        --out runs/normalization_lr
}

rates 1,2,4,32 $D/ln.toml $D/in.toml $D/evonorm-s0.toml $D/gn.toml $D/bcn-estimated.toml
rates 1,2 $D/fedwon.toml --set algorithm.agc=0.0 # as FedWon does for batches of 1 and 2
rates 4,32 $D/fedwon.toml
rates 2,4,32 $D/evonorm-b0.toml $D/bcn.toml $D/affine-only.toml $D/fbn.toml $D/fedbn.toml $D/fedavg-bn.toml \
    $D/silobn.toml $D/fixbn.toml $D/adab2n.toml $D/ibn-a.toml $D/ghost.toml
