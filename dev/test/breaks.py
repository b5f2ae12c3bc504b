#!/usr/bin/env python3
"""Can the tests fail? Breaks the program on purpose, one line at a time, and shows which tests notice.

    dev/test/breaks.py [WORD ...]      all breaks, or those whose names contain one of the words

Each break is made in a copy; `worst` is by how many times the worst of the dumps misses its tolerance.
Exit status 1 if a break goes unnoticed or misses by less than ten times.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "train_gpt2.cpp"

# name: (line as it is, line as broken)
BREAKS = {
    "depth: δ dropped from ds": ("(dot(dv, v_j, HS) - delta)", "(dot(dv, v_j, HS))"),
    "depth: own ds forgotten": ("ds_own -= ds_j;", "ds_own -= 0 * ds_j;"),
    "depth: dv not passed on to the first source": (
        "dv[i] += a_ml * dv_m[i]", "dv[i] += (reader.n ? a_ml : 0) * dv_m[i]"),
    "depth: dk not passed on to the last source": (
        "dk[i] += ds_ml * q_m[i]", "dk[i] += (reader.n + 1 < reader.sources ? ds_ml : 0) * q_m[i]"),
    "depth: mixes v, not ṽ, of the source": ("return qkv[sources[n]] + at_v;", "return qkv[sources[n]] + at_k;"),
    "skip: the share of the layer's own heads forgotten": ("if (own && above)", "if (own && above && false)"),
    "skip: dk, dv taken from the wrong layer": ("m.skip_dkv + l % slots", "m.skip_dkv + (l + 1) % slots"),
    "skip: dk, dv left for the wrong layer": ("m.skip_dkv + below % slots", "m.skip_dkv + (below + 1) % slots"),
    "skip: one head too many": ("h < c.skip_heads && l", "h <= c.skip_heads && l"),
    "LayerNorm: mean term of backward": ("s * (g - g_mean - n * gn_mean)", "s * (g - n * gn_mean)"),
    "LayerNorm: variance term of backward": ("s * (g - g_mean - n * gn_mean)", "s * (g - g_mean)"),
    "GELU: derivative without its second term": ("return s + x * s * (1.0f - s) * dz;", "return s;"),
    "GELU: derivative of x³ without the 3": ("(1.0f + 3.0f * 0.044715f", "(1.0f + 0.044715f"),
    "embedding: its share of the tied gradient": (
        "dwte_bt[i] += dx_bt[i];", "dwte_bt[i] += 0 * dx_bt[i];"),
    "classifier: a padded column takes probability": (
        "softmax_cross_entropy(logits + i * Vp, V,",
        "softmax_cross_entropy(logits + i * Vp, (logits[i * Vp + V] = 0, V + 1),"),
    "AdamW: no bias correction": ("(float)(1.0 / (1.0 - pow(a.beta1, step)))", "1.0f"),
    "AdamW: decay on a bias": ("t.decays ? a.weight_decay : 0.0f", "t.decays || t.cols == 1 ? a.weight_decay : 0.0f"),
    "attention: last partial tile of queries, forward": (
        "for (size_t i0 = 0; i0 < queries; i0 += NR) {", "for (size_t i0 = 0; i0 + NR <= queries; i0 += NR) {"),
    "attention: last partial tile of queries, backward": (
        "for (size_t i0 = 0; i0 < T; i0 += NR) {", "for (size_t i0 = 0; i0 + NR <= T; i0 += NR) {"),
    "attention: last partial tile of keys": (
        "size_t keys = std::min(visible - j0, KEYS<X>);\n            scores_tile(h, keys, j0, before",
        "size_t keys = KEYS<X>;\n            if (j0 + keys > visible) break;\n"
        "            scores_tile(h, keys, j0, before"),
    "attention: sum not rescaled": ("sum[lane] *= rescale[lane];", "sum[lane] *= 1;"),
    "attention: sees one key ahead": (
        "std::min<size_t>(j0 + r - i0, NR)", "std::min<size_t>(j0 + r - i0 - (j0 + r > i0), NR)"),
    "matmul: the last of many k forgotten": (
        "b_block + n * S, S, false);", "b_block + n * S, K > 100 ? S - 1 : S, false);"),
    "decoding: the last columns of a stream forgotten": (
        "for (size_t i = 0; i < columns; i++) {", "for (size_t i = 0; i + (i0 > 0) < columns; i++) {"),
    "decoding: k past the last whole vector forgotten": ("if (k < K) add_products", "if (k < K && false) add_products"),
    "decoding: the last keys forgotten": ("for (; j < keys; j++)", "for (; j + 1 < keys; j++)"),
    "decoding: values are not mixed": ("        cached_depth(m, l, n);\n", ""),
    "gradients: the second micro-batch overwrites": ("bool add = m.accumulated > 0;", "bool add = false;"),
    "gradients: the second slab of tokens overwrites": ("bool add = accumulate || r > 0;", "bool add = accumulate;"),
    "classifier: the second part of the tokens overwrites": ("V, Vp, accumulate || r > 0)", "V, Vp, accumulate)"),
    "classifier: the second slab of the vocabulary overwrites": ("dx_sum, v == 0, v", "dx_sum, true, v"),
    "files: the second chunk of values is lost": (
        "model_put(model, quantity, begin, n, values.data());",
        "if (begin == 0) model_put(model, quantity, begin, n, values.data());"),
    "positions: gradient of the last sequence only": ("bool add = accumulate || bt >= T;", "bool add = accumulate;"),
}


def stale(source, names=BREAKS):
    """The breaks whose line is not in the source, or more than once."""
    return [name for name in names if source.count(BREAKS[name][0]) != 1]


def main():
    source = SOURCE.read_text()
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("test_gpt2.cpp", "Makefile"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "dev/reference", folder / "dev/reference")
        words = sys.argv[1:]
        chosen = {name: b for name, b in BREAKS.items() if not words or any(word in name for word in words)}
        if stale(source, chosen):
            sys.exit(f"error: not one line of train_gpt2.cpp: {'; '.join(stale(source, chosen))}")
        for name, (line, broken) in chosen.items():
            (folder / "train_gpt2.cpp").write_text(source.replace(line, broken))
            build = subprocess.run(["make", "-s", "test_gpt2"], cwd=folder, capture_output=True, text=True)
            if build.returncode:
                sys.exit(f"error: {name}: does not build\n{build.stderr}")
            run = subprocess.run(["./test_gpt2"], cwd=folder, capture_output=True, text=True)
            failed = re.findall(r"^FAILED +(.*)", run.stdout, re.MULTILINE)
            ratios = [float(r) for r in re.findall(r"worst error (\S+) of its tolerance", run.stdout)]
            worst = max(ratios, default=0)
            tests = sorted({re.split(r"[:/]", f)[0] if "dev/reference" not in f else "dumps" for f in failed})
            noticed = run.returncode != 0 and failed and (worst >= 10 or "dumps" not in tests)
            unnoticed += not noticed
            print(f"{'' if noticed else 'UNNOTICED '}{name}: {len(failed)} tests failed, worst {worst:.3g}: "
                  f"{', '.join(tests)}", flush=True)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
