#!/bin/sh
# Builds the kernels with one deliberate defect each and expects matmul_test to notice.
#
# usage: tests/cpp/mutation.sh BUILD_FOLDER
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:?usage: mutation.sh BUILD_FOLDER}
missed=0
for mutation in depth seed clamp; do
  folder="$build/$mutation"
  cmake -S "$root/cpp" -B "$folder" -DPOTLUCK_TESTS=ON -DPOTLUCK_MODULE=OFF "-DPOTLUCK_MUTATION=$mutation" > /dev/null
  cmake --build "$folder" --target matmul_test -j 2 > "$folder/build.log" 2>&1 || {
    tail -n 20 "$folder/build.log"
    exit 2
  }
  if "$folder/matmul_test" > "$folder/test.log" 2>&1; then
    echo "mutation $mutation: NOT noticed"
    missed=1
  else
    echo "mutation $mutation: noticed ($(grep -c '^FAILED' "$folder/test.log") tests failed)"
  fi
done
exit $missed
