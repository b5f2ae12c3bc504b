#!/usr/bin/env python3
"""Can the tests fail? Breaks the program on purpose, one place at a time, and shows which tests notice.

    dev/test/breaks.py [WORD ...]      all breaks, or those whose names contain one of the words

Each break is made in a copy. `worst` is by how many times the worst of the dumps exceeds its tolerance.
Exit status 1 if a break goes unnoticed, or if only the dumps notice it and by less than ten times. Breaks of pairs have
an effect only where the processor multiplies pairs of bf16 (AVX-512 with bf16).
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
    "depth: δ dropped from ds": ("depth_backward", "- delta[h]", ""),
    "depth: own ds forgotten": ("depth_backward", "ds_own -= ds_l[n * NH + h];", ""),
    "depth: dv not passed on to the first source": ("depth_backward", ", a_ml,", ", n ? a_ml : 0,"),
    "depth: dk not passed on to the last source": ("depth_backward", ", ds_ml,", ", n + 1 < S_m ? ds_ml : 0,"),
    "depth: a and ds of the wrong layer": ("depth_backward", "if (m > 1)", "if (m > 2)"),
    "depth: mixes k, not ṽ, of the source": ("depth_forward", "v_j = v.at", "v_j = k.at"),
    "skip: the share of the layer's own heads forgotten": (
        "skip_backward", "if (from_own && from_above)", "if (from_own && from_above && false)"),
    "skip: dk, dv taken from the wrong layer": ("skip_attention_backward", "? m.skip_dkv[«l»]", "l + 1"),
    "skip: dk, dv left for the wrong layer": (
        "skip_attention_backward", "m.skip_dkv[j]", "m.skip_dkv[j + 1]"),
    "skip: one head too many": ("skips", "h < c.skip_heads", "h <= c.skip_heads"),
    "qkv: the second piece of dx overwrites": ("qkv_backward", "first, last)", "true, last)"),
    "LayerNorm: mean term of backward": ("layernorm_backward", "- g_mean", ""),
    "LayerNorm: variance term of backward": ("layernorm_backward", "- n * gn_mean", ""),
    "GELU: derivative without its second term": ("gelu", "+ x * s * (1.0f - s) * dz", ""),
    "GELU: derivative of x³ without the 3": ("gelu", "3.0f *", ""),
    "embedding: its share of the tied gradient": ("embedding_backward", "dwte_bt[i] += ", "dwte_bt[i] += 0 * "),
    "classifier: a padded column takes probability": (
        "softmax_cross_entropy", "i < std::min(V, begin + 1024)", "i < (logits[V] = 0, std::min(V + 1, begin + 1024))"),
    "AdamW: no bias correction": ("update", "1.0 / (1.0 - pow(a.beta1, step))", "1.0"),
    "AdamW: decay on a bias": ("update", "t.decays ?", "t.decays || t.cols == 1 ?"),
    "attention: last partial tile of queries, forward": (
        "attention_head_forward", "i0 < queries", "i0 + NR <= queries"),
    "attention: last partial tile of queries, backward": ("attention_head_backward", "i0 < T", "i0 + NR <= T"),
    "attention: the last key of a partial tile": (
        "for_key_tiles", "std::min(end - j0, KEYS<X>)", "std::min(end - j0 - (KEYS<X> > end - j0), KEYS<X>)"),
    "attention: keys after those of the first strip": ("for_key_tiles", "j0 = end;", ""),
    "attention: pairs, a strip ends within one": (
        "for_key_tiles", "round_up(i0 + first + STRIP, PER)", "i0 + first + STRIP"),
    "attention: scores of the strip's first query": ("scores_tile", "q«.from_n(first)»", ""),
    "attention: dk from the strip's first query on": (
        "attention_head_backward", "q_rows.from_k(«first»)", "0"),
    "attention: one running maximum of four": ("maxima", "i < 4", "i < 3"),
    "attention: sum not rescaled": ("attention_head_forward", "load(sum + lane) «* load(rescale + lane)»", ""),
    "attention: o not rescaled": ("attention_head_forward", "load(o_i) «* rescale[i]»", ""),
    "attention: values of the first tile's keys": ("attention_head_forward", "v_rows.from_k(«j0»)", "0"),
    "attention: δ of the last query of a vector": (
        "attention_head_backward", "std::min(n, lane + LANES)", "std::min(n, lane + LANES - 1)"),
    "attention: δ of channels past the last whole vector": (
        "attention_head_backward", "load(o[i0 + i] + d, HS - d)", "(d + LANES > HS ? vec{} : load(o[i0 + i] + d))"),
    "attention: sees one key ahead": ("scores_tile", "j0 + r - i0, NR", "j0 + r - i0 - (j0 + r > i0), NR"),
    "matmul: the last of many k forgotten": ("matmul", "steps<X>(k_count)«, add»", "- (k0 > 0), add"),
    "matmul: a chunk of k overwrites those before": ("matmul", "add = «k0 > 0»", "k0 > k_chunk"),
    "matmul: sums stored after each chunk of k": ("matmul", "finish = «k0 + k_count == K»", "true"),
    "matmul: sums that wait for the next chunk, the wrong rows": ("matmul", "chunks > 1 ? «m» : 0", "m / 2"),
    "matmul: results depend on what is only prefetched": (
        "matmul", "«finish» && i < tile_m; i++)\n                            for (size_t j = 0; j < tile_n; j += LANES",
        "finish && !also_read"),
    "matmul: sums in place forget what was there": ("matmul", "add || store.add", "add"),
    "matmul: the last row of a tile of three": ("multiply_tile", "rows < R", "rows < R || R == 3"),
    "matmul: a single column in a tile's last vector": (
        "multiply_tile", "columns <= (V - 1) * LANES", "columns <= (V - 1) * LANES + 1"),
    "matmul: B in place, distance of its rows": ("cells_of_B", "return {b.data, «b.stride»", "n"),
    "matmul: pairs, distance of B's panels": ("cells_of_B", "NR * steps<X>(K)}", "NR * K}"),
    "matmul: pairs, odd K of A in place": ("cells_of_A", "K % PER == 0 &&", ""),
    "matmul: pairs, odd distance of rows of A in place": ("cells_of_A", "a.stride % PER == 0 &&", ""),
    "matmul: pairs, distance of rows of A in place": ("cells_of_A", "a.stride / (a.along_k ? PER : 1)", "a.stride"),
    "matmul: pairs, odd K across k": ("cells_across_k", "remaining > 1", "true"),
    "vectors: largest value past the last whole vector": ("maximum", "i < n; i++", "i + 1 < n; i++"),
    "attention: whole vectors of o past a row's end": (
        "attention_head_forward", "«HS - d»);\n        for (size_t i", "LANES"),
    "vectors: bf16 rounds ties down": ("rounded", "+ (b >> 16 & 1)", ""),
    "vectors: bf16's NaN": ("rounded", "(nan & 0x7fc00000) | (~nan & up & 0xffff0000)", "up & 0xffff0000"),
    "vectors: a partial load forgets its last value": ("load", "n * sizeof *p", "(n - (n > 1)) * sizeof *p"),
    "vectors: a partial store forgets its last value": (
        "store", "all, n * sizeof *p", "all, (n - (n > 1)) * sizeof *p"),
    "exp: 0 below": ("exp_approx", "x < zero - 87.0f ? zero :", ""),
    "exp: most above": ("exp_approx", "x > most ? most : x", "x"),
    "exp: ln 2 in one part": ("exp_approx", "- n * -2.12194440e-4f", "+ n * 2.12e-4f"),
    "threads: more than allowed": ("next", "std::min(2 * threads, most)", "2 * threads"),
    "threads: a slower trial is kept": ("next", "else threads = settled;", ""),
    "threads: a faster trial is not kept": (
        "next", "faster = !slower && median < 0.95 * settled_time", "faster = false"),
    "threads: more are never tried again": ("next", "threads == most || (threads > 1 && !fewer)", "threads > 1"),
    "threads: trials do not become rarer": ("next", "2 * interval, 512", "interval, 512"),
    "threads: a slower trial goes on": ("next", "on_trial && step > 1 && time > 1.5 * settled_time", "false"),
    "threads: slower steps bring no trial": ("next", "|| (step > 4 && median > 2 * settled_time)", ""),
    "threads: only the update is timed": (
        "global_norm", "choose_threads();", "pass_start = seconds(), choose_threads();"),
    "decoding: the last columns of a stream forgotten": (
        "matmul_few_rows", "i < columns", "i + (i0 > 0) < columns"),
    "decoding: k past the last whole vector forgotten": ("matmul_few_rows", "«k < K»; k += STEP", "k + STEP <= K"),
    "decoding: the last keys forgotten": (
        "attention_head_decode", "«j < keys»; j++)\n        for (size_t d", "j + 1 < keys"),
    "decoding: other values are mixed": ("depth_forward", "t = shape.before + i", "t = i"),
    "decoding: keys overwrite the first ones": ("cache_append", "k.at(b, h, s.before + i)", "k.at(b, h, i)"),
    "gradients: the second micro-batch overwrites": ("backward", "add = m.accumulated > 0", "add = false"),
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
            try:
                run = subprocess.run(["./test_gpt2"], cwd=folder, capture_output=True, text=True, timeout=600)
            except subprocess.TimeoutExpired:
                print(f"{name}: does not end", flush=True)
                continue
            failed = re.findall(r"^FAILED +(.*)", run.stdout, re.MULTILINE)
            ratios = [float(r) for r in re.findall(r"worst error (\S+) of its tolerance", run.stdout)]
            worst = max(ratios, default=0)
            tests = sorted({re.split(r"[:/]", f)[0] if "dev/reference" not in f else "dumps" for f in failed})
            crashed = run.returncode not in (0, 1)
            noticed = crashed or run.returncode != 0 and (worst >= 10 or failed and tests != ["dumps"])
            unnoticed += not noticed
            print(f"{'' if noticed else 'UNNOTICED '}{name}: {'crashed, ' * crashed}{len(failed)} tests failed, "
                  f"worst {worst:.3g}: {', '.join(tests)}", flush=True)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
