#!/usr/bin/env bash
# The tests of the torch-free core where an ordinary build does not reach: under the address and
# undefined behaviour sanitizers, and for 64-bit Arm (NEON), emulated by qemu. CI runs this after
# scripts/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
firstlm_environment test

# build_core FOLDER CMAKE-ARGUMENTS...
build_core() {
  local folder=$1
  shift
  cmake -S . -B "$folder" -G Ninja -DFIRSTLM_BUILD_BINDINGS=OFF -DFIRSTLM_BUILD_TESTS=ON "$@"
  cmake --build "$folder"
}

say "Catch2 under the address and undefined behaviour sanitizers"
# Release's -O3 holds: it comes after these flags.
build_core build/tests-sanitized \
  "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
build/tests-sanitized/firstlm_tests

say "Catch2 on 64-bit Arm, emulated"
command -v aarch64-linux-gnu-g++ >/dev/null || apt_install g++-aarch64-linux-gnu
command -v qemu-aarch64 >/dev/null || apt_install qemu-user
build_core build/tests-aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
# The emulator does not survive threads in the child of a program that has threads.
qemu-aarch64 build/tests-aarch64/firstlm_tests "~[fork]"
# A processor without NEON's dot products gets the portable kernels.
qemu-aarch64 -cpu cortex-a72 build/tests-aarch64/firstlm_tests "tables are found by name*"
