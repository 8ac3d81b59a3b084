# Sourced by quickstart.sh and test.sh: enter a Python environment that holds what a requirements file pins.
#
# It is the environment that MARTEN_VENV names, else the active one, else .venv, which is made where there is none.
# What was installed is remembered in it by a checksum, so that a second run takes no time.

say() { printf '%s\n' "$@"; }
die() { printf 'marten: %s\n' "$*" >&2; exit 1; }

find_python() {
  # The newest of the usual names that is 3.11 or later and can make environments.
  local name found="" version
  for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    [ -n "$name" ] && version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { found="$name is Python $version"; continue; }
    "$name" -c 'import ensurepip, venv' 2>/dev/null || {
      found="$name (Python $version) cannot make environments: apt-get install python$version-venv"; continue
    }
    printf '%s' "$name"
    return
  done
  die "Python 3.11 or newer is needed; ${found:-there is no python3: apt-get install python3 python3-venv}"
}

enter_environment() {
  local requirements=$1 folder=${MARTEN_VENV:-${VIRTUAL_ENV:-.venv}} python stamp wanted
  if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    [ "$folder" = .venv ] || die "no Python environment with pip in $folder"
    python=$(find_python)
    say "Making the Python environment .venv with $python ($("$python" --version))"
    "$python" -m venv --clear .venv || die "$python -m venv failed: apt-get install python3-venv"
  fi
  folder=$(cd "$folder" && pwd)
  export VIRTUAL_ENV=$folder PATH="$folder/bin:$PATH"
  stamp="$folder/.marten-$(basename "$requirements")"
  wanted=$(cat requirements*.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "Installing $requirements into $folder: PyTorch and its CUDA libraries are some 3 GB the first time"
    "$folder/bin/python" -m pip install --disable-pip-version-check -r "$requirements" \
      || die "pip could not install $requirements; the lines above say why"
    printf '%s' "$wanted" >"$stamp"
  fi
}
