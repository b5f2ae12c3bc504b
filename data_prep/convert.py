#!/usr/bin/env python3
"""Converts models between train_gpt2, Hugging Face's Transformers, nanoGPT and llm.c.

    convert.py gpt2 run/gpt2                      GPT-2 as a folder of Hugging Face: makes run/gpt2/model.bin
    convert.py ckpt.pt run/nano                   a checkpoint of nanoGPT
    convert.py meta.pkl run/nano                  nanoGPT's vocabulary of characters: makes run/nano/tokenizer.bin
    convert.py run/mine/best.bin mine --to hf     makes a folder for Transformers
    convert.py run/mine/best.bin gpt2_124M_bf16.bin --to llm.c --precision bf16

IN may be any of: a folder of Hugging Face's with a GPT-2; nanoGPT's ckpt.pt or meta.pkl; a model or checkpoint of
train_gpt2 or llm.c. Without --to, a model for train_gpt2 is written. OUT is a file if its name ends in .bin, else a
folder, in which the model is named model.bin, and the tokenizer that IN has becomes tokenizer.bin. Only weights are
kept, not the state of the training.

The folder of a skip or depth model holds the code of its attention, so Transformers needs trust_remote_code=True:

    AutoModelForCausalLM.from_pretrained("mine", trust_remote_code=True)
    AutoTokenizer.from_pretrained("mine", trust_remote_code=True)

There, a vocabulary of characters leaves out those that it lacks, where train_gpt2 refuses them.

Needs numpy; for tokenizers of byte-level BPE, tiktoken; for ckpt.pt and pytorch_model.bin, torch.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from types import SimpleNamespace

sys.dont_write_bytecode = True  # on a full disk, Python would cache half of one, and fail from then on
import prepare
from prepare import HEADER_BYTES, Tokenizer, header, read_vocabulary
from texts import count, fail, lock, make_folder, open_file, package, reason, remove_empty

MODEL, TRAILER = 20240326, 20240329  # magic numbers
CODE = "modeling_gpt2x3.py"  # Transformers' GPT-2 with skip and depth
ATTENTIONS = ["vanilla", "skip", "depth"]  # model files store the index
# The settings of attentions in the order of a model file's header. Each name begins with its attention's.
SETTINGS = ["skip_distance", "skip_heads", "depth_stride", "depth_window"]
SHAPE = {"maxT": "n_positions", "V": "vocab_size", "L": "n_layer", "NH": "n_head", "C": "n_embd"}  # as in config.json
LIMITS = {"maxT": ("context", 1 << 20), "V": ("vocabulary", 65536), "L": ("number of layers", 1024),
          "NH": ("number of heads", 65536), "C": ("number of channels", 65536)}  # of train_gpt2


# ----------------------------------------------------------------------------------------------------------------------
# Models
#
# A model is a namespace: path, for messages; config, a dictionary with the keys of SHAPE, "attention" and its SETTINGS;
# tensors, by name (shape, function that reads it as fp32); tokenizer, which is (tokens, end of text, tokenizer.bin's
# content) or None; note, why there is none. Hugging Face and nanoGPT name the tensors alike.


def tensor_shapes(c):
    """The tensors by name, in the order of our files. Matrices are (out, in)."""
    C = c["C"]
    shapes = {"wte.weight": (c["V"], C), "wpe.weight": (c["maxT"], C)}
    for name, *shape in [("ln_1.weight", C), ("ln_1.bias", C), ("attn.c_attn.weight", 3 * C, C),
                         ("attn.c_attn.bias", 3 * C), ("attn.c_proj.weight", C, C), ("attn.c_proj.bias", C),
                         ("ln_2.weight", C), ("ln_2.bias", C), ("mlp.c_fc.weight", 4 * C, C), ("mlp.c_fc.bias", 4 * C),
                         ("mlp.c_proj.weight", C, 4 * C), ("mlp.c_proj.bias", C)]:
        shapes |= {f"h.{l}.{name}": tuple(shape) for l in range(c["L"])}
    return shapes | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def padded(V):
    return (V + 127) // 128 * 128


def check_config(path, c):
    for name, (words, most) in LIMITS.items():
        if type(c[name]) is not int or not 1 <= c[name] <= most:
            fail(f"{path}: its {words} is {c[name]!r}; train_gpt2 takes from 1 to {most:,}")
    if c["C"] % c["NH"]:
        fail(f"{path}: {c['C']} channels are not a multiple of {c['NH']} heads")
    if c["attention"] not in ATTENTIONS:
        fail(f"{path}: unknown attention {c['attention']!r}; known are {', '.join(ATTENTIONS)}")
    for name in own_settings(c["attention"]):
        least = name in ("skip_distance", "depth_stride")
        most = c["NH"] if name == "skip_heads" else 65536
        if type(c.get(name)) is not int or not least <= c[name] <= most:
            fail(f"{path}: {name} is {c.get(name)!r}; it must be from {int(least)} to {most:,}")


def own_settings(attention):
    return [name for name in SETTINGS if name.startswith(attention + "_")]


def check_tensors(model, optional=()):
    """Dies unless the model has exactly GPT-2's tensors. Those of `optional` that are missing become zeros."""
    shapes = tensor_shapes(model.config)
    for name, shape in shapes.items():
        if name not in model.tensors and name in optional:
            model.tensors[name] = shape, lambda shape=shape: numpy().zeros(shape, "f4")
        if name not in model.tensors:
            fail(f"{model.path}: {name} is missing")
        if model.tensors[name][0] != shape:
            fail(f"{model.path}: {name} has the shape {by(model.tensors[name][0])}, must have {by(shape)}")
    for name in model.tensors:
        if name not in shapes:
            fail(f"{model.path}: holds {name}, for which this GPT-2 has no place")


