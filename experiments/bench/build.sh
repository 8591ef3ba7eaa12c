#!/usr/bin/env bash
# One virtual environment a peer, all versions pinned: build.sh [jax] [pfl] [fluke] [blazefl]   (default: all four)
#
# $BENCH_ENVS   where they go; default ~/.cache/fedsim-bench/envs
# $PYTHON       interpreter to build them with; default python3 (3.11 or later)
#
# Flower and the plain references need none: they run in fedsim's own environment, with fedsim's own pinned Flower.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
envs=${BENCH_ENVS:-$HOME/.cache/fedsim-bench/envs}
python=${PYTHON:-python3}
torch="torch==2.13.0 numpy==2.2.6"

fresh() { # NAME: an empty environment
  rm -rf "${envs:?}/$1"
  mkdir -p "$envs"
  "$python" -m venv "$envs/$1"
}

install() { # NAME REQUIREMENT...
  local name=$1
  shift
  "$envs/$name/bin/python" -m pip install --quiet "$@"
}

build_jax() { # FedJAX's last version needs a jax and a haiku of its time (2024), which need numpy 1
  fresh jax
  install jax fedjax==0.0.17 jax==0.4.25 jaxlib==0.4.25 dm-haiku==0.0.12 numpy==1.26.4 scipy==1.12.0
}

build_pfl() {
  fresh pfl
  install pfl $torch pfl==0.6.0
}

build_fluke() {
  fresh fluke
  install fluke $torch fluke-fl==0.8.1
}

build_blazefl() { # asks for Python 3.14; blazefl_patch.py says what it changes to run on an older one
  fresh blazefl
  install blazefl $torch tqdm==4.67.1
  install blazefl --ignore-requires-python blazefl==3.0.0
  "$envs/blazefl/bin/python" "$here/blazefl_patch.py" >&2
}

for name in ${*:-jax pfl fluke blazefl}; do
  echo "building $envs/$name" >&2
  "build_$name"
done
