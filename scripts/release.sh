#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks that the tree can be released, builds the files of a release in dist/, and tests them.
#
#   scripts/release.sh [checks] [packages] [containers]        (default: all)
#
# checks      nothing uncommitted, a section of CHANGELOG.md, no placeholder in publishing.toml; then
#             lint, documentation and the whole test suite. DRAFT=1: the first three only warn
# packages    wheel and sdist; each installed into an environment outside of the checkout that has the
#             locked dependencies and nothing else, where the command and its self-test run; then the
#             descriptors for other platforms
# containers  image and SIF by scripts/test_containers.sh, on the demo head or on DATA and LABEL
#
# OUT (default: dist) is the folder of these files, WORK (default: a new folder, removed at the end)
# that of all others. PYTHON (default: python3) creates the environments. See
# scripts/test_containers.sh for LAB.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
parts=${*:-checks packages containers}
for part in $parts; do
    case $part in checks | packages | containers) ;; *) sed -n '3,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
done
PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-dist}")
if [ -n "${WORK:-}" ]; then
    mkdir -p "$WORK" && WORK=$(realpath "$WORK")
else
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$OUT"
say() { echo "release: $*"; }
version=$(sed -n 's/^version = //p' setup.cfg)
say "brainprior $version, $(git rev-parse --short HEAD 2>/dev/null || echo 'no git')"
problem() {
    [ -n "${DRAFT:-}" ] || [[ $parts != *checks* ]] || { say "$* (DRAFT=1 continues)"; exit 1; }
    say "WARNING: $*"
}
[ -z "$(git status --porcelain 2>/dev/null)" ] || problem "the tree has changes that are not committed"
grep -q "^## \[$version\]" CHANGELOG.md || problem "CHANGELOG.md has no section for $version yet"
! grep -Eq '"[^"]*\b[A-Z]{4,}\b' publishing.toml || problem "publishing.toml has placeholders"
for file in CITATION.cff Dockerfile Singularity.def docs/boutiques/brainprior.json; do
    grep -Eq "(version: |VERSION=|\"tool-version\": \")$version\b" "$file" ||
        { say "$file does not name version $version"; exit 1; }
done

if [[ $parts == *checks* ]]; then
    make PYTHON="$PYTHON" lint docs test
fi

env=$WORK/env
# FILE: install it in place of an earlier one, and test it
try() {
    SECONDS=0
    if [ -d "$env" ]; then
        "$env/bin/pip" uninstall --quiet -y brainprior
        "$env/bin/pip" install --quiet --disable-pip-version-check --no-deps "$1"
    else
        "$PYTHON" -m venv "$env"
        "$env/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt "$1"
    fi
    "$env/bin/pip" check
    (
        cd "$WORK" # nothing of the checkout is importable here
        [ "$("$env/bin/brainprior" --version)" = "brainprior $version" ]
        "$env/bin/python" -c 'import brainprior_bids as b; print(b.__file__)' | grep "^$env/"
        "$env/bin/brainprior" selftest --device cpu
    )
    say "$(basename "$1"): installed and self-tested outside of the checkout in $SECONDS s"
}

if [[ $parts == *packages* ]]; then
    "$PYTHON" -m venv "$WORK/tools"
    "$WORK/tools/bin/pip" install --quiet --disable-pip-version-check build twine
    rm -f "$OUT"/brainprior-*.whl "$OUT"/brainprior-*.tar.gz
    # the sdist from the tree, the wheel from the sdist: files missing from the sdist are missing
    # from the wheel too
    "$WORK/tools/bin/python" -m build --outdir "$OUT" . >"$WORK/build.log" 2>&1 ||
        { tail -n 20 "$WORK/build.log"; exit 1; }
    rm -rf build
    "$WORK/tools/bin/twine" check --strict "$OUT"/brainprior-*
    try "$OUT"/brainprior-*.whl
    try "$OUT"/brainprior-*.tar.gz
    rm -rf "$OUT/descriptors"
    "$env/bin/python" scripts/descriptors.py "$OUT/descriptors"
fi

if [[ $parts == *containers* ]]; then
    data=${DATA:-$WORK/bids} label=${LABEL:-01}
    if [ -z "${DATA:-}" ]; then
        [ -d "$env" ] || try .
        (cd "$WORK" && "$env/bin/python" -m brainprior_bids.evaluation.demo "$WORK/bids")
    fi
    TAG=${TAG:-brainprior:$version} SIF=$OUT/brainprior-$version.sif WORK=$WORK/containers \
        scripts/test_containers.sh "$data" "$label"
fi

compgen -G "$OUT/brainprior-*" >/dev/null || { say "passed"; exit; }
cd "$OUT"
find . -maxdepth 1 -name 'brainprior-*' -type f -printf '%f\n' | sort | xargs sha256sum | tee SHA256SUMS
du -h brainprior-* | sed 's/^/release: /'
say "passed"