def by(shape):
    return " x ".join(map(str, shape)) or "()"


def values(model, name):
    a = model.tensors[name][1]()
    if not numpy().isfinite(a).all():
        fail(f"{model.path}: {name} holds infinite values or NaN: its training failed, or it is damaged")
    return a


def numpy():
    np = package("numpy")
    np.seterr(all="ignore")  # values() finds what overflows
    return np


def from_bf16(a):
    return (a.astype("<u4") << 16).view("<f4")


def to_bf16(a):
    """Rounded to nearest, ties to even; bf16 is the upper half of an fp32."""
    bits = numpy().ascontiguousarray(a, "<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def with_our_names(path, tensors, transposed):
    """The tensors without prefixes, without the masks that are no weights, and without the tied output layer. With
    `transposed`, the layers' matrices are (in, out)."""
    named = {}
    for name, (shape, read) in tensors.items():
        short = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if short in named:
            fail(f"{path}: holds {short} twice, with a prefix and without")
        if transposed and short.startswith("h.") and len(shape) == 2:
            shape, read = shape[::-1], lambda read=read: read().T
        if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", short):
            named[short] = shape, read
    head_shape, read_head = named.pop("lm_head.weight", (None, None))
    if head_shape:
        shape, read = named.setdefault("wte.weight", (head_shape, read_head))
        if shape != head_shape or not numpy().array_equal(read(), read_head()):
            fail(f"{path}: lm_head.weight differs from wte.weight; in GPT-2, the output layer is the embedding")
    return named


# ----------------------------------------------------------------------------------------------------------------------
# What is read: train_gpt2's and llm.c's models


def read_file(path, most=-1):
    with open_file(path) as f:
        return f.read(most)


def read_model(path):
    size = os.path.getsize(path)
    h = struct.unpack("<256i", read_file(path, HEADER_BYTES).ljust(HEADER_BYTES, b"\0"))
    version, attention, trailer = h[1], h[8], h[255]
    if version not in (3, 5, 1003, 1005) or not 0 <= attention < len(ATTENTIONS) or trailer not in (0, 1):
        fail(f"{path}: damaged, or of a later program: version {version}, attention {attention}, ending in {trailer}")
    c = dict(zip(["maxT", "V", "L", "NH", "C"], h[2:7])) | {"attention": ATTENTIONS[attention]}
    c |= {name: value for name, value in zip(SETTINGS, h[9:]) if name in own_settings(c["attention"])}
    check_config(path, c)
    if h[7] != padded(c["V"]):
        fail(f"{path}: damaged: a vocabulary of {c['V']} padded to {h[7]}")

    tensors, at, value_bytes = {}, HEADER_BYTES, 2 if version % 1000 == 5 else 4
    for name, shape in tensor_shapes(c).items():
        def read(at=at, shape=shape):
            return read_array(path, "<u2" if value_bytes == 2 else "<f4", shape, at)
        tensors[name] = shape, (lambda read=read: from_bf16(read())) if value_bytes == 2 else read
        at += value_bytes * (h[7] * c["C"] if name == "wte.weight" else math.prod(shape))
    least = at + trailer * 20
    if size < least or not trailer and size != least:
        fail(f"{path}: truncated or damaged: {count(size, 'byte')}, but its header says {least:,}")
    if trailer:
        check_checksums(path, at, size)

    model = SimpleNamespace(path=path, config=c, tensors=tensors, tokenizer=None, note=f"none lies beside {path}")
    for name in "tokenizer.bin", "gpt2_tokenizer.bin":  # llm.c's name
        beside = os.path.join(os.path.dirname(path), name)
        if not model.tokenizer and os.path.exists(beside):
            model.tokenizer = tokens, end_of_text, _ = read_vocabulary(beside)
            if name == "gpt2_tokenizer.bin" and importlib.util.find_spec("tiktoken"):  # it lacks what prompts need
                model.tokenizer = tokens, end_of_text, Tokenizer(beside, tokens, end_of_text).content
            n = len(model.tokenizer[0])
            if n != c["V"]:
                fail(f"{beside} has {count(n, 'token')}, but {path} has a vocabulary of {c['V']:,}: it is another's")
    return model


def read_array(path, form, shape, at):
    a = numpy().fromfile(path, form, math.prod(shape), offset=at)
    if a.size != math.prod(shape):
        fail(f"{path}: truncated: its values end at byte {at + a.nbytes:,}")
    return a.reshape(shape)


def check_checksums(path, weights_end, size):
    with open(path, "rb") as f:
        crcs = []
        for left in weights_end, size - 20 - weights_end:  # header and tensors; the rest
            crc = 0
            while left and (data := f.read(min(left, 1 << 24))):
                crc, left = zlib.crc32(data, crc), left - len(data)
            crcs.append(crc)
        if f.read() != struct.pack("<IIIQ", TRAILER, *crcs, size):
            fail(f"{path}: damaged: its checksums do not match")


# ----------------------------------------------------------------------------------------------------------------------
# What is read: Hugging Face's folders and nanoGPT's checkpoints


def read_json(path):
    try:
        data = json.loads(read_file(path))
    except (ValueError, RecursionError) as e:
        fail(f"{path}: not JSON: {e}")
    if not isinstance(data, dict):
        fail(f"{path}: must hold an object, {{...}}")
    return data


def read_hugging_face(folder):
    path = os.path.join(folder, "config.json")
    given = read_json(path)
    kind = given.get("model_type")
    if kind not in ("gpt2", "gpt2x3"):
        fail(f"{path}: model_type is {kind!r}; this program reads gpt2 and its own gpt2x3")
    # What Transformers' GPT2Config takes for a key that is missing, and then what else is the same model.
    defaults = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None,
                "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                "add_cross_attention": False}
    full = defaults | given
    c = {ours: full[theirs] for ours, theirs in SHAPE.items()}
    c["attention"] = str(full.get("attention")) if kind == "gpt2x3" else "vanilla"
    c |= {name: full.get(name) for name in own_settings(c["attention"])}
    check_config(path, c)
    same = {"n_inner": [None, 4 * c["C"]], "activation_function": ["gelu_new", "gelu_pytorch_tanh"]}
    for name in list(defaults)[5:]:
        known = same.get(name, [defaults[name]])
        if full[name] not in known:
            fail(f"{path}: {name} is {full[name]!r}, which train_gpt2 cannot compute; "
                 f"it must be {' or '.join(map(repr, known))}")

    weights, tensors = find_weights(folder)
    model = SimpleNamespace(path=weights, config=c, tensors=with_our_names(weights, tensors, transposed=True))
    check_tensors(model)
    model.tokenizer, model.note = read_hugging_face_tokenizer(folder, c["V"], full.get("eos_token_id", 50256))
    return model


def find_weights(folder):
    """The file that names all weights, and these."""
    for name, read in ("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch_weights):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path, read(path)
        if os.path.exists(path + ".index.json"):
            shards = read_json(path + ".index.json").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                fail(f"{path}.index.json: has no weight_map")
            tensors = {}
            for shard in sorted(set(shards.values())):
                part = os.path.join(folder, os.path.basename(shard))
                if not os.path.exists(part):
                    fail(f"{part}: No such file; {path}.index.json names it")
                tensors |= read(part)
            return path + ".index.json", tensors
    fail(f"{folder}: has neither model.safetensors nor pytorch_model.bin, whole or in parts")


def read_safetensors(path):
    """uint64 n; n bytes of JSON, by name dtype, shape and where the values begin and end; the values. (The package
    safetensors gives numpy no bf16.)"""
    forms = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > size - 8:
            fail(f"{path}: truncated, or not of safetensors: its list of tensors would take {n:,} bytes of {size:,}")
        text = f.read(n)
    tensors = {}
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            form, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, of dtypes that do not matter
                continue
            if form not in forms:
                fail(f"{path}: {name} has the dtype {form}; this program reads {', '.join(forms)}")
            if (not all(type(n) is int and n >= 0 for n in (*shape, begin, end))
                    or end - begin != int(forms[form][2]) * math.prod(shape)):
                raise ValueError(name)
            if 8 + n + end > size:
                fail(f"{path}: truncated: {name} would end at byte {8 + n + end:,} of {size:,}")

            def read(form=form, shape=shape, at=8 + n + begin):
                a = read_array(path, forms[form], shape, at)
                return from_bf16(a) if form == "BF16" else a.astype("<f4")
            tensors[name] = shape, read
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        fail(f"{path}: damaged: its list of tensors is wrong ({type(e).__name__}: {e})")
    return tensors


def read_torch(path):
    """torch.load of plain values and tensors only; code in the file is not run."""
    torch = package("torch")
    warnings.simplefilter("ignore")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except Exception as e:  # whatever a damaged file leads to
        if "weights_only" in str(e):
            fail(f"{path}: holds more than tensors and plain values, or is damaged; this program runs no code of files")
        fail(f"{path}: damaged, or not of torch.save: {reason(e)}")


def torch_tensors(path, state):
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and hasattr(t, "is_floating_point") for name, t in state.items()):
        fail(f"{path}: holds no tensors by name")

    def read(name):
        try:
            return state[name].detach().float().numpy()
        except (RuntimeError, TypeError) as e:
            fail(f"{path}: {name} is no plain tensor: {reason(e)}")
    return {name: (tuple(t.shape), lambda name=name: read(name)) for name, t in state.items()}


def read_torch_weights(path):
    return torch_tensors(path, read_torch(path))


def read_nanogpt(path):
    content = read_torch(path)
    arguments = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(arguments, dict) or not isinstance(content.get("model"), dict):
        fail(f"{path}: is not a checkpoint of nanoGPT, which holds model_args and model")
    names = dict(SHAPE, maxT="block_size")
    c = {ours: arguments.get(theirs) for ours, theirs in names.items()} | {"attention": "vanilla"}
    check_config(path, c)
    tensors = with_our_names(path, torch_tensors(path, content["model"]), transposed=False)
    model = SimpleNamespace(path=path, config=c, tensors=tensors, tokenizer=None,
                            note="nanoGPT keeps its vocabulary in meta.pkl, which this program converts, too")
    biases = [name for name in tensor_shapes(c) if name.endswith(".bias")]
    check_tensors(model, optional=biases if arguments.get("bias") is False else [])
    if c["V"] == 50304:  # nanoGPT's default for GPT-2's 50,257 tokens: the rest are never in the text
        c["V"] = 50257
        read = tensors["wte.weight"][1]
        tensors["wte.weight"] = (50257, c["C"]), lambda: read()[:50257]
    return model


class PlainUnpickler(pickle.Unpickler):
    """Makes dictionaries, strings and numbers only: no class or function is looked up, so no code is run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_nanogpt_characters(path):
    try:
        meta = PlainUnpickler(io.BytesIO(read_file(path))).load()
        itos = meta["itos"]
        tokens = [itos[i].encode() for i in range(len(itos))]
    except Exception as e:  # whatever a damaged file leads to
        fail(f"{path}: is not nanoGPT's meta.pkl, which numbers characters: {reason(e)}")
    if not 1 <= len(tokens) <= 65536 or not all(1 <= len(token) <= 255 for token in tokens):
        fail(f"{path}: must hold from 1 to 65,536 tokens of 1 to 255 bytes")
    return tokens, -1, Tokenizer(path, tokens, -1).content


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face's tokenizers: byte-level BPE like GPT-2's, and characters
#
# Byte-level BPE spells a byte as a visible character: those of ASCII and Latin-1 as themselves, the others as the
# characters from U+0100 on.

VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = dict(zip(map(chr, [*VISIBLE, *range(0x100, 0x144)]), [*VISIBLE, *sorted({*range(256)} - {*VISIBLE})]))
CHARACTER_OF = {byte: c for c, byte in BYTE_OF.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class NoTokenizer(Exception):
    """Why a tokenizer cannot be converted."""


def merges(numbers):
    """For tokens and their numbers: the two parts that each is merged from, which are what the lower tokens make of its
    bytes, in the order of the numbers. A token without any must be like <|endoftext|>."""
    pairs = {}
    for token in sorted(numbers, key=numbers.get):
        parts, number = [bytes([byte]) for byte in token], numbers[token]
        while len(parts) > 2:
            lowest, i = min((numbers.get(a + b, number), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
            if lowest >= number:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs[token] = parts
        elif len(parts) > 2 and not re.fullmatch(rb"<\|.*\|>", token):
            raise NoTokenizer(f"no merge of lower tokens makes its token {numbers[token]}, {token!r}")
    return list(pairs.values())


def has_all_bytes(tokens):
    return all(bytes([byte]) in tokens for byte in range(256))


def is_of_text(token, tokens):
    """Is it a byte, a character or merged from two tokens? Texts need it then, so it cannot say where they end."""
    tokens = set(tokens)
    return len(token.decode(errors="replace")) == 1 or any(
        token[:i] in tokens and token[i:] in tokens for i in range(1, len(token)))


def read_hugging_face_tokenizer(folder, V, end_of_text):
    """The tokenizer of a model or None, and why there is none."""
    try:
        tokens = read_tokens(folder)
    except NoTokenizer as e:
        return None, f"{folder}: {e}"
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        return None, f"{folder}: it is damaged ({type(e).__name__}: {reason(e)})"
    if len(tokens) > V:
        return None, f"{folder}: it has {count(len(tokens), 'token')}, but the model's vocabulary is {V:,}"
    if type(end_of_text) is not int or not 0 <= end_of_text < len(tokens) or is_of_text(tokens[end_of_text], tokens):
        end_of_text = tokens.index(prepare.END_OF_TEXT) if prepare.END_OF_TEXT in tokens else -1
    tokens += [b"<|unused%d|>" % i for i in range(len(tokens), V)]  # the model has embeddings for more tokens
    others = [token for i, token in enumerate(tokens) if i != end_of_text]
    if not has_all_bytes(set(others)) and any(len(token.decode()) != 1 for token in others):
        return None, f"{folder}: its tokens are neither bytes and merges of them, nor characters"
    return (tokens, end_of_text, Tokenizer(folder, tokens, end_of_text).content), ""


def read_tokens(folder):
    """The bytes of each token."""
    path, in_parts, added_path, merges_path = (os.path.join(folder, name) for name in (
        "tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt"))
    if os.path.exists(path):
        whole = read_json(path)
        vocabulary, model, words = whole["model"]["vocab"], whole["model"], whole.get("pre_tokenizer")
        added = {entry["content"]: entry["id"] for entry in whole.get("added_tokens") or []}
        for entry in whole.get("added_tokens") or []:
            if not entry.get("special", True) and not re.fullmatch(r"<\|.*\|>", entry["content"]):
                raise NoTokenizer(f"it finds {entry['content']!r}, an added token, inside words, as ours do not")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        byte_level = bool(words) and BYTE_LEVEL | words | {"trim_offsets": True} == BYTE_LEVEL
        if (model.get("type", "BPE") != "BPE" or whole.get("normalizer") or words and not byte_level
                or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
            raise NoTokenizer("it is neither byte-level BPE with GPT-2's words, nor of characters")
    elif os.path.exists(in_parts):
        byte_level, vocabulary = True, read_json(in_parts)
        added = read_json(added_path) if os.path.exists(added_path) else {}
        lines = read_file(merges_path).decode().split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    else:
        raise NoTokenizer("it holds none")

    def to_bytes(text):
        return bytes(BYTE_OF[c] for c in text) if byte_level else text.encode()

    numbers = {to_bytes(text): i for text, i in vocabulary.items() if text not in added}
    tokens = {i: text.encode() for text, i in added.items()} | {i: token for token, i in numbers.items()}
    if sorted(tokens) != list(range(len(vocabulary | added))) or not all(0 < len(t) < 256 for t in tokens.values()):
        raise NoTokenizer("its tokens are not numbered from 0, or longer than 255 bytes")
    if byte_level and (not has_all_bytes(numbers) or merges(numbers) != [[*map(to_bytes, pair)] for pair in pairs]):
        raise NoTokenizer("its merges are not in the order of its tokens")
    if not byte_level and pairs:
        raise NoTokenizer("it merges characters")
    return [tokens[i] for i in range(len(tokens))]


def tokenizer_json(tokens, end_of_text):
    """The contents of tokenizer.json."""
    numbers = {token: i for i, token in enumerate(tokens) if i != end_of_text}
    byte_level = has_all_bytes(numbers)
    try:
        text_of = [t.decode() if i == end_of_text or not byte_level else "".join(map(CHARACTER_OF.get, t))
                   for i, t in enumerate(tokens)]
    except UnicodeDecodeError:
        raise NoTokenizer("its tokens are bytes and characters")
    if len(set(text_of)) < len(tokens):
        raise NoTokenizer("two of its tokens are equal")
    if not byte_level and any(len(text_of[i]) != 1 for i in numbers.values()):
        raise NoTokenizer("its tokens are neither bytes and merges of them, nor characters")
    pairs = merges(numbers) if byte_level else []
    added = [{"id": i, "content": text_of[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i in [end_of_text] if i >= 0]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL if byte_level else None, "post_processor": None,
            "decoder": BYTE_LEVEL if byte_level else {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {text: i for i, text in enumerate(text_of)},
                      "merges": [" ".join("".join(map(CHARACTER_OF.get, part)) for part in pair) for pair in pairs]}}


# ----------------------------------------------------------------------------------------------------------------------
# What is written


def model_file(model, bf16, trailer):
    """A model for train_gpt2 or, without the trailer, for llm.c, piece by piece."""
    c = model.config
    fields = [MODEL, 5 if bf16 else 3, c["maxT"], c["V"], c["L"], c["NH"], c["C"], padded(c["V"])]
    if c["attention"] != "vanilla":
        fields[1] += 1000
        fields += [ATTENTIONS.index(c["attention"]), *(c.get(name, 0) for name in SETTINGS)]
    size = crc = 0
    for piece in itertools.chain([header(*fields, *[0] * (255 - len(fields)), int(trailer))], pieces(model, bf16)):
        size, crc = size + len(piece), zlib.crc32(piece, crc)
        yield piece
    if trailer:
        yield struct.pack("<IIIQ", TRAILER, crc, 0, size + 20)


def pieces(model, bf16):
    c = model.config
    for name in tensor_shapes(c):
        a = values(model, name)
        if name == "wte.weight":
            a = numpy().concatenate([a, numpy().zeros((padded(c["V"]) - c["V"], c["C"]), "f4")])
        yield as_bytes(a, bf16)


def as_bytes(a, bf16):
    return (to_bf16(a) if bf16 else a.astype("<f4")).tobytes()


def safetensors(model, bf16):
    """The weights as Transformers names them, with the layers' matrices (in, out)."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    shapes = tensor_shapes(model.config)
    for name, shape in shapes.items():
        end = at + (2 if bf16 else 4) * math.prod(shape)
        entries["transformer." + name] = {"dtype": "BF16" if bf16 else "F32", "data_offsets": [at, end],
                                          "shape": shape[::-1] if name.startswith("h.") else shape}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in shapes:
        a = values(model, name)
        yield as_bytes(a.T if name.startswith("h.") else a, bf16)


def hugging_face_files(model, bf16):
    """Contents by name; config.json, without which the others are no model, comes last."""
    c, tokenizer = model.config, {}
    end_of_text = 50256 if c["V"] == 50257 else None
    files = {"model.safetensors": safetensors(model, bf16)}
    if model.tokenizer:
        tokens, number, _ = model.tokenizer
        end_of_text = number if number >= 0 else None
        try:
            files["tokenizer.json"] = as_json(tokenizer_json(tokens, number))
            if end_of_text is not None:
                tokenizer = {"bos_token": tokens[number].decode(), "eos_token": tokens[number].decode()}
            files["tokenizer_config.json"] = as_json(tokenizer | {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c["maxT"],
                "clean_up_tokenization_spaces": False})
        except NoTokenizer as e:
            model.tokenizer, model.note = None, str(e)
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    if c["attention"] != "vanilla":
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), CODE), "rb") as f:
            files[CODE] = [f.read()]
        module = CODE.removesuffix(".py")
        config = {"architectures": ["GPT2X3LMHeadModel"], "model_type": "gpt2x3",
                  "auto_map": {"AutoConfig": f"{module}.GPT2X3Config",
                               "AutoModelForCausalLM": f"{module}.GPT2X3LMHeadModel"},
                  "attention": c["attention"], **{name: c[name] for name in own_settings(c["attention"])}}
    files["generation_config.json"] = as_json(ends)
    files["config.json"] = as_json(config | {theirs: c[ours] for ours, theirs in SHAPE.items()} | ends | {
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True, "dtype": "bfloat16" if bf16 else "float32"})
    return files


