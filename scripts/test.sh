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

install_catch2() {
  has_catch2 && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing Catch2"
    apt-get install -y catch2 || { apt-get update && apt-get install -y catch2; }
  else
    fail "Catch2 was not found; on Debian and Ubuntu: sudo apt-get install catch2"
  fi
}

firstlm_environment test
install_catch2

say "Catch2: the core, on every instruction set of this machine"
cmake -S . -B build/tests -G Ninja -DFIRSTLM_BUILD_BINDINGS=OFF -DFIRSTLM_BUILD_TESTS=ON
cmake --build build/tests
build/tests/firstlm_tests

say "pytest"
python -m pytest "$@"
