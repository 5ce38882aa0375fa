#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets the version. It is read from setup.cfg; the other files that contain it are changed as well.
#
#   scripts/set_version.sh 0.2.0
set -euo pipefail
cd "$(dirname "$0")/.."
new=${1:?version, such as 0.2.0}
old=$(sed -n 's/^version = //p' setup.cfg)
sed -i "s/^version = .*/version = $new/" setup.cfg
sed -i "s/^version: .*/version: $new/" CITATION.cff
sed -i "s/^\(ARG VERSION=\).*/\1$new/" Dockerfile
sed -i "s/^\( *VERSION=\)[0-9].*/\1$new/" Singularity.def
sed -i "s/\"tool-version\": \"[^\"]*\"/\"tool-version\": \"$new\"/; s/\"image\": \"brainprior:[^\"]*\"/\"image\": \"brainprior:$new\"/" \
    docs/boutiques/brainprior.json
echo "$old -> $new; now install it again, and give CHANGELOG.md a section for it"