def as_json(data):
    return [json.dumps(data, indent=2, ensure_ascii=False).encode() + b"\n"]


def write(files, former):
    """Writes files, {path: pieces}, under temporary names, then moves all into place of former ones. Killed at any
    instant, it leaves the old files, the new ones, or some without the last, which makes a model of them."""
    *others, last = files
    folder = os.path.dirname(last) or "."
    made, temporary = [], []
    try:
        made = make_folder(folder)
        number = lock(folder)
        for path, pieces in files.items():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path + ".tmp")  # of a run that was killed; it could be a link
            temporary.append(path + ".tmp")
            with open(path + ".tmp", "xb") as f:
                for piece in pieces:
                    f.write(piece)
                f.flush()
                os.fsync(f.fileno())
        with prepare.signals_wait():
            prepare.outcome = f"{folder} is incomplete; run again with --overwrite"
            for path in [last] * bool(others) + former:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
            for path in files:
                os.replace(path + ".tmp", path)
            with contextlib.suppress(OSError):  # some file systems cannot
                os.fsync(number)
            prepare.outcome = "all files are written"
    except OSError as e:
        fail(f"{e.filename or folder}: {e.strerror}; {prepare.outcome}")
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                os.remove(path)
        remove_empty(made)


# ----------------------------------------------------------------------------------------------------------------------


