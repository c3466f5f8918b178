#!/bin/sh
# Builds the kernels with one deliberate defect each and expects matmul_test to notice it in every
# kernel that has it: narrow ones (M 1, M 2) and tiles of many rows (M 66), type by type.
#
# usage: tests/cpp/mutation.sh BUILD_FOLDER [--aarch64]
#   --aarch64   the ARM kernels, cross-compiled and emulated: only the test with extreme inputs
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:?usage: mutation.sh BUILD_FOLDER [--aarch64]}

# Table, type and M that must fail. Centred sums of 4 bits (q4_0) and uncentred ones of 2 and 3 hold
# twice the depth, and VNNI and sdot sums are int32: none of these can be too deep by one. ARM's narrow
# kernels take codes as they are, so q4_0 is full there; its tiles take them centred, and there "seed" forgets
# the centre. With few rows i8mm runs what dotprod does.
expected() {
  case $1 in
  depth)
    for kernel in "q4_1 1" "q4_1 66" "q5_0 1" "q5_0 66" "q5_1 1" "q8_0 1" "q8_0 13" "q4_k 1" "q4_k 66" "q5_k 1" \
      "q5_k 66" "q6_k 1" "q6_k 66"; do
      echo "avx2 $kernel, neon $kernel,"
    done
    echo "neon q4_0 1, neon q5_1 66, neon q8_0 66"
    ;;
  seed)
    for kernel in "q4_0 1" "q4_0 66" "q5_0 1" "q5_0 66" "q5_1 1" "q5_1 66" "q3_k 1" "q3_k 66" "q6_k 1" "q6_k 66"; do
      echo "avx2 $kernel,"
    done
    for kernel in "q4_0 2" "q4_0 66" "q5_0 1" "q5_0 66" "q8_0 2" "q8_0 66" "q3_k 1" "q3_k 66" "q6_k 1" "q6_k 66"; do
      echo "avx512vnni $kernel,"
    done
    for kernel in "q4_0 1" "q4_0 66" "q5_0 1" "q5_0 66" "q8_0 1" "q8_0 66" "q3_k 1" "q3_k 66" "q6_k 1" "q6_k 66"; do
      echo "avxvnni $kernel,"
    done
    for kernel in "q4_0 1" "q4_0 8" "q5_0 1" "q5_0 8" "q3_k 1" "q3_k 8" "q6_k 1" "q6_k 8"; do
      echo "neon $kernel, dotprod $kernel,"
    done
    for kernel in "q4_0 66" "q5_0 66" "q3_k 66" "q6_k 66"; do
      echo "neon $kernel, dotprod $kernel, i8mm $kernel,"
    done
    ;;
  clamp)
    echo "avx2 q5_0 1, avx2 q5_0 66, avx2 q8_0 1, avx2 q8_0 13, avx2 q6_k 1, avx2 q6_k 66,"
    echo "neon q5_0 66, neon q8_0 1, neon q8_0 66, neon q6_k 66"
    ;;
  esac
}

# $1: the folder of a build
run_test() {
  if [ "$kind" = --aarch64 ]; then
    POTLUCK_SHORT_TESTS=1 qemu-aarch64-static -L /usr/aarch64-linux-gnu "$1/matmul_test" ExtremeCodes
  else
    "$1/matmul_test"
  fi
}

kind=${2:-}
set --
[ "$kind" != --aarch64 ] || set -- --toolchain aarch64.cmake
case $kind$(uname -m) in
--aarch64* | aarch64 | arm64) tables="neon dotprod i8mm" ;;
*) tables="avx2 avxvnni avx512vnni" ;;
esac
missed=0
for mutation in depth seed clamp; do
  folder="$build/$mutation"
  if [ ! -f "$folder/build.ninja" ]; then # not configured, or only half
    rm -rf "$folder"
    cmake -S "$root/cpp" -B "$folder" -G Ninja -DPOTLUCK_TESTS=ON -DPOTLUCK_MODULE=OFF "-DPOTLUCK_MUTATION=$mutation" "$@" > /dev/null
  fi
  cmake --build "$folder" --target matmul_test -j 2 > "$folder/build.log" 2>&1 || {
    tail -n 20 "$folder/build.log"
    exit 2
  }
  run_test "$folder" > "$folder/test.log" 2>&1 || true
  noticed=0
  lacking=
  for table in $tables; do
    grep -q "^tried $table\$" "$folder/test.log" || lacking="$lacking $table"
  done
  for kernel in $(expected "$mutation" | sed 's/, */,/g; s/ /:/g' | tr ',\n' '  '); do
    table=${kernel%%:*}
    rest=${kernel#*:}
    case " $tables " in *" $table "*) ;; *) continue ;; esac  # of another kind of CPU
    case "$lacking " in *" $table "*) continue ;; esac
    if grep -q "other bits: $table ${rest%:*} K [0-9]* M ${rest#*:} " "$folder/test.log"; then
      noticed=$((noticed + 1))
    else
      echo "mutation $mutation: NOT noticed in $table ${rest%:*} at M = ${rest#*:}"
      missed=1
    fi
  done
  echo "mutation $mutation: noticed in $noticed kernels${lacking:+; not tried, for this CPU lacks them:$lacking}"
  [ "$noticed" -gt 0 ] || missed=1
done
exit $missed
