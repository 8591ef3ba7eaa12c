#!/bin/sh
# The whole study, one seed after the other; finished runs are kept, so it can be stopped and started again.
set -e
cd "$(dirname "$0")/../.."
D=experiments/normalization
[ -d data/digits-small ] || python $D/data.py

# Five clients, all of them a round, and fifty, of which five a round. Rates: see "How the rates were chosen".
cells() { # RATE BATCH-SIZES RECIPE... [OPTION...]
    rate=$1 sizes=$2
    shift 2
    fedsim sweep "$@" --grid federation.clients-per-domain=1,10 --grid training.batch-size="$sizes" --grid seed="$seed" \
        --set training.lr="$rate" --out runs/normalization
}

for seed in ${SEEDS:-0 1 2}; do
    cells 0.3 32 $D/fedavg-bn.toml $D/fedbn.toml $D/fbn.toml
    fedsim sweep $D/unseen-fedbn.toml $D/unseen-fedavg-bn.toml \
        --grid federation.leave-out=mnist,street,utility,synth,mnistm --grid seed="$seed" --out runs/normalization_unseen
    cells 0.1 4,32 $D/gn.toml $D/bcn-estimated.toml
    cells 0.1 4 $D/fedavg-bn.toml $D/fedbn.toml $D/fbn.toml
    cells 0.03 1 $D/bcn-estimated.toml
    cells 0.03 1,2 $D/gn.toml
    cells 0.1 1,2 $D/fedwon.toml --set algorithm.agc=0.0 # as FedWon does for batches of 1 and 2
    cells 1.0 4,32 $D/fedwon.toml
    cells 0.1 2 $D/bcn-estimated.toml
    cells 0.03 2 $D/fedavg-bn.toml $D/fedbn.toml $D/fbn.toml
done
