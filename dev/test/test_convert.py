"""data_prep/convert.py and hellaswag.py, without PyTorch: what they write is what they read, and the program reads it;
what is wrong is said in one line."""

import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib

import pytest
from helpers import (ATTENTIONS, BYTES_AND_END_OF_TEXT, CHANNELS, CONTEXT, EVAL_MAGIC, HEADER_BYTES, HEADS, LAYERS,
                     PARAMETERS, VOCABULARY, WEIGHTS_END, changed, contents, header, heed_signals, tokens_bytes,
                     weights_only, write_tokenizer)
from prepare_helpers import AT_CHANGE, prepared, refused

np = pytest.importorskip("numpy")

VERSION, VOCAB, ATTENTION, SETTINGS = (4 * i for i in (1, 3, 8, 9))  # where in a model's header they are


def run_script(root, name, *arguments, code=None, instant=0, bare=False, before=heed_signals):
    """Runs a script; at its instant-th change of a folder or file, also the code."""
    script = root / "data_prep" / name
    words = [script] if code is None else ["-c", AT_CHANGE, script, code, instant]
    command = [sys.executable, *(["-S"] if bare else []), *words, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, preexec_fn=before, timeout=300)


@pytest.fixture
def convert(root):
    return lambda *arguments, **named: run_script(root, "convert.py", *arguments, **named)


@pytest.fixture
def hellaswag(root):
    return lambda *arguments: run_script(root, "hellaswag.py", *arguments)


def write_safetensors(path, arrays, **metadata):
    entries, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, a) in arrays.items():
        entries[name] = {"dtype": dtype, "shape": a.shape, "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for _, a in arrays.values()))


def read_safetensors(path):
    data = path.read_bytes()
    n, = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8:8 + n])
    assert entries.pop("__metadata__") == {"format": "pt"}  # without it, Transformers refuses the file
    assert max(e["data_offsets"][1] for e in entries.values()) == len(data) - 8 - n
    return {name: (e["dtype"], np.frombuffer(data[8 + n:][slice(*e["data_offsets"])],
                                             {"F32": "<f4", "BF16": "<u2"}[e["dtype"]]).reshape(e["shape"]))
            for name, e in entries.items()}


@pytest.fixture(scope="module")
def folder(root, finished, tmp_path_factory):
    """A model in Hugging Face's form, by attention."""
    out = {attention: tmp_path_factory.mktemp(attention) / "hf" for attention in ATTENTIONS}
    for attention in ATTENTIONS:
        prepared(run_script(root, "convert.py", finished[attention] / "model.bin", out[attention], "--to", "hf"))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_checkpoint_to_hugging_face_and_back(convert, program, folder, finished, tmp_path, attention):
    said = prepared(convert(folder[attention], tmp_path / "back"))
    assert f"{LAYERS} layers, {HEADS} heads, {CHANNELS} channels, context {CONTEXT}, vocabulary 257" in said
    assert sorted(contents(tmp_path / "back")) == ["model.bin", "tokenizer.bin"]
    checkpoint, back = (d / "model.bin" for d in (finished[attention], tmp_path / "back"))
    ours, theirs = checkpoint.read_bytes(), back.read_bytes()
    settings = SETTINGS + 8 * (attention == "depth")  # where those of the attention are
    assert theirs[:SETTINGS] == ours[:SETTINGS] and theirs[settings:][:8] == ours[settings:][:8]
    assert theirs[HEADER_BYTES:WEIGHTS_END] == ours[HEADER_BYTES:WEIGHTS_END]
    assert len(theirs) == WEIGHTS_END + 20  # the program checks the trailer
    arguments = ["generate", "--prompt", "ab", "--tokens", 40, "--model"]
    assert program.run(*arguments, back) == program.run(*arguments, checkpoint)
    shutil.copytree(folder[attention], tmp_path / "copy", dirs_exist_ok=True)
    prepared(convert(back, tmp_path / "copy", "--to", "hf", "--overwrite"))
    assert contents(tmp_path / "copy") == contents(folder[attention])


def test_folder_for_transformers(folder):
    config = {attention: json.loads((folder[attention] / "config.json").read_text()) for attention in ATTENTIONS}
    weights = {attention: read_safetensors(folder[attention] / "model.safetensors") for attention in ATTENTIONS}
    for attention in ATTENTIONS:
        assert len(weights[attention]) == 4 + 12 * LAYERS
        assert weights[attention]["transformer.wte.weight"][1].shape == (VOCABULARY, CHANNELS)
        assert weights[attention]["transformer.h.2.mlp.c_fc.weight"][1].shape == (CHANNELS, 4 * CHANNELS)
    assert config["vanilla"]["model_type"] == "gpt2" and "auto_map" not in config["vanilla"]
    assert config["skip"]["model_type"] == "gpt2x3"  # GPT-2's own code must not load it
    assert (folder["skip"] / "modeling_gpt2x3.py").exists() and not (folder["vanilla"] / "modeling_gpt2x3.py").exists()
    assert {config[attention]["eos_token_id"] for attention in ATTENTIONS} == {256}


