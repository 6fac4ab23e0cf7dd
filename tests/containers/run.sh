#!/usr/bin/env bash
# Build the image and run the compose stack for real: build, ready, health check, non-root, chat, drain on stop.
#
#   tests/containers/run.sh                                        with docker
#   ENGINE=podman COMPOSE=podman-compose tests/containers/run.sh   with podman
#
# BUILD_FLAGS goes to the build, for machines that need a mirror: volumes, networks, build arguments.
set -euo pipefail
cd "$(dirname "$0")/../.."
engine=${ENGINE:-docker}
compose=${COMPOSE:-docker compose}
export STREAMKV_PORT=${STREAMKV_PORT:-8300}
unset STREAMKV_API_KEY
name=streamkv-check
said=$(mktemp)

say() { printf '\n== %s (after %ss)\n' "$1" "$SECONDS"; }
fail() { echo "FAILED: $1" >&2; $engine logs "$container" 2>&1 | tail -20 >&2; exit 1; }

say "build"
# shellcheck disable=SC2086  # several words on purpose
$engine build ${BUILD_FLAGS:-} --build-arg PYTHON_IMAGE="${PYTHON_IMAGE:-docker.io/library/python:3.11-slim}" -t streamkv:cpu .

say "without a key nothing starts"
if $compose -p "$name" up -d --no-build >/dev/null 2>&1; then $compose -p "$name" down; echo "FAILED: compose starts without a key" >&2; exit 1; fi
if refused=$($engine run --rm streamkv:cpu 2>&1); then echo "FAILED: the image serves without a key" >&2; exit 1; fi
grep -q "STREAMKV_API_KEY" <<< "$refused" || { echo "FAILED: it does not say what to do: $refused" >&2; exit 1; }
STREAMKV_API_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export STREAMKV_API_KEY

say "up"
trap '$compose -p $name down >/dev/null 2>&1 || true' EXIT
$compose -p "$name" up -d --no-build
container=$($engine ps --filter "name=$name" --format '{{.Names}}' | head -1)
[ -n "$container" ] || { echo "FAILED: no container is running" >&2; exit 1; }

say "ready on the published port"
for _ in $(seq 240); do
    if curl -fsS "http://127.0.0.1:$STREAMKV_PORT/ready" 2>/dev/null; then ready=1; break; fi
    sleep 0.25
done
[ "${ready:-}" = 1 ] || fail "not ready after a minute"

say "the health check passes, the process is not root, the root file system is read-only"
$engine exec "$container" python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)" || fail "health check"
[ "$($engine exec "$container" id -u)" != 0 ] || fail "it runs as root"
if $engine exec "$container" sh -c 'echo x > /home/streamkv/x' 2>/dev/null; then fail "the root file system is writable"; fi

say "a key is asked for"
status() { curl -s -o /dev/null -w '%{http_code}' "$@" "http://127.0.0.1:$STREAMKV_PORT/v1/models"; }
[ "$(status)" = 401 ] || fail "no key: $(status)"
[ "$(status -H "Authorization: Bearer wrong")" = 401 ] || fail "a wrong key was accepted"
[ "$(status -H "Authorization: Bearer $STREAMKV_API_KEY")" = 200 ] || fail "the key was refused"

say "chat"
answer=$($engine exec "$container" streamkv chat --once "Hello!")
echo "$answer"
[ -n "$answer" ] || fail "no answer"

say "stop: a running stream is finished first"
$engine exec "$container" streamkv chat --once "Tell me a long story about a fox." > "$said" &
story=$!
for _ in $(seq 100); do
    $engine logs "$container" 2>&1 | grep -c stream_opened | grep -qv '^[01]$' && break
    sleep 0.1
done
$compose -p "$name" stop
wait "$story" || fail "the stream was cut"
[ "$(wc -w < "$said")" -gt 20 ] || fail "the story is short"
rm -f "$said"
code=$($engine inspect --format '{{.State.ExitCode}}' "$container")
[ "$code" = 0 ] || fail "exit status $code"
$engine logs "$container" 2>&1 | grep '"drained"' || fail "no word about draining"

say "done"
echo "7 passed, 0 failed"
