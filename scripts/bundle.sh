#!/usr/bin/env bash
# Packs what a GPU host without network needs beside the sources (docs/building-on-a-gpu-host.md): headers and static libraries
# of the packages that setup.sh installs, the CUDA kernels compiled, and programs that check and time them.
#   scripts/bundle.sh [--without-cuda] [FILE]      FILE: dist/sparsek-bundle.tar.gz
set -euo pipefail
cd "$(dirname "$0")/.."
with_cuda=1 output=dist/sparsek-bundle.tar.gz
for argument in "$@"; do
  case "$argument" in
    --without-cuda) with_cuda=0 ;;
    -*) echo "bundle: wanted [--without-cuda] [FILE], found '$argument'" >&2; exit 2 ;;
    *) output=$argument ;;
  esac
done
packages=(libfmt-dev nlohmann-json3-dev libcli11-dev libtomlplusplus-dev libpcre2-dev libutf8proc-dev zlib1g-dev libgtest-dev
          libgmock-dev)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bundle=$work/sparsek-bundle
mkdir -p "$bundle"/{include,lib,licenses}

include=/usr/include lib=$(pkg-config --variable=libdir libpcre2-8)
cp -r "$include"/{fmt,nlohmann,CLI,toml++,gtest,gmock} "$bundle/include/"
cp "$include"/{pcre2.h,utf8proc.h,zlib.h,zconf.h} "$bundle/include/"
cp "$lib"/{libpcre2-8.a,libutf8proc.a,libz.a,libgtest.a,libgtest_main.a,libgmock.a} "$bundle/lib/"
for package in "${packages[@]}"; do cp -L "/usr/share/doc/$package/copyright" "$bundle/licenses/$package"; done
cp LICENSE "$bundle/licenses/sparsek"

if ((with_cuda)); then
  mkdir -p build "$bundle/bin"
  # Headers only: the programs go where there is no libfmt.
  cmake --preset cuda > build/cuda.log 2>&1 || { cat build/cuda.log >&2; exit 1; }
  ninja -C build/cuda -j "${JOBS:-$(nproc)}" bundled >&2
  cudart=$(sed -n 's/^CUDA_cudart_static_LIBRARY:[A-Z]*=//p' build/cuda/CMakeCache.txt)
  cp "$cudart" "$bundle/lib/"
  while read -r file; do
    case "$file" in
      *.a|*.so) cp "$file" "$bundle/lib/" ;;
      *) cp "$file" "$bundle/bin/" ;;
    esac
  done < build/cuda/bundled.txt
  strip --strip-debug "$bundle"/bin/* "$bundle"/lib/libsparsek_*
fi

{
  sed -n 's/^version = "\(.*\)"/sparsek \1/p' pyproject.toml
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$([[ -z "$(git status --porcelain 2>/dev/null)" ]] || echo ' and changes')"
  ((with_cuda)) && echo "cuda_sources $(cmake -DSPARSEK_FINGERPRINT=1 -P cmake/SparsekBundle.cmake)"
  ((with_cuda)) && echo "nvcc $(sed -n 's/^set(CMAKE_CUDA_COMPILER_VERSION "\(.*\)")/\1/p' build/cuda/CMakeFiles/*/CMakeCUDACompiler.cmake)"
  echo "g++ $(g++ -dumpfullversion)"
  dpkg-query -W -f='package ${Package} ${Version}\n' "${packages[@]}"
} > "$bundle/MANIFEST"
cat > "$bundle/README" <<'EOF'
What sparsek's build takes from system packages elsewhere, and its CUDA kernels compiled. Beside a checkout of the commit in
MANIFEST, on a machine with g++, cmake 3.25, ninja and a Python with torch:
  sha256sum -c SHA256SUMS
  cmake --preset cuda -DSPARSEK_BUNDLE=/path/to/this/folder && cmake --build --preset cuda
bin/ holds programs that need a driver alone. docs/building-on-a-gpu-host.md says more.
EOF
(cd "$bundle" && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS)
mkdir -p "$(dirname "$output")"
# The same input gives the same file.
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct 2>/dev/null || echo 0)" -cf - \
  sparsek-bundle | gzip -9n > "$output"
echo "bundle: $output, $(du -h "$output" | cut -f1)"
