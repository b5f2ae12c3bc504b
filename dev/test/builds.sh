#!/usr/bin/env bash
# Builds with every compiler found here, for several instruction sets, and runs test_gpt2: a line each with the
# compiler, what make was told, the number of warnings and test_gpt2's last line. Exit status 1 if one does not build,
# warns or fails. What is not installed, or needs another processor, is left out with a line.
#
#     make -C dev test-builds
#
# Debian has nearly all of it: apt-get install clang libomp-dev g++-aarch64-linux-gnu qemu-user. Programs for macOS are
# only built: with the cross compiler in PyPI's ziglang (.venv/bin/pip install ziglang).
set -uo pipefail
cd "$(dirname "$0")/../.."
checkout=$PWD folder=$(mktemp -d) bad=0
trap 'rm -rf "$folder"' EXIT
ln -s "$checkout"/{Makefile,dev,train_gpt2.cpp,test_gpt2.cpp} "$folder"  # what is built lies beside these links
cd "$folder" || exit 1
export OMP_WAIT_POLICY=passive  # spares the programs their second start, which is not emulated

found() { command -v "$1" >/dev/null || { echo "$1 is not installed: $2 left out"; false; }; }

line() {  # line WHAT RESULT EXPECTED: prints the first two, and counts a result that does not match
    printf '%-52s %s\n' "$1" "$2"
    [[ $2 == $3 ]] || bad=$((bad + 1))
}

builds() {  # builds WHAT TARGETS VARIABLE...: whether they can be built; sets `warnings`
    make -f dev/Makefile $2 "${@:3}" >log 2>&1 || { line "$1" "does not build: $(grep -m 1 error log)" ""; return 1; }
    warnings=$(grep -c 'warning:' log) || true  # grep's status: whether there are any
}

tested() {  # tested EMULATOR TARGETS VARIABLE...: builds the targets and runs the last
    local what="${*:3}${1:+, ${1%% *}}" program=${2##* } last
    [ "$program" = test_gpt2 ] || what+=", $program"
    builds "$what" "$2" "${@:3}" || return
    last=$($1 "./$program" 2>&1 | tail -n 1)
    [[ $last == *"processor lacks"* ]] && echo "$what: left out, this processor lacks it" && return
    line "$what" "$warnings warnings, $last" '0 warnings, * passed, 0 failed'
}

refused() {  # refused PROCESSOR VARIABLE...: one line, and status 1, on a processor that lacks what it was built for
    builds "${*:2}" train_gpt2 "${@:2}" || return
    local said=$(qemu-x86_64 -cpu "$1" ./train_gpt2 describe 2>&1 | grep -v TCG; echo "status ${PIPESTATUS[0]}")
    line "${*:2}, on $1" "$warnings warnings, ${said//$'\n'/, }" '0 warnings, error: * processor lacks: *, status 1'
}

for CXX in g++ clang++; do
    found $CXX "what it builds" || continue
    tested "" "train_gpt2 test_gpt2" CXX=$CXX
    tested "" "train_gpt2 test_gpt2" CXX=$CXX OPENMP=
    [ "$(uname -m)" = x86_64 ] || continue
    for level in -v4 -v3 ""; do tested "" test_gpt2 CXX=$CXX ARCH=-march=x86-64$level; done
    tested "" test_gpt2_amx CXX=$CXX
    tested "" test_gpt2_amx CXX=$CXX ARCH=-march=x86-64-v3
    found qemu-x86_64 "processors that lack instructions" || continue
    refused Haswell CXX=$CXX ARCH=-march=x86-64-v4
    refused Nehalem CXX=$CXX ARCH=-march=x86-64-v3
done
found aarch64-linux-gnu-g++ aarch64 && found qemu-aarch64 aarch64 &&
    tested "qemu-aarch64 -L /usr/aarch64-linux-gnu" test_gpt2 CXX=aarch64-linux-gnu-g++ ARCH=-march=armv8-a
zig=$(for python in "$checkout/.venv/bin/python" python3; do
    "$python" -m ziglang version >/dev/null 2>&1 && echo "$python -m ziglang c++" && break
done)
[ -n "$zig" ] || echo "PyPI's ziglang is not installed: macOS left out"
for target in ${zig:+aarch64-macos x86_64-macos}; do
    builds "$target" "train_gpt2 test_gpt2" CXX="$zig -target $target" ARCH= OPENMP= || continue
    line "$target" "$warnings warnings, magic number $(head -c 4 test_gpt2 | od -An -tx4)" '0 warnings, * feedfacf'
done
[ $bad = 0 ]
