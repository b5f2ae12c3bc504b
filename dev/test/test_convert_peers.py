"""data_prep/convert.py against Transformers: a converted model computes the same logits, loss, gradients and text, in
both directions, and so do skip and depth by the code that is written beside them."""

import json
import os
import re
import shutil
import tempfile

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make -C dev test-peers")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # where Transformers copies the code that comes with a model
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import transformers  # noqa: E402
from helpers import contents, write_tokenizer  # noqa: E402
from prepare_helpers import prepared, refused  # noqa: E402
from test_convert import convert, run_script  # noqa: E402, F401
from test_reference import reference, run  # noqa: E402
from tokenizers import ByteLevelBPETokenizer, Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
Config = reference.Config
VANILLA = [Config(64, 130, 2, 3, 24), Config(70, 61, 2, 25, 100)]  # maxT, V, L, NH, C
OTHERS = [
    Config(64, 61, 3, 3, 24, "skip", 1, 2),  # the middle layer's keys and values are read, but by no head of its own
    Config(64, 61, 4, 3, 24, "skip", 2, 3),  # the upper layers have none of their own
    Config(64, 61, 4, 4, 32, "skip", 3, 0), Config(64, 61, 2, 2, 16, "skip", 5, 1),  # these two equal vanilla
    Config(64, 61, 4, 3, 24, "depth", None, None, 1, 0),
    Config(64, 61, 5, 2, 16, "depth", None, None, 3, 2),
]


def label(c):
    return f"{c.attention}-L{c.L}-NH{c.NH}-{c.skip_distance}.{c.skip_heads}-{c.depth_stride}.{c.depth_window}"


# Each tensor of ours and Transformers' name. Its matrices are (in, out).
LAYER = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc",
         "fcproj": "mlp.c_proj"}


def by_their_names(c, p):
    theirs = {"wte.weight": p["wte"][:c.V], "wpe.weight": p["wpe"], "ln_f.weight": p["lnfw"], "ln_f.bias": p["lnfb"]}
    for l in range(c.L):
        for ours, name in LAYER.items():
            theirs[f"h.{l}.{name}.weight"] = p[ours + "w"][l].T
            theirs[f"h.{l}.{name}.bias"] = p[ours + "b"][l]
    return {"transformer." + name: torch.tensor(np.ascontiguousarray(a)) for name, a in theirs.items()}


def by_our_names(c, theirs):
    def layers(name, matrix):
        each = [theirs[f"transformer.h.{l}.{name}"] for l in range(c.L)]
        return torch.stack([a.T if matrix else a for a in each])

    wte = theirs["transformer.wte.weight"]
    ours = {"wte": torch.cat([wte, wte.new_zeros(c.Vp - c.V, c.C)]), "wpe": theirs["transformer.wpe.weight"],
            "lnfw": theirs["transformer.ln_f.weight"], "lnfb": theirs["transformer.ln_f.bias"]}
    for name, their in LAYER.items():
        ours[name + "w"] = layers(their + ".weight", matrix=not name.startswith("ln"))
        ours[name + "b"] = layers(their + ".bias", matrix=False)
    return {name: ours[name] for name in reference.tensor_shapes(c)}


def random_parameters(c, seed):
    return reference.random_parameters(c, np.random.default_rng(seed))


def random_gpt2(c, seed=0):
    """One of Transformers, with as wide weights as the reference's."""
    config = GPT2Config(vocab_size=c.V, n_positions=c.maxT, n_embd=c.C, n_layer=c.L, n_head=c.NH, bos_token_id=None,
                        eos_token_id=None)
    model = GPT2LMHeadModel(config)
    model.load_state_dict(by_their_names(c, random_parameters(c, seed)), strict=False)
    return model


def loaded(folder, **named):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **named)


def assert_computes_the_same(c, model, path, tmp_path):
    """test_gpt2 finds the logits, loss and gradients that Transformers computes in float64 in our file's model."""
    model = model.double().train()
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0
    tokens = torch.tensor(np.random.default_rng(5).integers(0, c.V, (2, 64)))
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(loss.item(), rel=1e-6)  # what a Trainer minimizes
    loss.backward()
    gradients = by_our_names(c, {name: t.grad for name, t in model.named_parameters()})
    state = tmp_path / "transformers.state.bin"
    reference.write_arrays(state, [reference.STATE_MAGIC, 2, *x.shape, 0, 64],
                           [x, y, logits.detach(), loss.detach(), *gradients.values()])
    result = run("test_gpt2", path, state)
    assert result.returncode == 0, result.stdout + result.stderr


