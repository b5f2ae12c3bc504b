#!/usr/bin/env python3
"""Can the tests fail? Breaks the program on purpose, one place at a time, and shows which tests notice.

    dev/test/breaks.py [WORD ...]      all breaks, or those whose names contain one of the words

Each break is made in a copy. `worst` is by how many times the worst of the dumps exceeds its tolerance.
Exit status 1 if a break goes unnoticed or exceeds it by less than ten times.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from places import choose, find

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "train_gpt2.cpp"

# name: (function, fragment of it, what replaces the fragment); see places.py
BREAKS = {
    "depth: δ dropped from ds": ("depth_backward", "- delta", ""),
    "depth: own ds forgotten": ("depth_backward", "ds_own -= ds_j;", ""),
    "depth: dv not passed on to the first source": ("depth_backward", "+= a_ml", "+= (n ? a_ml : 0)"),
    "depth: dk not passed on to the last source": ("depth_backward", "+= ds_ml", "+= (n + 1 < S_m ? ds_ml : 0)"),
    "depth: a and ds of the wrong layer": ("depth_backward", "if (m > 1)", "if (m > 2)"),
    "depth: mixes k, not ṽ, of the source": ("depth_forward", "v_j = v_l", "v_j = k_l"),
    "skip: the share of the layer's own heads forgotten": (
        "skip_backward", "if (from_own && from_above)", "if (from_own && from_above && false)"),
    "skip: dk, dv taken from the wrong layer": ("skip_attention_backward", "m.skip_dkv[l]", "m.skip_dkv[l + 1]"),
    "skip: dk, dv left for the wrong layer": (
        "skip_attention_backward", "m.skip_dkv[l - c.skip_distance]", "m.skip_dkv[l - c.skip_distance + 1]"),
    "skip: one head too many": ("skips", "h < c.skip_heads", "h <= c.skip_heads"),
    "qkv: the second piece of dx overwrites": ("qkv_backward", "first, last)", "true, last)"),
    "LayerNorm: mean term of backward": ("layernorm_backward", "- g_mean", ""),
    "LayerNorm: variance term of backward": ("layernorm_backward", "- n * gn_mean", ""),
    "GELU: derivative without its second term": ("gelu_derivative", "+ x * s * (1.0f - s) * dz", ""),
    "GELU: derivative of x³ without the 3": ("gelu_derivative", "3.0f *", ""),
    "embedding: its share of the tied gradient": ("embedding_backward", "dwte_bt[i] += ", "dwte_bt[i] += 0 * "),
    "classifier: a padded column takes probability": (
        "softmax_cross_entropy", "i < V; i++) sum", "i < (logits[V] = 0, V + 1); i++) sum"),
    "AdamW: no bias correction": ("update", "1.0 / (1.0 - pow(a.beta1, step))", "1.0"),
    "AdamW: decay on a bias": ("update", "t.decays ?", "t.decays || t.cols == 1 ?"),
    "attention: last partial tile of queries, forward": (
        "attention_head_forward", "i0 < queries", "i0 + NR <= queries"),
    "attention: last partial tile of queries, backward": ("attention_head_backward", "i0 < T", "i0 + NR <= T"),
    "attention: last partial tile of keys": (
        "attention_head_forward", "keys = std::min(visible - j0, KEYS<X>);",
        "keys = KEYS<X>; if (j0 + keys > visible) break;"),
    "attention: sum not rescaled": ("attention_head_forward", "sum[lane] *= rescale[lane];", ""),
    "attention: sees one key ahead": ("scores_tile", "j0 + r - i0, NR", "j0 + r - i0 - (j0 + r > i0), NR"),
    "matmul: the last of many k forgotten": ("matmul", "n * S, S,", "n * S, K > 100 ? S - 1 : S,"),
    "decoding: the last columns of a stream forgotten": (
        "matmul_few_rows", "i < columns", "i + (i0 > 0) < columns"),
    "decoding: k past the last whole vector forgotten": ("matmul_few_rows", "if (k < K)", "if (k < K && false)"),
    "decoding: the last keys forgotten": ("attention_head_decode", "(; j < keys", "(; j + 1 < keys"),
    "decoding: other values are mixed": ("depth_forward", "t = shape.before + i", "t = i"),
    "decoding: keys overwrite the first ones": ("cache_append", "k.at(b, h, s.before + i)", "k.at(b, h, i)"),
    "gradients: the second micro-batch overwrites": ("backward", "add = m.accumulated > 0", "add = false"),
    "gradients: the second chunk of tokens overwrites": ("linear_backward_weight", "add || r > 0", "add"),
    "classifier: the second chunk of tokens overwrites": ("classifier", "add || r > 0", "add"),
    "classifier: the second chunk of the vocabulary overwrites": ("classifier", "v == 0", "true"),
    "files: the second chunk of values is lost": ("read_quantity", "model_put(", "if (begin == 0) model_put("),
    "files: gaps between layers forgotten": ("for_each_contiguous", "l * t.stride()", "l * t.layer_size()"),
    "positions: gradient of the last sequence only": ("embedding_backward", "add || bt >= T", "add"),
}


def main():
    chosen = choose(SOURCE, BREAKS, sys.argv[1:])
    source = SOURCE.read_text()
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("test_gpt2.cpp", "Makefile"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "dev/reference", folder / "dev/reference")
        for name, (function, fragment, broken) in chosen.items():
            (begin, end), = find(source, function, fragment)
            (folder / "train_gpt2.cpp").write_text(source[:begin] + broken + source[end:])
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
