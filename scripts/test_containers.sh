#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the image and the SIF, and restores one real head in each: without network, with a
# read-only root, as a user that does not exist in the image, the image with 4 GiB of memory.
#
#   scripts/test_containers.sh BIDS_DIR LABEL [image] [sif]     (default: both)
#
# Where ../shared/lab is present, its builders are used; else docker (or podman) and apptainer.
# WORK (default: a new folder) is for the outputs; OPTIONS (default: --sloppy) is for brainprior.
# BUILD=0 uses the existing image TAG and file SIF.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
[ $# -ge 2 ] || { sed -n '3,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$(realpath "$1") label=$2
shift 2
parts=${*:-image sif}
WORK=${WORK:-$(mktemp -d)}
OPTIONS=${OPTIONS:---sloppy}
TAG=${TAG:-brainprior:test}
lab=${LAB:-$here/../shared/lab}
mkdir -p "$WORK"
chmod 755 "$WORK"
sif=${SIF:-$WORK/brainprior.sif}
say() { echo "test_containers: $*"; }

if [ -x "$lab/container" ]; then
    engine() { "$lab/container" "$@"; }
    build_image() { "$lab/container" build . "$TAG" --layers --build-arg "REVISION=$revision"; }
    build_sif() { "$lab/apptainer" build "$sif" Singularity.def --image "$TAG"; }
    run_sif() { "$lab/apptainer" run-as-user --containall --net --network none "$@"; }
    read_only=(--read-only --read-only-tmpfs=false) # as Docker: not even /tmp
else
    docker=$(command -v docker || command -v podman) || { say "neither docker nor podman is here"; exit 1; }
    engine() { "$docker" "$@"; }
    build_image() { "$docker" build -t "$TAG" --build-arg "REVISION=$revision" .; }
    build_sif() { # from an archive: podman has no daemon
        rm -f "$WORK/image.tar"
        "$docker" save -o "$WORK/image.tar" "$TAG"
        apptainer build --force --build-arg BOOTSTRAP=docker-archive --build-arg "FROM=$WORK/image.tar" \
            "$sif" Singularity.def
        rm "$WORK/image.tar"
    }
    run_sif() { apptainer run --containall "$@"; }
    read_only=(--read-only)
fi
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)

# FOLDER: a run wrote its outputs
check() {
    cat "$1/logs/status.tsv"
    [ "$(tail -n +2 "$1/logs/status.tsv" | cut -f3 | sort -u)" = done ]
    [ -s "$1/sub-$label.html" ]
    [ -n "$(find "$1/sub-$label" -name '*_desc-restored_*.nii.gz' -size +100k)" ]
}

# PATTERN COMMAND...: it must stop at the start with code 2 and an error that matches
refused() {
    local pattern=$1 code=0
    shift
    "$@" 2>"$WORK/refused.txt" || code=$?
    [ "$code" = 2 ] && grep -e "$pattern" "$WORK/refused.txt"
}

# FOLDER: an empty one that any user may write
folder() {
    rm -rf "$1"
    mkdir -m 777 -p "$1"
}

if [[ $parts == *image* ]]; then
    SECONDS=0
    [ "${BUILD:-1}" = 0 ] || { build_image; say "image $TAG: built and self-tested in $SECONDS s"; }
    bytes=$(engine image inspect --format '{{.Size}}' "$TAG")
    say "image $TAG: $((bytes / 1000000)) MB"
    [ "$bytes" -lt 2500000000 ] || [ "${ANY_SIZE:-0}" = 1 ]
    # no build tool, no setting of the builder
    engine run --rm --network none --entrypoint sh "$TAG" -c \
        'for tool in cc gcc g++ ld make git pip pip3 curl wget; do \
             if command -v $tool; then echo "$tool is in the image"; exit 1; fi; done; \
         [ ! -e /src ] && [ ! -s /etc/pip.conf ] && [ "$(id -u)" = 1000 ] && [ -z "$(ls -A /tmp)" ]'
    say "no build tools, not root"
    for label_name in title description version revision licenses base.name; do
        [ -n "$(engine image inspect --format \
            "{{index .Config.Labels \"org.opencontainers.image.$label_name\"}}" "$TAG")" ]
    done
    say "labelled"
    # a requested GPU that is missing, and too little memory, stop the run at the start
    refused '--gpus all' engine run --rm --network none -v "$data:/data:ro" "$TAG" /data /tmp/out \
        participant --device cuda
    refused 'not enough memory' engine run --rm --network none --memory 2g -v "$data:/data:ro" \
        "$TAG" /data /tmp/out participant
    out=$WORK/out-image
    folder "$out"
    SECONDS=0
    # shellcheck disable=SC2086
    engine run --rm --network none "${read_only[@]}" --user 12345:12345 --memory 4g \
        -v "$data:/data:ro" -v "$out:/out" "$TAG" /data /out participant \
        --participant-label "$label" $OPTIONS
    check "$out"
    say "image: restored in $SECONDS s as user 12345, read-only root, 4 GiB, no network: $out"
fi

if [[ $parts == *sif* ]]; then
    SECONDS=0
    [ "${BUILD:-1}" = 0 ] || { build_sif; say "SIF $sif: built and self-tested in $SECONDS s"; }
    say "SIF $sif: $(($(stat -c %s "$sif") / 1000000)) MB"
    chmod 755 "$sif"
    out=$WORK/out-sif
    folder "$out"
    SECONDS=0
    refused '--nv' run_sif --bind "$data:/data:ro" "$sif" /data /tmp/out participant --device cuda
    # shellcheck disable=SC2086
    run_sif --bind "$data:/data:ro,$out:/out" "$sif" /data /out participant \
        --participant-label "$label" $OPTIONS
    check "$out"
    say "SIF: restored in $SECONDS s as an ordinary user, --containall, no network: $out"
fi
say "passed"
