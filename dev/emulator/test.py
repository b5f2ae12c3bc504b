#!/usr/bin/env python3
"""Tests of the emulator: builds test_emulator.cu in three ways and runs each case as it is and broken.

    python3 dev/emulator/test.py [--compiler clang++] [-v] [CASE ...]

A right case must end well in each build, for every seed. A broken one must be caught by the builds for which BROKEN
below has an expectation. Ends in a line `N passed, M failed`. Needs a C++ compiler, nothing else."""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from translate import translate

BUILDS = {  # flags to compile and to link
    "plain": (["-O2"], []),
    "address": (["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
                ["-fsanitize=address,undefined"]),
    "checked": (["-O1", "-fsanitize=thread,alignment"], []),
}
SEEDS = range(1, 6)  # of cases that go the same way for all
MORE_SEEDS = range(1, 21)
WRONG = r"^wrong: "
KERNEL = r"^emulator: kernel .*, block \(\d+,\d+,\d+\), thread \(\d+,\d+,\d+\): "
AT = r"test_emulator\.cu:\d+"
RACE = KERNEL + rf"race: .* at {AT}, which thread \S+ .* at {AT}, with no barrier in between"
BOUNDS = KERNEL + rf"out of bounds: .* at {AT}"
ADDRESS = "^==.*ERROR: AddressSanitizer: "

# What the broken cases show: for `some` seeds, or for all. Builds: plain, address, checked.
SOME = "(some seeds)"
BROKEN = {
    "missing_syncthreads": (SOME + WRONG, SOME + WRONG, RACE),
    "missing_syncwarp": (SOME + WRONG, SOME + WRONG, RACE),
    "race_in_block": (None, None, RACE),
    "race_of_blocks": (None, None, RACE.replace("which thread", r"which thread \S+ of block")),
    "read_of_other_blocks": (SOME + WRONG, SOME + WRONG, RACE),
    "race_of_halves": (SOME + WRONG, SOME + WRONG, RACE),
    "past_the_end": (None, ADDRESS + "heap-buffer-overflow", BOUNDS),
    "past_the_end_of_shared": (None, f"{AT}.*: runtime error: index 8 out of bounds", BOUNDS),
    "past_the_end_of_dynamic": (None, ADDRESS + "use-after-poison", BOUNDS),
    "past_own_array": (None, ADDRESS + f"stack-buffer-overflow|^{AT}.*: runtime error: store to .* insufficient", None),
    "use_after_free": (None, ADDRESS + "heap-use-after-free", BOUNDS),
    "device_memory_uninitialised": (WRONG, WRONG, WRONG),
    "shared_uninitialised": (WRONG, WRONG, WRONG),
    "misaligned_float4": (None, f"{AT}.*: runtime error: .*misaligned address", KERNEL + f"misaligned: .* {AT}"),
    "host_memory_in_kernel": (None, None, KERNEL + rf"out of bounds: .*not device memory.* {AT}"),
    "device_memory_by_host": (None, None, f"^emulator: the host reads device memory at {AT}"),
    "copy_direction": ("^emulator: cudaMemcpyHostToDevice from device to host memory",) * 3,
    "copy_past_the_end": ("^emulator: cudaMemcpy of 33 bytes past the end of an allocation",) * 3,
    "copy_past_pinned": ("^emulator: cudaMemcpy of 36 bytes past the end of an allocation",) * 3,
    "mask_without_caller": (KERNEL + f"__shfl_xor_sync at {AT} has mask 0000ffff, without its own lane",) * 3,
    "shuffle_with_returned": (KERNEL + f"__shfl_xor_sync at {AT} with mask f+ waits for .*, which has returned",) * 3,
    "masks_that_differ": (KERNEL + f"__shfl_xor_sync at {AT} with mask f{{8}} waits for",) * 3,
    "divergent_syncthreads": (KERNEL + f"__syncthreads at {AT} waits for .*, which waits in __syncthreads at",) * 3,
    "syncthreads_with_returned": (KERNEL + f"__syncthreads at {AT} waits for thread .63,0,0., which has returned",) * 3,
    "trap": (r"kernel stop, block \(2,0,0\), thread \(0,3,0\): " + rf"__trap\(\) at {AT}",) * 3,
    "missing_copy_wait": (WRONG, WRONG, WRONG + "|" + RACE),
    "copy_over_what_is_read": (SOME + WRONG, SOME + WRONG, RACE),
    "misaligned_copy": (KERNEL + f"cp_async_16 at {AT}: misaligned",) * 3,
    "misaligned_ldmatrix": (KERNEL + f"ldmatrix_x4 at {AT}: misaligned",) * 3,
    "ldmatrix_not_shared": (KERNEL + f"ldmatrix_x4 at {AT}: its row is not in shared memory",) * 3,
    "matmul": ("^emulator: cuBLASLt: A is not all in device memory",) * 3,
    "matmul_refused": ("^emulator: cuBLASLt: the algorithm of another product",) * 3,
    "matmul_misaligned": ("^emulator: cuBLASLt: A is not at a multiple of 16 bytes, as the heuristic",) * 3,
    "missing_event_wait": (SOME + WRONG,) * 3,
    "default_stream_does_not_wait": (SOME + WRONG,) * 3,
    "pinned_overwritten": (WRONG,) * 3,
    "result_read_early": (WRONG,) * 3,
    "too_many_threads": (AT + r": launch of scale with grid \(1,1,1\), block \(1025,1,1\)",) * 3,
    "capabilities": ("^emulator: GPT2_EMULATOR_CAPABILITY=8.5: not one of those in cuda_emulator.h",) * 3,
    "too_much_shared": ("launch of past_dynamic with 100000 bytes of dynamic shared memory; it may use 49152",) * 3,
}

TRANSLATIONS = [
    ("k<<<1, 2>>>();", '::emulator::Launch("k", __FILE__, __LINE__, 1, 2).run(k);'),
    ("a::k<f<1, 2>, (3 > 2)> <<<g(1, 2), dim3(b[0]), n * 4, s>>> (x, y);",
     '::emulator::Launch("a::k<f<1, 2>, (3 > 2)>", __FILE__, __LINE__, g(1, 2), dim3(b[0]), n * 4, s)'
     '.run(a::k<f<1, 2>, (3 > 2)>, x, y);'),
    ("k<X>\n  <<<g,\n b>>>(\n  x);", '::emulator::Launch("k<X>", __FILE__, __LINE__, \ng,\n b).run(k<X>, \n  x);'),
    ("k /* <<< */ // the\n<<<1, 2>>>(x);", '::emulator::Launch("k", __FILE__, __LINE__, \n1, 2).run(k, x);'),
    ('s = "k<<<1, 2>>>()"; // k<<<\n/* __shared__ */ c = \'"\'; n = 1\'000;', None),
    ("void f() { __shared__ float a[2][N], b; }",
     'void f() { static ::emulator::Shared<float[2][N]> emulated_a{"a", 1}; auto& a = emulated_a.here(); '
     'static ::emulator::Shared<float> emulated_b{"b", 1}; auto& b = emulated_b.here(); }'),
    ("void f() { __shared__ float a[1 << 4], b[N < 3 ? 1 : 2]; }",
     'void f() { static ::emulator::Shared<float[1 << 4]> emulated_a{"a", 1}; auto& a = emulated_a.here(); '
     'static ::emulator::Shared<float[N < 3 ? 1 : 2]> emulated_b{"b", 1}; auto& b = emulated_b.here(); }'),
    ("void f() { extern __shared__ __align__(16) char m[]; }",
     "void f() { char* m = ::emulator::dynamic_shared<char>(); }"),
    ("void f() { alignas(8) static __shared__ P<A, 2> p; }",
     'void f() { static ::emulator::Shared<P<A, 2>> emulated_p{"p", 8}; auto& p = emulated_p.here(); }'),
    ("#include <cuda_bf16.h>\n#include <cublasLt.h>\n#include <vector>\n#pragma unroll 4\n",
     "\n\n#include <vector>\n\n"),
]


class Tests:
    def __init__(self, verbose):
        self.passed = self.failed = 0
        self.verbose = verbose

    def report(self, name, ok, detail=""):
        self.passed += ok
        self.failed += not ok
        if not ok or self.verbose:
            print(f"{'ok    ' if ok else 'FAILED'}  {name}{': ' + detail.strip() if detail else ''}", flush=True)


def run(program, *arguments, **environment):
    environment = {f"GPT2_EMULATOR_{k.upper()}": str(v) for k, v in environment.items()}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=1", **environment})
    return done.returncode, done.stdout + done.stderr


def test_translation(tests, folder):
    source = folder / "a.cu"
    for text, expected in TRANSLATIONS:
        source.write_text(text)
        got = translate(source, set()).split("\n", 1)[1]
        tests.report(f"translation of {text!r}", got == (text if expected is None else expected), got)
    for arguments, message in ((["a.cu", "a.cu"], "a.cu: would be replaced by its own translation\n"),
                               (["none.cu", "a.cpp"], "none.cu: No such file or directory\n"),
                               (["a.cu", "none/a.cpp"], "none/a.cpp: No such file or directory\n")):
        done = subprocess.run([sys.executable, HERE / "translate.py", *arguments], cwd=folder, capture_output=True,
                              text=True)
        refused = done.returncode == 1 and done.stderr == message
        tests.report(f"translate.py {' '.join(arguments)}", refused, done.stderr)
    (folder / "k.cuh").write_text("#pragma once\n#define K k<<<1, 1>>>()")
    (folder / "plain.h").write_text("int x;")
    source.write_text('#include "plain.h"\n#include "k.cuh"\n#include "k.cuh"\nend')
    got = translate(source, set())
    tests.report("translation of included files", got.count("emulator::Launch") == 1 and '#include "plain.h"' in got and
                 got.endswith(f'#line 3 "{source}"\n\nend') and "#pragma once" not in got, got)


def compile_all(compiler, folder, flags=()):
    source, out = folder / "test_emulator.cpp", {}
    os.chdir(HERE)
    source.write_text(translate(pathlib.Path("test_emulator.cu"), set()))
    base = [compiler, "-std=c++20", "-g", "-Wall", "-Wextra", "-include", "cuda_emulator.h", *flags]
    for build, (compiling, linking) in BUILDS.items():
        out[build] = folder / build
        for command in ([*base, *compiling, "-c", source, "-o", f"{out[build]}.o"],
                        [compiler, *linking, f"{out[build]}.o", "-o", out[build]]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or done.stderr:
                sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    source.write_text("__global__ void sum(float* s) { atomicAdd(s, 1.0f); }")
    refused = subprocess.run([*base, "-fsyntax-only", source], capture_output=True, text=True)
    return out, "use of deleted function" in refused.stderr or "call to deleted function" in refused.stderr


def test_case(tests, name, build, program, expected):
    for seed in SEEDS:
        code, output = run(program, name, seed=seed, blocks=1 + seed % 3)
        if code or not output.startswith("right\n"):
            tests.report(f"{name} in the {build} build, seed {seed}", False, f"{code}: {output}")
            return
    tests.report(f"{name} in the {build} build", True)
    if not expected:
        return
    some = expected.startswith(SOME)
    pattern = re.compile(expected.removeprefix(SOME), re.M)
    for seed in MORE_SEEDS if some else SEEDS:
        code, output = run(program, name, "broken", seed=seed)
        found = pattern.search(output)
        if some == bool(code and found):  # the first that is caught, or is not
            break
    tests.report(f"{name}, broken, in the {build} build", bool(code and found),
                 f"seed {seed}: {found[0] if found else output}")


def test_faults(tests, build, program):
    code, output = run(program, "every_call_fails", count=1)
    calls = int(re.search(r"^emulator: (\d+) calls$", output, re.M)[1])
    tests.report(f"calls are counted in the {build} build", code == 0 and calls == 8, output)
    for i in range(1, calls + 1):
        code, output = run(program, "every_call_fails", fail=i)
        tests.report(f"call {i} fails in the {build} build",
                     code == 3 and "stopped: unknown error" in output and f"call {i}, " in output, output)
    for variable, value, message in (
            ("memory", 3999, "out of memory"), ("devices", 0, "no CUDA-capable device is detected"),
            ("devices", -1, "CUDA driver version is insufficient for CUDA runtime version")):
        code, output = run(program, "every_call_fails", **{variable: value})
        ok = code == 3 and output == f"stopped: {message}\n"
        tests.report(f"{variable} {value} in the {build} build", ok, output)
    for variable, value, message in (("memory", "2^34", "no whole number"), ("fail", "1x", "no whole number"),
                                     ("capability", "7.0", "not one of those in cuda_emulator.h"),
                                     ("log", "/none/log", "No such file or directory")):
        code, output = run(program, "every_call_fails", **{variable: value})
        ok = code == 1 and output == f"emulator: GPT2_EMULATOR_{variable.upper()}={value}: {message}\n"
        tests.report(f"{variable} {value!r} in the {build} build", ok, output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--flags", default="", help="further flags for the compiler")
    parser.add_argument("-v", action="store_true", help="a line for each test")
    parser.add_argument("case", nargs="*")
    args = parser.parse_args()
    tests = Tests(args.v)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        test_translation(tests, folder)
        programs, refused = compile_all(args.compiler, folder, args.flags.split())
        tests.report("float atomics do not compile", refused)
        names = run(programs["plain"])[1].split()
        for case in BROKEN.keys() - set(names):
            tests.report(f"{case} is a case", False)
        for i, (build, program) in enumerate(programs.items()):
            for name in args.case or names:
                test_case(tests, name, build, program, BROKEN.get(name, (None,) * 3)[i])
            test_faults(tests, build, program)
    print(f"{tests.passed} passed, {tests.failed} failed")
    return tests.failed > 0


if __name__ == "__main__":
    sys.exit(main())