def greedy(model, prompt, n, **named):
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0, **named)
    return tokens[0, len(prompt):].tolist()


def our_greedy(path, prompt, n):
    result = run("train_gpt2", "generate", "--model", path, "--temperature", 0, "--tokens", n, "--prompt-tokens",
                 ",".join(map(str, prompt)))
    assert result.returncode == 0, result.stderr
    return [int(token) for token in result.stdout.split()][-n:]


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2


@pytest.mark.parametrize("c", VANILLA, ids=label)
def test_gpt2_of_transformers_there_and_back(convert, c, tmp_path):  # noqa: F811
    model = random_gpt2(c)
    model.save_pretrained(tmp_path / "hf")
    prepared(convert(tmp_path / "hf", tmp_path / "run"))
    path = tmp_path / "run" / "model.bin"
    prepared(convert(path, tmp_path / "back", "--to", "hf"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")  # no code of ours
    assert type(back) is GPT2LMHeadModel
    assert {name: t.tolist() for name, t in model.state_dict().items()} == {
        name: t.tolist() for name, t in back.state_dict().items()}
    assert_computes_the_same(c, back, path, tmp_path)
    assert our_greedy(path, [3, 1, 4], 40) == greedy(loaded(tmp_path / "hf").eval(), [3, 1, 4], 40)


def in_parts(model, out):
    model.save_pretrained(out, max_shard_size="10KB")
    assert len(list(out.glob("*.safetensors"))) > 2


def as_first_published(model, out):
    """As GPT-2 was published in 2019: without a prefix, with masks, in the format of torch.save at that time."""
    state = {name.removeprefix("transformer."): t for name, t in model.transformer.state_dict().items()}
    state |= {f"h.{l}.attn.bias": torch.ones(1, 1, 8, 8).tril() for l in range(model.config.n_layer)}
    torch.save(state, out / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def torch_in_parts(model, out):
    state = list(model.state_dict().items())  # with the tied lm_head.weight
    index = {}
    for i in range(2):
        name = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save(dict(state[i::2]), out / name)
        index |= {tensor: name for tensor, _ in state[i::2]}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("save", [in_parts, as_first_published, torch_in_parts])
def test_other_forms_of_the_same_model(convert, save, tmp_path):  # noqa: F811
    model = random_gpt2(VANILLA[0])
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "other")
    save(model, tmp_path / "other")
    prepared(convert(tmp_path / "hf", tmp_path / "a"))
    prepared(convert(tmp_path / "other", tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_bf16_of_transformers(convert, tmp_path):  # noqa: F811
    """Rounded as PyTorch rounds."""
    model = random_gpt2(VANILLA[0])
    model.save_pretrained(tmp_path / "hf")
    model.bfloat16().save_pretrained(tmp_path / "hf16")
    for name in "hf", "hf16":
        prepared(convert(tmp_path / name, tmp_path / f"{name}.bin", "--to", "llm.c", "--precision", "bf16"))
    assert (tmp_path / "hf.bin").read_bytes() == (tmp_path / "hf16.bin").read_bytes()
    prepared(convert(tmp_path / "hf.bin", tmp_path / "back", "--to", "hf", "--precision", "bf16"))
    back = loaded(tmp_path / "back").state_dict()
    assert all(torch.equal(t, back[name]) and back[name].dtype == torch.bfloat16
               for name, t in model.state_dict().items())
    c, p = reference.read_model(tmp_path / "hf.bin")
    assert all(torch.equal(p[name], t.double()) for name, t in by_our_names(c, back).items())


def test_pytorch_files_that_are_refused(convert, tmp_path):  # noqa: F811
    random_gpt2(VANILLA[0]).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    weights = tmp_path / "hf" / "pytorch_model.bin"
    torch.save({"wte.weight": Harm()}, weights)
    refused(convert(tmp_path / "hf", tmp_path / "out"), "this program runs no code of files")
    state = random_gpt2(VANILLA[0]).state_dict()
    sparse = state | {"transformer.ln_f.bias": state["transformer.ln_f.bias"].to_sparse()}
    for content, says in [([torch.ones(2)], "no tensors by name"), ({"wte.weight": 3}, "no tensors by name"),
                          ({0: torch.ones(2)}, "no tensors by name"),
                          (sparse, "ln_f.bias is no plain tensor")]:
        torch.save(content, weights)
        refused(convert(tmp_path / "hf", tmp_path / "out"), "pytorch_model.bin: ", says)
    torch.save(state, weights)
    whole = weights.read_bytes()
    for data in b"", whole[:-100], b"PK\3\4" + bytes(100):
        weights.write_bytes(data)
        refused(convert(tmp_path / "hf", tmp_path / "out"), "pytorch_model.bin: ")
    assert not (tmp_path / "out").exists() and not os.path.exists("harmed")


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


# ----------------------------------------------------------------------------------------------------------------------
# Skip and depth


@pytest.fixture(params=OTHERS, ids=label)
def other(request, convert, tmp_path):  # noqa: F811
    """A random model: its Config, our file, the folder made of it."""
    c, path = request.param, tmp_path / "model.bin"
    reference.write_model(path, c, random_parameters(c, seed=6))
    prepared(convert(path, tmp_path / "hf", "--to", "hf"))
    return c, path, tmp_path / "hf"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_code_computes_the_same(other, implementation, tmp_path):
    c, path, hf = other
    assert_computes_the_same(c, loaded(hf, attn_implementation=implementation), path, tmp_path)


def test_code_is_used_knowingly(other):
    c, path, hf = other
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=False)
    assert AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True).config.attention == c.attention


def test_cache(other):
    """Text is the same with a cache, without, and by our program."""
    c, path, hf = other
    model, prompt = loaded(hf).eval(), [3, 1, 4, 1, 5]
    text = greedy(model, prompt, 50)
    assert text == our_greedy(path, prompt, 50)
    assert text == greedy(model, prompt, 50, use_cache=False)
    assert text == greedy(model, prompt, 50, cache_implementation="static")
    beams = greedy(model, prompt, 30, num_beams=3)
    assert beams == greedy(model, prompt, 30, num_beams=3, use_cache=False)


def test_cache_keeps_what_is_read(other):
    """As many keys and values as our program keeps."""
    c, path, hf = other
    cache = loaded(hf).eval()(torch.tensor([[3, 1, 4]]), use_cache=True).cache
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)  # fp32, of 3 tokens
    described = run("train_gpt2", "describe", "--model", path).stdout
    by_attention = re.search(r"KV cache, bytes per token +(.*)", described)[1].replace(",", "").split()
    assert 4 * kept == 3 * int(by_attention[reference.GPT2.ATTENTIONS.index(c.attention)])


def test_batch_with_padding(other):
    """Texts of different lengths, padded on the left."""
    c, path, hf = other
    model, prompts = loaded(hf).eval(), [[3, 1, 4, 1, 5, 9, 2], [6, 5]]
    padded = torch.tensor([prompts[0], [0] * 5 + prompts[1]])
    mask = torch.tensor([[1] * 7, [0] * 5 + [1] * 2])
    text = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert text[:, 7:].tolist() == [greedy(model, prompt, 20) for prompt in prompts]


def test_fine_tuning_in_transformers(other, convert, tmp_path):  # noqa: F811
    c, path, hf = other
    model = loaded(hf).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, losses = torch.arange(40).reshape(2, 20), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        model.activation_checkpointing_enable()
    model.save_pretrained(tmp_path / "tuned")  # with the code
    again = loaded(tmp_path / "tuned")
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    prepared(convert(tmp_path / "tuned", tmp_path / "run"))
    assert our_greedy(tmp_path / "run" / "model.bin", [7], 30) == greedy(again.eval(), [7], 30)
    prepared(convert(hf, tmp_path / "untuned.bin"))
    assert (tmp_path / "untuned.bin").read_bytes()[1024:-20] == path.read_bytes()[1024:]


def test_bf16_of_the_code(convert, tmp_path):  # noqa: F811
    c = OTHERS[-1]
    reference.write_model(tmp_path / "model.bin", c, random_parameters(c, seed=6))
    prepared(convert(tmp_path / "model.bin", tmp_path / "hf", "--to", "hf", "--precision", "bf16"))
    model, x = loaded(tmp_path / "hf"), torch.arange(30).reshape(1, 30)
    assert model.dtype == torch.bfloat16
    exact = loaded(tmp_path / "hf", dtype=torch.float32)(x).logits
    assert (model(x).logits - exact).abs().max() < 0.1 * exact.abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT: a state dict of its spelling, with matrices (out, in)


def nanogpt(c, path, p, bias=True, prefix="_orig_mod.", mask=False, **arguments):
    state = {name: (t.T.contiguous() if ".h." in name and t.ndim == 2 else t)
             for name, t in by_their_names(c, p).items() if bias or not name.endswith(".bias")}
    if mask:
        state |= {f"transformer.h.{l}.attn.bias": torch.ones(1, 1, c.maxT, c.maxT) for l in range(c.L)}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    arguments = {"n_layer": c.L, "n_head": c.NH, "n_embd": c.C, "block_size": c.maxT, "bias": bias, "dropout": 0.0,
                 "vocab_size": c.V} | arguments
    torch.save({"model": {prefix + name: t for name, t in state.items()}, "model_args": arguments, "iter_num": 7,
                "best_val_loss": torch.tensor(1.5), "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
                "config": {"dataset": "shakespeare_char"}}, path)


@pytest.mark.parametrize("prefix, mask, bias", [("", False, True), ("_orig_mod.", True, True), ("", False, False)])
def test_nanogpt(convert, prefix, mask, bias, tmp_path):  # noqa: F811
    c = VANILLA[0]
    p = random_parameters(c, seed=8)
    nanogpt(c, tmp_path / "ckpt.pt", p, prefix=prefix, mask=mask, bias=bias)
    prepared(convert(tmp_path / "ckpt.pt", tmp_path / "run"))
    ours, read = reference.read_model(tmp_path / "run" / "model.bin")
    assert ours == c
    for name, t in read.items():
        expected = p[name] if bias or not name.endswith("b") else 0 * p[name]
        assert torch.equal(t, torch.tensor(expected, dtype=torch.float64)), name


def test_padded_vocabulary_of_nanogpt(convert, tmp_path):  # noqa: F811
    """Its default of 50,304 are GPT-2's 50,257 tokens, padded."""
    c = Config(8, 50304, 1, 1, 4)
    p = random_parameters(c, seed=9)
    nanogpt(c, tmp_path / "ckpt.pt", p)
    assert "vocabulary 50,257" in prepared(convert(tmp_path / "ckpt.pt", tmp_path / "run"))
    c, read = reference.read_model(tmp_path / "run" / "model.bin")
    assert c.V == 50257 and torch.equal(read["wte"][:c.V], torch.tensor(p["wte"][:c.V]).double())
    assert not read["wte"][c.V:].any() and torch.equal(read["lnfb"], torch.tensor(p["lnfb"]).double())


def test_nanogpt_that_is_refused(convert, tmp_path):  # noqa: F811
    c, path = VANILLA[0], tmp_path / "ckpt.pt"
    p = random_parameters(c, seed=8)
    for named, says in [({"n_layer": 3}, "h.2.ln_1.weight is missing"), ({"n_head": 5}, "not a multiple of 5 heads"),
                        ({"block_size": None}, "its context is None"), ({"vocab_size": 131}, "must have 131 x 24")]:
        nanogpt(c, path, p, **named)
        refused(convert(path, tmp_path / "out"), says)
    nanogpt(c, path, p, bias=False)
    content = torch.load(path)
    for broken, says in [({"model_args": content["model_args"] | {"bias": True}}, "h.0.ln_1.bias is missing"),
                         ({"model_args": 3}, "not a checkpoint of nanoGPT"), ({"model": [1]}, "not a checkpoint"),
                         ({"model": {"a": 1}}, "holds no tensors by name"), ({"config": Harm()}, "runs no code")]:
        torch.save(content | broken, path)
        refused(convert(path, tmp_path / "out"), says)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = "First line.\nSecond: naïve café, 東京, 🙂.\n\n\tend of\r\n  text   we'll 12345 x\u00a0y\n"


def assert_same_tokens(program_file, tokenizer, root, tmp_path):
    """prepare.py, with this tokenizer.bin, encodes text as Transformers does."""
    (tmp_path / "text").write_bytes(TEXT.encode())
    prepared(run_script(root, "prepare.py", "--tokenizer", program_file, "--out", tmp_path / "data",
                        "--val-fraction", 0, tmp_path / "text"))
    tokens = np.fromfile(tmp_path / "data" / "train_000.bin", "<u2", offset=1024).tolist()
    if np.fromfile(program_file, "<i4", 4)[3] >= 0:
        tokens = tokens[1:]  # end of text begins it
    assert tokenizer(TEXT)["input_ids"] == tokens
    assert tokenizer.decode(tokens) == TEXT


@pytest.fixture
def learned(tmp_path):
    """A tokenizer of Transformers that learned from a text, with its end of text as the first or the last token."""

    def learn(first):
        tokenizer = ByteLevelBPETokenizer()
        (tmp_path / "corpus").write_text((TEXT + "the cat and the dog and the cafés ") * 50)
        tokenizer.train([str(tmp_path / "corpus")], vocab_size=330, min_frequency=2, show_progress=False,
                        special_tokens=["<|endoftext|>"] if first else [])
        if not first:
            tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(tmp_path / "learned.json"))
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "learned.json"),
                                                    bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return learn


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_parts", [True, False])
def test_tokenizer_of_transformers_there_and_back(convert, root, learned, first, in_parts, tmp_path):  # noqa: F811
    tokenizer = learned(first)
    hf = tmp_path / "hf"
    model = random_gpt2(Config(64, len(tokenizer), 1, 1, 8))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(hf)
    tokenizer.save_pretrained(hf)
    if in_parts:
        Tokenizer.from_file(str(hf / "tokenizer.json")).model.save(str(hf))
        (hf / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": tokenizer.eos_token_id}))
        (hf / "tokenizer.json").unlink()
    prepared(convert(hf, tmp_path / "run"))
    assert_same_tokens(tmp_path / "run" / "tokenizer.bin", tokenizer, root, tmp_path)
    prepared(convert(tmp_path / "run" / "model.bin", tmp_path / "back", "--to", "hf"))
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.eos_token_id == back.bos_token_id == tokenizer.eos_token_id and len(back) == len(tokenizer)
    assert back(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] and back.model_max_length == 64
    assert tokenizer.get_vocab() == back.get_vocab()


@pytest.mark.parametrize("c", [VANILLA[0], OTHERS[0]], ids=label)
@pytest.mark.parametrize("kind", ["bytes", "chars"])
def test_simple_tokenizers(convert, root, c, kind, tmp_path):  # noqa: F811
    tokens = [bytes([b]) for b in range(256)] if kind == "bytes" else [c.encode() for c in sorted({*TEXT, *"abcdefg"})]
    tokens += [b"<|endoftext|>"]
    c = Config(200, len(tokens), c.L, c.NH, c.C, c.attention, c.skip_distance, c.skip_heads)
    (tmp_path / "run").mkdir()
    reference.write_model(tmp_path / "run" / "model.bin", c, random_parameters(c, seed=3))
    write_tokenizer(tmp_path / "run" / "tokenizer.bin", tokens, len(tokens) - 1)
    prepared(convert(tmp_path / "run" / "model.bin", tmp_path / "hf", "--to", "hf"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert_same_tokens(tmp_path / "run" / "tokenizer.bin", tokenizer, root, tmp_path)
    write = pipeline("text-generation", model=str(tmp_path / "hf"), trust_remote_code=True)
    result = run("train_gpt2", "generate", "--model", tmp_path / "run" / "model.bin", "--prompt", "end", "--tokens", 20,
                 "--temperature", 0)
    text = write("end", max_new_tokens=20, do_sample=False)[0]["generated_text"].split("<|endoftext|>")[0]
    assert len(text) > 4 and result.stdout.startswith(text.replace("\r", "\n"))  # run() reads \r as \n


def test_gpt2s_own_tokenizer(convert, root, test_data, gpt2_bpe, tmp_path):  # noqa: F811
    hf = tmp_path / "hf"
    random_gpt2(Config(8, 50257, 1, 1, 4)).save_pretrained(hf)
    shutil.copy(test_data / "gpt2" / "encoder.json", hf / "vocab.json")
    shutil.copy(test_data / "gpt2" / "vocab.bpe", hf / "merges.txt")
    prepared(convert(hf, tmp_path / "run"))
    prepared(run_script(root, "prepare.py", "--tokenizer", "gpt2", "--out", tmp_path / "data", "--val-fraction", 0,
                        hf / "merges.txt"))
    assert (tmp_path / "run" / "tokenizer.bin").read_bytes() == (tmp_path / "data" / "tokenizer.bin").read_bytes()
    prepared(convert(tmp_path / "run" / "model.bin", tmp_path / "back", "--to", "hf"))
    merges = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == (hf / "merges.txt").read_text().strip().split("\n")[1:]
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["vocab"] == json.loads(
        (hf / "vocab.json").read_text())
    text = (test_data / "tinyshakespeare.txt").read_text()[:100_000] + TEXT
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text)["input_ids"] == gpt2_bpe.encode(text)
