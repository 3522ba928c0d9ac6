# Sourced, from the repository's root, by every script that runs firstlm: makes .venv with torch and
# firstlm in it, native ops built, and puts it first in PATH. What is there already is kept, so a
# second call takes a moment.
#
#   source scripts/environment.sh
#   firstlm_environment        # what a user needs
#   firstlm_environment test   # and what the tests and linters need (an extra of pyproject.toml)
#
# FIRSTLM_TORCH holds pip's arguments for torch. By default, a machine without a GPU gets torch's CPU
# build where one can be had, any other machine what pip chooses.

FIRSTLM_TORCH_VERSION=2.13.0

say() { printf '\n== %s\n' "$*"; }

fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

# apt_install PACKAGE...: for tests; needs root, and says what to install where that is missing.
apt_install() {
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    fail "$* was not found; on Debian and Ubuntu: sudo apt-get install $*"
  fi
  say "Installing $*"
  apt-get install -y "$@" || { apt-get update && apt-get install -y "$@"; }
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python >= 3.11 was found (python3 is $(python3 --version 2>&1))"
}

make_venv() {
  [ -x .venv/bin/pip ] && return
  say "Making .venv"
  "$(find_python)" -m venv .venv ||
    fail "could not make .venv; on Debian and Ubuntu: sudo apt-get install python3-venv"
  .venv/bin/pip install --upgrade pip
}

install_torch() {
  .venv/bin/python -c 'import torch' 2>/dev/null && return
  say "Installing torch"
  if [ -n "${FIRSTLM_TORCH:-}" ]; then
    # shellcheck disable=SC2086  # several arguments are meant to be several
    .venv/bin/pip install $FIRSTLM_TORCH
  elif [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    install_torch_for_cpu
  else
    .venv/bin/pip install "torch==$FIRSTLM_TORCH_VERSION"
  fi
}

# The plain wheel for Linux brings gigabytes of CUDA libraries. The CPU build has a version of its
# own; where pip's indices do not have it, uv knows where torch publishes it.
install_torch_for_cpu() {
  .venv/bin/pip install "torch==$FIRSTLM_TORCH_VERSION+cpu" && return
  .venv/bin/pip install uv &&
    .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu \
      "torch==$FIRSTLM_TORCH_VERSION" && return
  say "No CPU build of torch could be had; installing the plain one"
  .venv/bin/pip install "torch==$FIRSTLM_TORCH_VERSION"
}

# Of everything that an editable install is made from, and of the torch that it was built with.
installation_hash() {
  {
    echo "CUDA: ${FIRSTLM_CUDA:-as torch}"
    .venv/bin/python -c 'import torch; print(torch.__version__, torch.__file__)'
    cat pyproject.toml setup.py CMakeLists.txt
    find csrc -type f | LC_ALL=C sort | xargs cat
  } | cksum
}

install_firstlm() {
  local extra=${1:-} hash stamp
  hash=$(installation_hash)
  stamp=.venv/firstlm-installed${extra:+-$extra}
  if [ -e python/firstlm/_ops.so ] && [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then return; fi
  command -v c++ >/dev/null ||
    fail "no C++ compiler was found; on Debian and Ubuntu: sudo apt-get install g++"
  [ -e "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    fail "Python.h was not found; on Debian and Ubuntu: sudo apt-get install python3-dev"
  say "Building and installing firstlm"
  local requirements
  requirements=$(.venv/bin/python -c '
import tomllib
for requirement in tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]:
    print(requirement)')
  # shellcheck disable=SC2086
  .venv/bin/pip install $requirements
  .venv/bin/pip install --no-build-isolation --editable ".${extra:+[$extra]}"
  # An extra brings all that the plain installation has.
  printf '%s\n' "$hash" | tee .venv/firstlm-installed >"$stamp"
}

firstlm_environment() {
  make_venv
  install_torch
  install_firstlm "${1:-}"
  export PATH="$PWD/.venv/bin:$PATH"
}

# run_pytest ARGUMENTS...: a process a core, each with one thread: the tests' models are too small for
# more. Tests of threads set their own number.
run_pytest() {
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
}