def read_input(path):
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            fail(f"{path}: this folder has no config.json, so it is none of Hugging Face's; else name a file")
        return read_hugging_face(path)
    begin = read_file(path, 4)
    if begin == struct.pack("<i", MODEL):
        return read_model(path)
    if begin[:2] == b"PK":
        return read_nanogpt(path)
    if begin[:1] == b"\x80":
        return SimpleNamespace(path=path, config=None, tokenizer=read_nanogpt_characters(path))
    fail(f"{path}: neither a model of train_gpt2, llm.c or nanoGPT nor nanoGPT's meta.pkl; of Hugging Face's models, "
         "name the folder")


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("input", metavar="IN", help="what to convert")
    p.add_argument("out", metavar="OUT", help="a .bin file, or a folder, made if need be")
    p.add_argument("--to", metavar="NAME", default="train_gpt2", choices=["train_gpt2", "llm.c", "hf"],
                   help="what to write: train_gpt2, llm.c or hf (default: train_gpt2)")
    p.add_argument("--precision", metavar="NAME", default="fp32", choices=["fp32", "bf16"],
                   help="of the weights written: fp32 or bf16; llm.c's GPU program needs bf16 (default: fp32)")
    p.add_argument("--overwrite", action="store_true", help="replace files in OUT")
    return p.parse_args()