def test_checkpoint_to_llm_c(convert, finished, tmp_path):
    checkpoint = finished["vanilla"] / "model.bin"
    prepared(convert(checkpoint, tmp_path / "gpt2.bin", "--to", "llm.c"))
    assert (tmp_path / "gpt2.bin").read_bytes() == weights_only(checkpoint.read_bytes())
    prepared(convert(tmp_path / "gpt2.bin", tmp_path / "again.bin"))
    assert (tmp_path / "again.bin").read_bytes()[:WEIGHTS_END - 4] == changed(
        weights_only(checkpoint.read_bytes()), 4 * 255, "<i", 1)[:WEIGHTS_END - 4]
    for attention in "skip", "depth":
        refused(convert(finished[attention] / "model.bin", tmp_path / "no.bin", "--to", "llm.c"),
                f"its attention is {attention}, which llm.c cannot compute")


def fp32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def nearest_bf16(x):
    """Of the two bf16 numbers around x the nearer one, or the even one of two that are as near."""
    below = struct.unpack("<I", struct.pack("<f", x))[0] >> 16
    distances = [abs(fp32(b << 16) - x) for b in (below, below + 1)]
    return below + (distances[1] < distances[0] or distances[0] == distances[1] and below % 2 == 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bf16(convert, program, finished, tmp_path, attention):
    data = bytearray((finished[attention] / "model.bin").read_bytes()[:WEIGHTS_END])
    ties = [fp32(0x3F808000), fp32(0x3F818000), -fp32(0x3F808001), fp32(0x00007FFF), 3.0e38, -0.0]
    struct.pack_into(f"<{len(ties)}f", data, HEADER_BYTES, *ties)
    model = tmp_path / "model.bin"
    model.write_bytes(changed(bytes(data), 4 * 255, "<i", 0))
    to_llm_c = ["--to", "llm.c"] if attention == "vanilla" else []
    prepared(convert(model, tmp_path / "bf16.bin", "--precision", "bf16", *to_llm_c))
    rounded = (tmp_path / "bf16.bin").read_bytes()
    assert struct.unpack_from("<i", rounded, VERSION)[0] == {"vanilla": 5}.get(attention, 1005)
    assert len(rounded) == HEADER_BYTES + 2 * PARAMETERS + (0 if to_llm_c else 20)
    exact = struct.unpack_from(f"<{PARAMETERS}f", data, HEADER_BYTES)
    assert [nearest_bf16(x) for x in exact] == list(struct.unpack_from(f"<{PARAMETERS}H", rounded, HEADER_BYTES))
    program.run("describe", "--model", tmp_path / "bf16.bin")
    prepared(convert(tmp_path / "bf16.bin", tmp_path / "hf", "--to", "hf", "--precision", "bf16"))
    prepared(convert(tmp_path / "hf", tmp_path / "again.bin", "--precision", "bf16"))
    assert (tmp_path / "again.bin").read_bytes()[HEADER_BYTES:][:2 * PARAMETERS] == rounded[HEADER_BYTES:][
        :2 * PARAMETERS]


def hub_spelling(arrays):
    """As on the hub: without a prefix, with masks and the tied output layer."""
    named = {name.removeprefix("transformer."): value for name, value in arrays.items()}
    for l in range(LAYERS):
        named[f"h.{l}.attn.bias"] = "U8", np.ones((1, 1, 4, 4), "u1")
        named[f"h.{l}.attn.masked_bias"] = "F32", np.float32([-1e4])
    return named | {"lm_head.weight": named["wte.weight"]}


def only_output_layer(arrays):
    named = dict(arrays)
    return {"lm_head.weight": named.pop("transformer.wte.weight")} | named


def as_halves(arrays):
    return {name: ("F16", a.astype("<f2")) for name, (_, a) in arrays.items()}


def as_doubles(arrays):
    return {name: ("F64", a.astype("<f8")) for name, (_, a) in arrays.items()}


@pytest.mark.parametrize("spelling", [hub_spelling, only_output_layer, as_doubles, as_halves])
def test_spellings_of_hugging_face(convert, folder, tmp_path, spelling):
    shutil.copytree(folder["vanilla"], tmp_path / "hf")
    arrays = read_safetensors(folder["vanilla"] / "model.safetensors")
    write_safetensors(tmp_path / "hf" / "model.safetensors", spelling(arrays))
    prepared(convert(tmp_path / "hf", tmp_path / "a"))
    if spelling is as_halves:
        write_safetensors(tmp_path / "hf" / "model.safetensors", {
            name: ("F32", a.astype("<f2").astype("<f4")) for name, (_, a) in arrays.items()})
        prepared(convert(tmp_path / "hf", tmp_path / "b"))
    else:
        prepared(convert(folder["vanilla"], tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_parts_of_hugging_face(convert, folder, tmp_path):
    shutil.copytree(folder["vanilla"], tmp_path / "hf")
    arrays = list(read_safetensors(folder["vanilla"] / "model.safetensors").items())
    index = {}
    for i in range(3):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        write_safetensors(tmp_path / "hf" / name, dict(arrays[i::3]))
        index |= {tensor: name for tensor, _ in arrays[i::3]}
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    prepared(convert(tmp_path / "hf", tmp_path / "a"))
    prepared(convert(folder["vanilla"], tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "hf" / "model-00002-of-00003.safetensors").unlink()
    refused(convert(tmp_path / "hf", tmp_path / "c"), "model-00002-of-00003.safetensors: No such file")
    for name in "\0", "\ud800":
        index = json.dumps({"weight_map": {"wte.weight": name}})
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(index)
        refused(convert(tmp_path / "hf", tmp_path / "c"), ": No such file")


# ----------------------------------------------------------------------------------------------------------------------
# Models that are refused


def changed_folder(folder, out, tensors=None, **config):
    shutil.copytree(folder, out)
    whole = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({name: value for name, value in whole.items() if value != "absent"}))
    if tensors:
        write_safetensors(out / "model.safetensors", tensors(read_safetensors(out / "model.safetensors")))
    return out


@pytest.mark.parametrize("config, says", [
    ({"activation_function": "gelu"}, "activation_function is 'gelu', which train_gpt2 cannot compute"),
    ({"activation_function": "relu"}, "must be 'gelu_new' or 'gelu_pytorch_tanh'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ({"n_inner": 48}, "n_inner is 48, which train_gpt2 cannot compute; it must be None or 64"),
    ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"), ({"model_type": "absent"}, "model_type is None"),
    ({"n_head": 3}, "16 channels are not a multiple of 3 heads"), ({"n_layer": "3"}, "number of layers is '3'"),
    ({"vocab_size": 65537}, "vocabulary is 65537; train_gpt2 takes from 1 to 65,536"),
    ({"n_positions": 0}, "context is 0"), ({"n_embd": 32}, "wte.weight has the shape 257 x 16, must have 257 x 32"),
    ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
    ({"n_layer": 2}, "h.2.ln_1.weight, for which this GPT-2 has no place"),
])
def test_impossible_config(convert, folder, tmp_path, config, says):
    refused(convert(changed_folder(folder["vanilla"], tmp_path / "hf", **config), tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention, config, says", [
    ("skip", {"attention": "other"}, "unknown attention 'other'"),
    ("skip", {"attention": "absent"}, "unknown attention 'None'"),
    ("skip", {"skip_heads": HEADS + 1}, f"skip_heads is {HEADS + 1}; it must be from 0 to {HEADS}"),
    ("depth", {"depth_stride": 0}, "depth_stride is 0; it must be from 1"),
    ("depth", {"depth_window": "absent"}, "depth_window is None"),
])
def test_impossible_attention(convert, folder, tmp_path, attention, config, says):
    refused(convert(changed_folder(folder[attention], tmp_path / "hf", **config), tmp_path / "out"), says)


def test_config_of_gpt2_itself(convert, folder, tmp_path):
    """What its config.json leaves out has Transformers' defaults; what this program does not use does not matter."""
    left_out = dict.fromkeys(["layer_norm_epsilon", "activation_function", "n_inner", "tie_word_embeddings"], "absent")
    hf = changed_folder(folder["vanilla"], tmp_path / "hf", **left_out, n_ctx=CONTEXT, summary_type="cls_index",
                        attn_pdrop=0.1, task_specific_params={"text-generation": {"do_sample": True}})
    prepared(convert(hf, tmp_path / "a"))
    prepared(convert(folder["vanilla"], tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    hf = changed_folder(folder["vanilla"], tmp_path / "hf2", n_inner=4 * CHANNELS,
                        activation_function="gelu_pytorch_tanh")
    prepared(convert(hf, tmp_path / "c"))
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


@pytest.mark.parametrize("tensors, says", [
    (lambda t: t | {"transformer.ln_f.bias": ("F32", np.float32([math.nan] * CHANNELS))}, "infinite values or NaN"),
    (lambda t: t | {"transformer.h.1.ln_1.bias": ("F64", np.float64([1e300] * CHANNELS))}, "infinite values or NaN"),
    (lambda t: t | {"transformer.wpe.weight": ("I64", np.zeros((CONTEXT, CHANNELS), "i8"))},
     "wpe.weight has the dtype I64; this program reads F32, F16, BF16, F64"),
    (lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, "holds wte.weight twice"),
    (lambda t: t | {"lm_head.weight": ("F32", 1 + t["transformer.wte.weight"][1])}, "lm_head.weight differs"),
    (lambda t: t | {"score.weight": ("F32", np.zeros(2, "f4"))}, "holds score.weight, for which"),
    (lambda t: t | {"transformer.h.0.mlp.c_fc.weight": ("F32", t["transformer.h.0.mlp.c_fc.weight"][1].T)},
     "h.0.mlp.c_fc.weight has the shape 16 x 64, must have 64 x 16"),
    (lambda t: dict(list(t.items())[:-1]), "ln_f.bias is missing"),
])
def test_wrong_tensors(convert, folder, tmp_path, tensors, says):
    refused(convert(changed_folder(folder["vanilla"], tmp_path / "hf", tensors=tensors), tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


def test_damaged_safetensors(convert, folder, tmp_path):
    whole = (folder["vanilla"] / "model.safetensors").read_bytes()
    n, = struct.unpack("<Q", whole[:8])
    entries = json.loads(whole[8:8 + n])

    def with_entry(**entry):
        text = json.dumps(entries | {"transformer.ln_f.bias": entries["transformer.ln_f.bias"] | entry}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + n:]

    hf = changed_folder(folder["vanilla"], tmp_path / "hf")
    for i, data in enumerate([
            b"", whole[:5], whole[:100], whole[:8 + n], whole[:-1], whole[:8] + b"[" + whole[9:],
            whole[:8] + b"\xff" + whole[9:], struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", 2) + b"[]",
            struct.pack("<Q", 9) + b'{"a": {}}', with_entry(shape=[-CHANNELS]), with_entry(shape=[CHANNELS, 2]),
            with_entry(shape=16), with_entry(shape=[16.0]), with_entry(data_offsets=[-4 * CHANNELS, 0]),
            with_entry(data_offsets=[0, 1, 2]), with_entry(dtype=None), with_entry(dtype=["F32"]),
            with_entry(data_offsets=[len(whole), len(whole) + 4 * CHANNELS])]):
        (hf / "model.safetensors").write_bytes(data)
        refused(convert(hf, tmp_path / "out"), str(hf))
        assert not (tmp_path / "out").exists(), i


def test_damaged_json(convert, folder, tmp_path):
    hf = changed_folder(folder["vanilla"], tmp_path / "hf")
    for data in b"", b"[]", b"{", b"\xff", b"[" * 100_000:
        (hf / "config.json").write_bytes(data)
        refused(convert(hf, tmp_path / "out"), "config.json")


def test_damaged_models(convert, finished, tmp_path):
    whole = (finished["depth"] / "model.bin").read_bytes()
    for data in (whole[:3], whole[:1000], whole[:WEIGHTS_END], whole[:-1], whole + b"\0",
                 whole[:5000] + b"x" + whole[5001:], whole[:-30] + b"x" + whole[-29:],
                 changed(whole, VERSION, "<i", 4), changed(whole, ATTENTION, "<i", 3),
                 changed(whole, VOCAB, "<i", 400), changed(whole, 4 * 255, "<i", 0)):
        (tmp_path / "model.bin").write_bytes(data)
        refused(convert(tmp_path / "model.bin", tmp_path / "out"), str(tmp_path / "model.bin"))
    assert not (tmp_path / "out").exists()
    write_tokenizer(tmp_path / "tokenizer.bin", BYTES_AND_END_OF_TEXT[:-1])
    (tmp_path / "model.bin").write_bytes(whole)
    refused(convert(tmp_path / "model.bin", tmp_path / "out"), "has 256 tokens, but", "a vocabulary of 257")


def test_what_is_no_model(convert, finished, tmp_path):
    (tmp_path / "text").write_text("Once upon a time")
    refused(convert(tmp_path / "text", tmp_path / "out"), "text: neither a model of train_gpt2, llm.c or nanoGPT nor")
    refused(convert(finished["skip"], tmp_path / "out"), "this folder has no config.json")
    refused(convert(tmp_path / "none", tmp_path / "out"), "none: No such file or directory")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "gpt2"}')
    refused(convert(tmp_path / "hf", tmp_path / "out"), "hf: has neither model.safetensors nor pytorch_model.bin")
    refused(convert(finished["skip"] / "model.bin", tmp_path / "out", "--to", "onnx"), "argument --to: invalid choice")


def test_packages_that_are_missing(convert, finished, folder, tmp_path):
    refused(convert(folder["vanilla"], tmp_path / "out", bare=True),
            "this needs the package numpy: python3 -m pip install numpy")
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w"):
        pass
    refused(convert(tmp_path / "ckpt.pt", tmp_path / "out", bare=True), "python3 -m pip install torch")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def characters(n):
    return [chr(c) for c in [*range(0x20, 0x7F), *range(0x391, 0x3A1), *range(0x1F600, 0x1F700)][:n]]


def with_vocabulary(model, out, tokens, end_of_text=-1):
    """The model as one of these tokens, which are fewer than its own."""
    out.mkdir()
    data = changed(model.read_bytes()[:WEIGHTS_END], 4 * 255, "<i", 0)
    out.joinpath("model.bin").write_bytes(changed(data, VOCAB, "<i", len(tokens)))
    write_tokenizer(out / "tokenizer.bin", tokens, end_of_text)
    return out / "model.bin"


@pytest.mark.parametrize("tokens, end_of_text", [
    ([*map(str.encode, characters(260))], -1),
    ([*map(str.encode, characters(259)), b"<|endoftext|>"], 259),
    ([bytes([b]) for b in reversed(range(256))] + [b"ab"], -1),
    ([bytes([b]) for b in range(256)] + [b"<|endoftext|>", b"ab", "é".encode(), b"abab"], 256),
], ids=["characters", "with end of text", "bytes and a merge", "merges"])
def test_tokenizer_to_hugging_face_and_back(convert, finished, tmp_path, tokens, end_of_text):
    if bytes([255]) in tokens:
        pytest.importorskip("tiktoken")
    model = with_vocabulary(finished["vanilla"] / "model.bin", tmp_path / "run", tokens, end_of_text)
    prepared(convert(model, tmp_path / "hf", "--to", "hf"))
    prepared(convert(tmp_path / "hf", tmp_path / "back"))
    back, there = (read_tokenizer(d / "tokenizer.bin") for d in (tmp_path / "back", tmp_path / "run"))
    assert back == there == (tokens, end_of_text)


def read_tokenizer(path):
    data = path.read_bytes()
    n, end_of_text, appendix = struct.unpack_from("<3i", data, 8)
    tokens, at = [], HEADER_BYTES
    for _ in range(n):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at + appendix == len(data)
    return tokens, end_of_text


@pytest.mark.parametrize("tokens, says", [
    ([bytes([b]) for b in range(256)] + [b"abc"], "no merge of lower tokens makes its token 256, b'abc'"),
    ([bytes([b]) for b in range(256)] + [b"ab", b"ab"], "two of its tokens are equal"),
    ([*map(str.encode, characters(260)), b"ab"], "its tokens are neither bytes and merges of them, nor characters"),
    ([*map(str.encode, characters(260)), b"\xc3"], "its tokens are bytes and characters"),
])
def test_tokenizer_that_is_not_written(convert, finished, tmp_path, tokens, says):
    model = with_vocabulary(finished["vanilla"] / "model.bin", tmp_path / "run", tokens)
    assert f"no tokenizer: {says}" in prepared(convert(model, tmp_path / "hf", "--to", "hf"))
    assert "tokenizer.json" not in contents(tmp_path / "hf")
    prepared(convert(model, tmp_path / "copy"))
    assert (tmp_path / "copy" / "tokenizer.bin").read_bytes() == (tmp_path / "run" / "tokenizer.bin").read_bytes()


def edit_tokenizer(hf, **changes):
    whole = json.loads((hf / "tokenizer.json").read_text())
    whole["model"] |= changes.pop("model", {})
    (hf / "tokenizer.json").write_text(json.dumps(whole | changes))


@pytest.mark.parametrize("changes, says", [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level BPE with GPT-2's words, nor of characters"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "neither byte-level BPE with GPT-2's words"),
    ({"normalizer": {"type": "NFC"}}, "neither byte-level BPE"), ({"model": {"type": "Unigram"}}, "neither byte-level"),
    ({"model": {"merges": ["a b"]}}, "its merges are not in the order of its tokens"),
    ({"model": {"vocab": {"a": 0, "b": 2}}}, "not numbered from 0"),
    ({"model": {"vocab": 3}}, "it is damaged"), ({"model": {"vocab": {"東": 0}}}, "it is damaged (KeyError: '東')"),
    ({"added_tokens": [{"id": 257, "content": "more"}]}, "it has 258 tokens, but the model's vocabulary is 257"),
    ({"added_tokens": [{"id": 3, "content": "the", "special": False}]}, "it finds 'the', an added token, inside words"),
])
def test_tokenizer_of_hugging_face_that_is_not_read(convert, folder, tmp_path, changes, says):
    hf = changed_folder(folder["vanilla"], tmp_path / "hf")
    edit_tokenizer(hf, **changes)
    assert f"no tokenizer: {hf}: " in (said := prepared(convert(hf, tmp_path / "out"))) and says in said
    assert sorted(contents(tmp_path / "out")) == ["model.bin"]


def read_tokens_after(convert, hf, out):
    prepared(convert(hf, out))
    return read_tokenizer(out / "tokenizer.bin")[0]


def test_fewer_tokens_than_the_vocabulary(convert, folder, program, tmp_path):
    """Some models have embeddings for more tokens than their tokenizer has, as 50,304 for 50,257."""
    pytest.importorskip("tiktoken")
    hf = changed_folder(folder["vanilla"], tmp_path / "hf")
    whole = json.loads((hf / "tokenizer.json").read_text())
    whole["added_tokens"] = []
    whole["model"]["vocab"].pop("<|endoftext|>")
    (hf / "tokenizer.json").write_text(json.dumps(whole))
    assert read_tokens_after(convert, hf, tmp_path / "out")[255:] == [b"\xff", b"<|unused256|>"]
    program.run("generate", "--model", tmp_path / "out" / "model.bin", "--prompt", "ab", "--tokens", 4)


@pytest.mark.parametrize("end_of_text", [0x80, ord("\n"), 256])
def test_end_of_text_that_texts_need(convert, folder, tmp_path, end_of_text):
    """Some models end their texts with a newline, or with two, which are one token."""
    pytest.importorskip("tiktoken")
    hf = changed_folder(folder["vanilla"], tmp_path / "hf", eos_token_id=end_of_text)
    whole = json.loads((hf / "tokenizer.json").read_text())
    byte = {i: letter for letter, i in whole["model"]["vocab"].items()}
    whole["added_tokens"] = []
    whole["model"]["vocab"] = {byte[i]: i for i in range(256)} | {2 * byte[10]: 256}
    whole["model"]["merges"] = [[byte[10], byte[10]]]
    (hf / "tokenizer.json").write_text(json.dumps(whole))
    prepared(convert(hf, tmp_path / "out"))
    tokens, found = read_tokenizer(tmp_path / "out" / "tokenizer.bin")[:2]
    assert tokens[256] == b"\n\n" and found == -1


def test_characters_of_nanogpt(convert, tmp_path):
    found = sorted(characters(70) + ["\n", "é"])
    meta = {"vocab_size": len(found), "itos": dict(enumerate(found)), "stoi": {c: i for i, c in enumerate(found)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert f"{tmp_path}/run/tokenizer.bin: 72 tokens" in prepared(convert(tmp_path / "meta.pkl", tmp_path / "run"))
    assert read_tokenizer(tmp_path / "run" / "tokenizer.bin") == ([c.encode() for c in found], -1)
    prepared(convert(tmp_path / "meta.pkl", tmp_path / "mine.bin", bare=True))
    assert (tmp_path / "mine.bin").read_bytes() == (tmp_path / "run" / "tokenizer.bin").read_bytes()
    refused(convert(tmp_path / "meta.pkl", tmp_path / "hf", "--to", "hf"), "a vocabulary alone can only become")


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("content", [
    b"\x80", b"\x80\x05.", pickle.dumps(Harm()), pickle.dumps({"itos": Harm()}), pickle.dumps({"itos": {0: Harm()}}),
    *map(pickle.dumps, [7, {"stoi": {}}, {"itos": {}}, {"itos": {1: "a"}}, {"itos": {0: "\ud800"}}, {"itos": {0: ""}},
                        {"itos": {0: "a" * 256}}, {"itos": {0: 1}}, {"itos": {0: np.int64(1)}}]),
    pickle.dumps({"itos": {0: "a"}})[:-5]])
def test_pickles_that_are_refused(convert, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    refused(convert("meta.pkl", "run"), "meta.pkl")
    assert sorted(os.listdir()) == ["meta.pkl"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that exist, and accidents


def test_nothing_is_replaced_unasked(convert, finished, folder, tmp_path):
    model = finished["skip"] / "model.bin"
    prepared(convert(model, tmp_path / "run"))
    before = contents(tmp_path / "run")
    refused(convert(model, tmp_path / "run"), "run/model.bin exists; give another OUT, or --overwrite")
    (tmp_path / "run" / "model.bin").rename(tmp_path / "model.bin")
    refused(convert(model, tmp_path / "run"), "run/tokenizer.bin exists")
    (tmp_path / "model.bin").rename(tmp_path / "run" / "model.bin")
    refused(convert(model, tmp_path / "run" / "model.bin"), "run/model.bin exists")
    prepared(convert(model, tmp_path / "run", "--overwrite"))
    assert contents(tmp_path / "run") == before
    (tmp_path / "file").touch()
    refused(convert(model, tmp_path / "file"), "file is a file; name a folder, or a file that ends in .bin")
    refused(convert(model, tmp_path / "file", "--to", "hf"), "file is a file")
    refused(convert(model, tmp_path / "file" / "in"), "Not a directory")
    (tmp_path / "dir.bin").mkdir()
    assert f"{tmp_path}/dir.bin/model.bin" in prepared(convert(model, tmp_path / "dir.bin"))

    hf = tmp_path / "hf"
    shutil.copytree(folder["skip"], hf)
    refused(convert(model, hf, "--to", "hf"), "exists; give another OUT, or --overwrite")
    prepared(convert(finished["vanilla"] / "model.bin", hf, "--to", "hf", "--overwrite"))
    assert contents(hf) == contents(folder["vanilla"])  # without the code for skip
    (hf / "pytorch_model.bin").touch()  # Transformers could take it for the model's
    refused(convert(model, hf, "--to", "hf", "--overwrite"), "pytorch_model.bin is nothing that this program writes")


def test_model_can_be_converted_in_place(convert, finished, tmp_path):
    shutil.copytree(finished["vanilla"], tmp_path / "run")
    model = tmp_path / "run" / "model.bin"
    assert "no tokenizer: if OUT is a folder" in prepared(convert(model, model, "--to", "llm.c", "--overwrite"))
    assert model.read_bytes() == weights_only((finished["vanilla"] / "model.bin").read_bytes())


@pytest.mark.parametrize("to", ["train_gpt2", "hf"])
def test_killed_at_any_instant(convert, finished, tmp_path, to):
    """What is in the folder is the old model, the new one, or none that could be loaded."""
    key = "config.json" if to == "hf" else "model.bin"
    whole, states = {}, []
    for attention in "skip", "vanilla":
        prepared(convert(finished[attention] / "model.bin", tmp_path / attention, "--to", to))
        whole[attention] = contents(tmp_path / attention)
    for instant in itertools.count(1):
        out = tmp_path / f"out{instant}"
        shutil.copytree(tmp_path / "skip", out)
        arguments = finished["vanilla"] / "model.bin", out, "--to", to, "--overwrite"
        result = convert(*arguments, code="os.kill(os.getpid(), signal.SIGKILL)", instant=instant)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
        found = {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}
        states.append("none" if key not in found else "old" if found == whole["skip"] else "new")
        assert states[-1] != "new" or found == whole["vanilla"]
        prepared(convert(*arguments))
        assert contents(out) == whole["vanilla"]
    assert [state for state, _ in itertools.groupby(states)] == ["old", "none", "new"]


@pytest.mark.parametrize("to", ["train_gpt2", "hf"])
def test_stopped_at_any_instant(convert, finished, tmp_path, to):
    said = set()
    for instant in itertools.count(1):
        out = tmp_path / f"out{instant}"
        result = convert(finished["depth"] / "model.bin", out, "--to", to, instant=instant,
                         code="os.kill(os.getpid(), signal.SIGTERM)")
        if result.returncode == 0:
            break
        refused(result, "terminated; ")
        said.add(result.stderr)
        assert out.exists() == ("nothing was written" not in result.stderr)
        if out.exists():
            assert len(contents(out)) == (2 if to == "train_gpt2" else 6)
    assert said == {"error: terminated; nothing was written\n", "error: terminated; all files are written\n"}


@pytest.mark.parametrize("to", ["train_gpt2", "hf"])
def test_two_at_the_same_time(root, convert, finished, tmp_path, to):
    """At any instant of a run, another begins that writes to the same OUT: what it has is one's or the other's."""
    whole, said = [], set()
    for attention in "skip", "depth":
        prepared(convert(finished[attention] / "model.bin", tmp_path / attention, "--to", to))
        whole.append(contents(tmp_path / attention))
    for instant in itertools.count(1):
        out, heard = tmp_path / f"out{instant}", tmp_path / f"heard{instant}"
        shutil.copytree(tmp_path / "skip", out)
        other = list(map(str, [sys.executable, root / "data_prep/convert.py", finished["depth"] / "model.bin", out,
                               "--to", to, "--overwrite"]))
        prepared(convert(finished["skip"] / "model.bin", out, "--to", to, "--overwrite", instant=instant, code=(
            f"import subprocess; subprocess.run({other}, stdout=-3, stderr=open({str(heard)!r}, 'w'))")))
        if not heard.exists():
            break
        said.add(heard.read_text().partition(f"{out}: ")[2])
        assert contents(out) in whole
    assert said == {"", "another process is writing there; wait for it, or give another folder\n"}


def test_full_disk(convert, finished, folder, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    refused(convert(finished["depth"] / "model.bin", tmp_path / "new", before=limit),
            "File too large; nothing was written")
    assert not (tmp_path / "new").exists()
    shutil.copytree(folder["vanilla"], tmp_path / "hf")
    refused(convert(finished["skip"] / "model.bin", tmp_path / "hf", "--to", "hf", "--overwrite", before=limit),
            "File too large; nothing was written")
    assert contents(tmp_path / "hf") == contents(folder["vanilla"])


# ----------------------------------------------------------------------------------------------------------------------
# HellaSwag

QUESTION = {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["wraps", "é", "rips", "starts"], "ind": 24}


def write_questions(path, *questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def test_questions(hellaswag, program, finished, tmp_path):
    other = {"ctx": "<|endoftext|>", "endings": ["a", "b"], "label": "0"}
    questions = write_questions(tmp_path / "in", QUESTION, other)
    out = tmp_path / "out.bin"
    assert "2 questions" in prepared(hellaswag(questions, out, "--tokenizer", finished["skip"] / "tokenizer.bin"))

    def text(string):
        return [len(string.encode()), *string.encode()]

    numbers = [0, 3, 4, *text(QUESTION["ctx"]), *text(" wraps"), *text(" é"), *text(" rips"), *text(" starts")]
    others = [1, 0, 2, *text("<|endoftext|>"), *text(" a"), *text(" b")]
    sizes = [2 * (2 + len(n)) for n in (numbers, others)]
    tokenizer = (finished["skip"] / "tokenizer.bin").read_bytes()
    crc = struct.unpack("<i", struct.pack("<I", zlib.crc32(tokenizer[12:16], zlib.crc32(tokenizer[HEADER_BYTES:]))))[0]
    assert out.read_bytes() == header(EVAL_MAGIC, 1, 2, sizes[0], crc) + tokens_bytes(
        [65535, sizes[0], *numbers, 65535, sizes[1], *others])
    refused(hellaswag(questions, out), "out.bin exists")
    refused(hellaswag(questions, questions, "--overwrite"), "in is the input; give another OUT")
    short = write_questions(tmp_path / "short", QUESTION | {"ctx": "A"})
    prepared(hellaswag(short, out, "--tokenizer", "bytes", "--overwrite"))
    said = program.run("eval", "--model", finished["skip"] / "model.bin", "--hellaswag", out)
    assert "1 question with 4 endings" in said
    out.write_bytes(out.read_bytes()[:16] + b"abcd" + out.read_bytes()[20:])
    program.fails("eval", "--model", finished["skip"] / "model.bin", "--hellaswag", out, says="another tokenizer than")


def test_questions_in_gpt2s_tokens(hellaswag, gpt2_bpe, tmp_path):
    prepared(hellaswag(write_questions(tmp_path / "in", QUESTION), tmp_path / "out.bin"))
    numbers = [0, 3, 4]
    for text in [QUESTION["ctx"], *(" " + ending for ending in QUESTION["endings"])]:
        tokens = gpt2_bpe.encode(text)
        numbers += [len(tokens), *tokens]
    assert (tmp_path / "out.bin").read_bytes()[HEADER_BYTES:] == tokens_bytes([65535, 2 * (2 + len(numbers)), *numbers])


@pytest.mark.parametrize("line, says", [
    ("{", "must have ctx, endings and label"), ("[]", "must have ctx"), ('{"ctx": "a"}', "KeyError: 'endings'"),
    (json.dumps(QUESTION | {"label": 4}), "the label is 4, of 4 endings"),
    (json.dumps(QUESTION | {"label": -1}), "the label is -1"),
    (json.dumps(QUESTION | {"label": None}), "must have ctx"),
    (json.dumps(QUESTION | {"label": 1e999}), "must have ctx"),
    (json.dumps(QUESTION | {"endings": ["a", "b"], "label": 2}), "the label is 2, of 2 endings"),
    (json.dumps(QUESTION | {"endings": "abcd"}), "endings is a list"),
    (json.dumps(QUESTION | {"label": 0.7}), "label a number"),
    (json.dumps(QUESTION | {"endings": [1, 2]}), "must have ctx"), (json.dumps(QUESTION | {"ctx": ""}), "'' is empty"),
    (json.dumps(QUESTION | {"ctx": "a" * 33_000}), "bytes; the format holds 65,535"),
    ('{"ctx": "\\ud800", "endings": ["a"], "label": 0}', "must have ctx"), ("[" * 100_000, "must have ctx")])
def test_questions_that_are_refused(hellaswag, tmp_path, line, says):
    questions = tmp_path / "in"
    questions.write_text(json.dumps(QUESTION) + "\n\n" + line)
    refused(hellaswag(questions, tmp_path / "out.bin", "--tokenizer", "bytes"), "in, line 3: ", says)
    assert sorted(contents(tmp_path)) == ["in"]


def test_no_questions(hellaswag, tmp_path):
    questions = write_questions(tmp_path / "in")
    refused(hellaswag(questions, tmp_path / "out.bin", "--tokenizer", "bytes"), "in: has 0 questions")
    refused(hellaswag(questions, tmp_path / "out.bin", "--tokenizer", "chars"), "name the tokenizer.bin of the model")
