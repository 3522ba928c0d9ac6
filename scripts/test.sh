#!/usr/bin/env bash
# Installs what the tests need, if needed, and runs all of them: Catch2 on the torch-free core, then
# pytest. Arguments go to pytest: bash scripts/test.sh tests/test_router_ops.py -k head
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

has_catch2() {
  local header
  for header in catch.hpp catch_all.hpp; do
    echo "#include <catch2/$header>" | c++ -std=c++20 -x c++ -E - >/dev/null 2>&1 && return
  done
  return 1
}

firstlm_environment test
has_catch2 || apt_install catch2

say "Catch2: the core, on every instruction set of this machine"
cmake -S . -B build/tests -G Ninja -DFIRSTLM_BUILD_BINDINGS=OFF -DFIRSTLM_BUILD_TESTS=ON
cmake --build build/tests
build/tests/firstlm_tests

say "pytest"
run_pytest "$@"