def bin_files(o, model, bf16):
    """The contents of model.bin and of tokenizer.bin, as far as IN has them."""
    if model.config and model.config["attention"] != "vanilla" and o.to == "llm.c":
        fail(f"{o.input}: its attention is {model.config['attention']}, which llm.c cannot compute")
    in_folder = os.path.isdir(o.out) or not o.out.endswith(".bin")
    if in_folder and os.path.exists(o.out) and not os.path.isdir(o.out):
        fail(f"{o.out} is a file; name a folder, or a file that ends in .bin")
    files = {}
    if model.tokenizer:
        files[os.path.join(o.out, "tokenizer.bin")] = [model.tokenizer[2]]
    if model.config:
        files[os.path.join(o.out, "model.bin")] = model_file(model, bf16, trailer=o.to == "train_gpt2")
        former = os.path.join(o.out, "tokenizer.bin")
        if not model.tokenizer and in_folder and os.path.exists(former):
            n = len(read_vocabulary(former)[0])
            if n != model.config["V"]:
                fail(f"{former} has {count(n, 'token')}, but {o.input} has a vocabulary of {model.config['V']:,}; give "
                     "another OUT, or remove that file")
            model.note = f"{o.input} has none; {former}, which was there, is taken to be its"
    if not in_folder:
        *others, last = files.values()
        files = {o.out: last}
        if others:
            model.tokenizer, model.note = None, "if OUT is a folder, it becomes tokenizer.bin there"
    for path in reversed(files):
        if os.path.isdir(path):
            fail(f"{path} is a folder")
        if os.path.lexists(path) and not o.overwrite:
            fail(f"{path} exists; give another OUT, or --overwrite to replace it")
    return files


