# Sourced by the other scripts: makes .venv with the tested releases, once, and puts it first on PATH.
# AHRIUWU_EXTRAS chooses the optional parts; a change of pyproject.toml or constraints.txt installs anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${AHRIUWU_EXTRAS:-doom}
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
marker=.venv/.installed-$extras-$stamp
if [ ! -f "$marker" ]; then
  python=${PYTHON:-python3}
  command -v "$python" > /dev/null || { echo "error: there is no $python: set PYTHON to a Python of 3.11 or newer" >&2; exit 2; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than 3.11: set PYTHON to a newer one" >&2; exit 2; }
  echo "making .venv with extras [$extras] (a minute or two, once)" >&2
  find .venv -maxdepth 1 -name '.installed-*' ! -name "*-$stamp" -delete 2> /dev/null || true # of other releases
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv .venv # not there, or killed as it was made
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
  touch "$marker"
fi
export PATH="$PWD/.venv/bin:$PATH"
