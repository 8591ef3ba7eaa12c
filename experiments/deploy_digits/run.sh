#!/usr/bin/env bash
# A server and three clients on this machine, with TLS and a key a client. Usage: run.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/deploy-digits}
port=${PORT:-9443}
mkdir -p "$folder"
cd "$folder"

if [ ! -e pki/server.crt ]; then
    fedsim keys ca pki
    fedsim keys server pki --host 127.0.0.1 --host localhost
    for domain in mnist street utility; do
        fedsim keys node pki "$domain"
        fedsim keys register "pki/$domain.pub" --clients-dir clients
    done
fi

started=()
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
for domain in mnist street utility; do
    fedsim client --server "127.0.0.1:$port" --ca pki/ca.crt --key "pki/$domain.key" \
        --domain "$domain" --data digits --state "state/$domain" --give-up 300 2> "$domain.log" &
    started+=($!)
done
fedsim server "$here/fedbn.toml" --listen "127.0.0.1:$port" --cert pki/server.crt --key pki/server.key \
    --ca pki/ca.crt --clients-dir clients --out run
wait "${started[@]}"
echo "run directory: $PWD/run"