HUGGING_FACE_NAMES = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", CODE, "generation_config.json",
                      "config.json"]  # that this program writes


def former_files(o):
    """What --overwrite replaces in a folder for Transformers. All must be this program's, since Transformers could read
    the others together with the new ones."""
    if os.path.lexists(o.out) and not os.path.isdir(o.out):
        fail(f"{o.out} is a file; with --to hf, OUT is a folder")
    former = sorted(name for name in os.listdir(o.out) if not name.startswith(".")) if os.path.isdir(o.out) else []
    for name in former:
        path = os.path.join(o.out, name)
        if name.removesuffix(".tmp") not in HUGGING_FACE_NAMES or os.path.isdir(path):
            fail(f"{path} is nothing that this program writes for Transformers; give another OUT, an empty folder")
        if not o.overwrite:
            fail(f"{path} exists; give another OUT, or --overwrite to replace the model there")
    return [os.path.join(o.out, name) for name in former if not name.endswith(".tmp")]


def convert(o):
    model, bf16 = read_input(o.input), o.precision == "bf16"
    if o.to != "hf":
        files, former = bin_files(o, model, bf16), []
    elif not model.config:
        fail(f"{o.input}: a vocabulary alone can only become a tokenizer.bin, without --to")
    else:
        former = former_files(o)
        files = {os.path.join(o.out, name): content for name, content in hugging_face_files(model, bf16).items()}
    write(files, former)
    lines = []
    if c := model.config:
        settings = "/".join(str(c[name]) for name in own_settings(c["attention"]))
        lines.append(f"{o.out if o.to == 'hf' else [*files][-1]}: {count(c['L'], 'layer')}, {count(c['NH'], 'head')}, "
                     f"{count(c['C'], 'channel')}, context {c['maxT']:,}, vocabulary {c['V']:,}, "
                     f"{c['attention']} {settings}".rstrip() + f", {o.precision}")
    if model.tokenizer:
        path = next(path for path in files if "tokenizer" in path or not model.config)
        lines.append(f"{path}: {count(len(model.tokenizer[0]), 'token')}")
    else:
        lines.append(f"no tokenizer: {model.note}")
    prepare.say(lines)


if __name__ == "__main__":
    prepare.run(lambda: convert(options()), "a model's largest tensor is held whole")
