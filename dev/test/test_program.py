"""The program from outside: options, files, checkpoints, data, signals, generation."""
import array, os, random, re, signal, struct, subprocess, sys, time, zlib, shutil, pathlib, math
import pytest

BIN = os.environ.get("BIN", "/tmp/program/t")
ENV = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
SHAPE = "--layers 3 --heads 2 --channels 16 --context 32 --batch 4 --sequence 16".split()


def run(*args, code=0, cwd=None, env=ENV, binary=False, timeout=120):
    p = subprocess.run([BIN, *map(str, args)], capture_output=True, cwd=cwd, env=env, timeout=timeout)
    out, err = p.stdout, p.stderr
    if not binary:
        out, err = out.decode(), err.decode()
    assert p.returncode == code, (p.returncode, out[-2000:], err[-2000:])
    return out, err


def fails(*args, says="", cwd=None, env=ENV):
    out, err = run(*args, code=1, cwd=cwd, env=env)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(says, err), err
    print(err, end="")
    return err


def shard(path, tokens, header=True):
    body = array.array("H", tokens).tobytes()
    head = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) if header else b""
    pathlib.Path(path).write_bytes(head + body)


def text_tokens(n, seed=0, V=257):
    r = random.Random(seed)
    words = ["".join(r.choice("abcdefgh") for _ in range(r.randint(1, 6))) for _ in range(30)]
    s = " ".join(r.choice(words) for _ in range(n))[:n]
    return [256] + [ord(c) for c in s[: n - 1]]


def tokenizer(path, tokens, eot, version=2, extra=b""):
    head = struct.pack("<256i", 20240328, version, len(tokens), eot, len(extra), *[0] * 251)
    pathlib.Path(path).write_bytes(head + b"".join(bytes([len(t)]) + t for t in tokens) + extra)


BYTES = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    for i, n in enumerate([700, 1500, 333]):
        shard(d / f"train_{i}.bin", text_tokens(n, i))
    shard(d / "val_0.bin", text_tokens(400, 7))
    tokenizer(d / "tokenizer.bin", BYTES, 256)
    return d


def train_args(data, out, *more, steps=10, save=3):
    return ["train", "--train", f"{data}/train_*.bin", "--val", f"{data}/val_*.bin", "--out", out, *SHAPE,
            "--steps", steps, "--val-every", 4, "--save-every", save, "--lr", "3e-3", "--total-batch", 128, *more]


def metrics(out):
    rows = [r.split(",") for r in (pathlib.Path(out) / "metrics.csv").read_text().splitlines()]
    return [r[:5] for r in rows]


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    runs = {}
    for attention in "vanilla", "skip", "depth":
        out = tmp_path_factory.mktemp("whole") / attention
        run(*train_args(data, out, "--attention", attention))
        runs[attention] = out
    return runs


@pytest.fixture(scope="session")
def model(whole):
    return whole["depth"] / "model.bin"


def test_files(whole):
    for attention, out in whole.items():
        assert sorted(os.listdir(out)) == ["metrics.csv", "model.bin", "tokenizer.bin"]
        rows = metrics(out)
        assert rows[0] == ["step", "train_loss", "val_loss", "lr", "grad_norm"] and len(rows) == 11
        assert [r[0] for r in rows[1:]] == [str(i) for i in range(1, 11)]
        assert [bool(r[2]) for r in rows[1:]] == [i in (4, 8, 10) for i in range(1, 11)]
        b = (out / "model.bin").read_bytes()
        h = struct.unpack("<256i", b[:1024])
        assert h[:8] == (20240326, 3 if attention == "vanilla" else 1003, 32, 257, 3, 2, 16, 384) and h[255] == 1
        magic, c1, c2, length = struct.unpack("<IIIQ", b[-20:])
        n = (384 + 32) * 16 + 3 * (4 * 16 + 12 * 256 + 9 * 16) + 32
        assert length == len(b)
        assert c1 == zlib.crc32(b[: 1024 + 4 * n]) and c2 == zlib.crc32(b[1024 + 4 * n : -20])
        (k,) = struct.unpack("<Q", b[1024 + 4 * n : 1024 + 4 * n + 8])
        assert len(b) == 1024 + 12 * n + 8 + k + 20
        # padded rows stay 0
        assert not any(b[1024 + 4 * 257 * 16 : 1024 + 4 * 384 * 16])


def test_threads(data, whole, tmp_path):
    for attention in whole:
        for n in 2, 3:
            out = tmp_path / f"{attention}{n}"
            run(*train_args(data, out, "--attention", attention), env=dict(ENV, OMP_NUM_THREADS=str(n)))
            assert (out / "model.bin").read_bytes() == (whole[attention] / "model.bin").read_bytes()
            assert metrics(out) == metrics(whole[attention])


def stop_at(args, step, sig, extra=0.0):
    p = subprocess.Popen([BIN, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, text=True)
    for line in p.stdout:
        if line.startswith(f"step {step}/"):
            break
    time.sleep(extra)
    p.send_signal(sig)
    rest = p.stdout.read()
    err = p.stderr.read()
    return p.wait(), rest, err


@pytest.mark.parametrize("attention", ["vanilla", "skip", "depth"])
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stop_resume(data, tmp_path, attention, sig):
    steps = 3000
    full, out = tmp_path / "full", tmp_path / "out"
    args = lambda o: train_args(data, o, "--attention", attention, "--sample-every", 500, steps=steps, save=250)
    run(*args(full))
    code, rest, err = stop_at(args(out), 400, sig)
    assert code == (-9 if sig == signal.SIGKILL else 0), (code, err)
    if sig != signal.SIGKILL:
        assert "--resume" in rest
    code, _, err = stop_at(["train", "--out", out, "--resume"], 1500, sig)
    assert code == (-9 if sig == signal.SIGKILL else 0), (code, err)
    done, _ = run("train", "--out", out, "--resume")
    assert (out / "model.bin").read_bytes() == (full / "model.bin").read_bytes()
    assert metrics(out) == metrics(full)
    again, _ = run("train", "--out", out, "--resume")
    assert "complete" in again
    assert not list(out.glob("*.tmp"))


def test_stop_in_validation(data, tmp_path):
    # a large validation set, so that the signal lands in it
    val = tmp_path / "v.bin"
    shard(val, text_tokens(400000, 3))
    full, out = tmp_path / "full", tmp_path / "out"
    args = lambda o: ["train", "--train", f"{data}/train_*.bin", "--val", val, "--out", o, *SHAPE, "--steps", 4,
                      "--val-every", 2, "--val-batches", 0, "--tokenizer", data / "tokenizer.bin"]
    run(*args(full))
    code, rest, err = stop_at(args(out), 1, signal.SIGTERM, 0.4)
    assert code == 0, err
    rows = metrics(out)
    print(rows, rest)
    assert len(rows) == 2  # step 2's row is due
    (out / "model.bin").read_bytes()
    run("train", "--out", out, "--resume")
    assert (out / "model.bin").read_bytes() == (full / "model.bin").read_bytes()
    assert metrics(out) == metrics(full)


def test_second_signal(data, tmp_path):
    big = tmp_path / "b.bin"
    shard(big, text_tokens(100000, 3))
    p = subprocess.Popen([BIN, "train", "--train", str(big), "--out", str(tmp_path / "o"), "--tokenizer", f"{data}/tokenizer.bin",
                          "--layers", "8", "--channels", "256", "--heads", "4", "--context", "512", "--batch", "16",
                          "--sequence", "512", "--steps", "100"] , stdout=subprocess.PIPE, env=ENV, text=True)
    for line in p.stdout:
        if line.startswith("options"):
            break
    time.sleep(1.5)
    p.send_signal(signal.SIGINT)
    time.sleep(0.1)
    t = time.time()
    p.send_signal(signal.SIGINT)
    assert p.wait() == 130 and time.time() - t < 0.5


def test_lock(data, tmp_path):
    out = tmp_path / "o"
    args = train_args(data, out, steps=100000, save=1000)
    p = subprocess.Popen([BIN, *map(str, args)], stdout=subprocess.PIPE, env=ENV, text=True)
    for line in p.stdout:
        if line.startswith("step 5/"):
            break
    fails(*args, says="in use")
    fails(*args, "--overwrite", says="in use")
    fails("train", "--out", out, "--resume", says="in use")
    p.kill()
    p.wait()
    fails(*args, says="holds a run")


OPTION_ERRORS = [
    (["--step", "3"], "did you mean --steps"),
    (["--lr"], "--lr needs a value"),
    (["--lr", "--steps", "5"], "--lr needs a value"),
    (["--lr", "1", "--lr", "1"], "twice"),
    (["--steps", "12abc"], "whole number"),
    (["--steps", "1.5"], "whole number"),
    (["--steps", ""], "whole number"),
    (["--steps", " 5"], "whole number"),
    (["--steps", "-5"], "must be from 1"),
    (["--steps", "0"], "must be from 1"),
    (["--steps", "99999999999999999999"], "must be from 1"),
    (["--lr", "nan"], "must be a number"),
    (["--lr", "inf"], "must be a number"),
    (["--lr", "1e999"], "must be from"),
    (["--lr", "-1"], "must be from"),
    (["--lr", "0x1"], "must be a number"),
    (["--lr", "1e-3x"], "must be a number"),
    (["--lr=1"], "blank"),
    (["--resume=1"], "blank|in place"),
    (["--attention", "skp"], "did you mean skip"),
    (["--schedule", "cos"], "cosine"),
    (["--temperature", "1"], "not an option of train"),
    (["stray"], "stray"),
    (["--resume", "--overwrite"], "one of them"),
    (["--skip-heads", "1"], "needs --attention skip"),
    (["--attention", "depth", "--skip-distance", "1"], "needs --attention skip"),
    (["--attention", "skip", "--depth-stride", "1"], "needs --attention depth"),
    (["--attention", "skip", "--skip-heads", "3"], "skip heads 3.*to 2"),
    (["--attention", "skip", "--skip-distance", "0"], "from 1"),
    (["--attention", "depth", "--depth-stride", "0"], "from 1"),
    (["--attention", "depth", "--depth-window", "-1"], "from 0"),
    (["--heads", "3"], "not a multiple"),
    (["--sequence", "33"], "context"),
    (["--total-batch", "100"], "not a multiple"),
    (["--warmup", "100"], "more than --steps"),
    (["--min-lr", "1"], "more than --lr"),
    (["--vocab", "100"], "tokenizer.bin has 257"),
    (["--precision", "bf16"], "bf16"),
    (["--model", "gpt3"], "no such file"),
    (["--model", "/tmp"], "folder"),
    (["--batch", "65536"], "multiple"),
]


@pytest.mark.parametrize("more,says", OPTION_ERRORS)
def test_option_errors(data, tmp_path, more, says):
    out = tmp_path / "o"
    args = [str(a) for a in train_args(data, out)]
    for name in more[::2]:
        if name in args and more.count(name) == 1:
            i = args.index(name)
            del args[i : i + 2]
    fails(*args, *more, says=says)
    assert not out.exists()


def test_commands():
    fails("trian", says="did you mean train")
    fails("--steps", "5", says="command")
    out, err = run(code=1)
    assert "Commands" in err and not out
    for args in ["--help"], ["-h"], ["train", "--help"], ["eval", "--lr", "--help"], ["generate", "-h"], ["describe", "--help"]:
        out, err = run(*args)
        assert "--attention" in out and not err
    assert "--lr" in run("train", "--help")[0] and "--lr" not in run("eval", "--help")[0]


def test_no_files(data, tmp_path):
    o = tmp_path / "o"
    base = ["train", *SHAPE, "--steps", 5]
    fails(*base, "--train", f"{data}/train_*.bin", says="--out")
    fails(*base, "--out", o, says="--train")
    fails(*base, "--out", o, "--train", tmp_path / "x*", says="no such file")
    fails(*base, "--out", o, "--train", "", says="--train")
    fails(*base, "--out", o, "--train", data, says="folder")
    fails(*base, "--out", o, "--train", "/dev/null", says="regular")
    fails(*base, "--out", o, "--train", f"{data}/train_*.bin", "--val", f"{data}/nope", says="--val")
    fails(*base, "--out", o, "--train", f"{data}/train_0.bin", f"{data}/train_1.bin", says="quotes")
    fails("train", "--out", o, "--resume", says="nothing to resume")
    os.mkdir(o)
    fails("train", "--out", o, "--resume", says="nothing to resume")
    assert os.listdir(o) == []
    file = tmp_path / "file"
    file.write_text("x")
    fails(*train_args(data, file), says="Not a directory")
    fails(*train_args(data, file / "x"), says="Not a directory")
    fails(*train_args(data, "/proc/x"), says="--out /proc/x")


def broken_shards(tmp):
    good = struct.pack("<256i", 20240520, 1, 100, *[0] * 253) + array.array("H", range(100)).tobytes()
    yield "truncated", good[:-2], "has 1222 bytes where its header asks for 1224"
    yield "odd", good[:-1], "has 1223 bytes"
    yield "short", good[:500], "asks for"
    yield "longer", good + b"xx", "asks for"
    yield "empty", b"", "empty"
    yield "magic", struct.pack("<i", 1234) + good[4:], "begins with 1234"
    yield "version", good[:4] + struct.pack("<i", 2) + good[8:], "version 2"
    yield "count", good[:8] + struct.pack("<i", -1) + good[12:], "asks for"
    yield "odd2", b"a" * 101, "uint16"
    yield "model", struct.pack("<i", 20240326) + good[4:], "is a model"
    yield "token", good[:1024] + array.array("H", [300] * 100).tobytes(), r"token \d+ .at byte 1\d+. is 300"
    yield "token2", good[:1024] + array.array("H", list(range(40)) + [257] + [5] * 59).tobytes(), "token 40 .at byte 1104. is 257"


def test_broken_shards(data, tmp_path):
    for name, content, says in broken_shards(tmp_path):
        p = tmp_path / f"{name}.bin"
        p.write_bytes(content)
        o = tmp_path / "o"
        tok = ["--tokenizer", data / "tokenizer.bin"]
        fails("train", "--train", p, "--out", o, *SHAPE, "--batch", 1, *tok, says=says) if False else None
        shape = "--layers 3 --heads 2 --channels 16 --context 32 --batch 6 --sequence 16".split()
        fails("train", "--train", p, "--out", o, *shape, *tok, says=says)
        fails("train", "--train", f"{data}/train_*", "--val", p, "--out", o, *shape, *tok, says=says)
        assert not o.exists()
    p = tmp_path / "shorter.bin"
    shard(p, range(16))
    fails("train", "--train", p, "--out", o, *SHAPE, "--tokenizer", data / "tokenizer.bin", says="16 tokens.*takes 17")
    shutil.copy(data / "train_1.bin", tmp_path / "shorter2.bin")
    out, _ = run("train", "--train", tmp_path / "shorter*", "--out", o, *SHAPE, "--steps", 2, "--tokenizer", data / "tokenizer.bin")
    assert "left out" in out


def test_headerless(data, tmp_path):
    o = tmp_path
    for i in range(3):
        b = (data / f"train_{i}.bin").read_bytes()
        (tmp_path / f"train_{i}.bin").write_bytes(b[1024:])
    (tmp_path / "val_0.bin").write_bytes((data / "val_0.bin").read_bytes()[1024:])
    a, b = tmp_path / "a", tmp_path / "b"
    out, _ = run(*train_args(tmp_path, a), "--tokenizer", data / "tokenizer.bin")
    assert "headerless" in out
    run(*train_args(data, b))
    assert metrics(a) == metrics(b)


def rewrite(b, at, fmt, *values):
    return b[:at] + struct.pack(fmt, *values) + b[at + struct.calcsize(fmt) :]


def test_broken_models(whole, tmp_path, data):
    b = (whole["skip"] / "model.bin").read_bytes()
    p = tmp_path / "m.bin"
    bad = [(b[:n], "no model|has|trailer") for n in (0, 4, 1000, 1024, 2000, len(b) // 2, len(b) - 21, len(b) - 20, len(b) - 1)]
    bad.append((b + b"x", "trailer|damaged"))
    for field, values in {0: [1, 20240520], 1: [0, 1, 2, 3, 5, 1005, 1004, -1], 2: [0, -1, 33, 2**31 - 1], 3: [0, 256, 258, 70000, -5],
                          4: [0, 2, -1, 2**31 - 1], 5: [0, 3, 1, 17, -2**31], 6: [0, 15, 32, 2**31 - 1, -16], 7: [256, 383, 512, 0],
                          8: [0, 2, 3, -1], 9: [0, -1, 1, 2**31 - 1], 10: [-1, 3, 2, 0, 2**31 - 1], 255: [0, 2, -1], 100: [1]}.items():
        bad += [(rewrite(b, 4 * field, "<i", v), "") for v in values if struct.unpack_from("<i", b, 4 * field)[0] != v]
    for content, says in bad:
        p.write_bytes(content)
        fails("generate", "--model", p, says=says)
    # a change at any byte: a random one of each region
    r = random.Random(1)
    out = tmp_path / "o"
    shutil.copytree(whole["skip"], out)
    n = (384 + 32) * 16 + 3 * (4 * 16 + 12 * 256 + 9 * 16) + 32
    for at in [*range(0, 60, 4), 1023, *[r.randrange(len(b)) for _ in range(40)], 1024 + 4 * n, 1024 + 4 * n + 9, *range(len(b) - 20, len(b))]:
        c = bytearray(b)
        c[at] ^= 1 << r.randrange(8)
        (out / "model.bin").write_bytes(c)
        fails("train", "--resume", "--out", out, "--steps", 10)
    # weights only
    pure = b[: 1020] + struct.pack("<i", 0) + b[1024 : 1024 + 4 * n]
    (out / "model.bin").write_bytes(pure)
    fails("train", "--resume", "--out", out, says="without training state")
    run("generate", "--model", out / "model.bin", "--tokens", 3)


def test_tokenizers(model, tmp_path):
    good = tmp_path / "t.bin"
    tokenizer(good, BYTES, 256)
    b = good.read_bytes()
    p = tmp_path / "p.bin"
    for content, says in [(b[:100], ""), (b[:-1], "truncated"), (b[:1030], "truncated"), (b + b"x", "ask for"), (b"", ""),
                          (rewrite(b, 0, "<i", 5), "begins with 5"), (rewrite(b, 4, "<i", 3), "version 3"),
                          (rewrite(b, 8, "<i", 0), "vocabulary of 0"), (rewrite(b, 8, "<i", 2**31 - 1), "vocabulary"),
                          (rewrite(b, 8, "<i", 256), "ask for"), (rewrite(b, 8, "<i", 258), "truncated"),
                          (rewrite(b, 16, "<i", 1), "ask for"), (rewrite(b, 16, "<i", -1), "ask for"), (rewrite(b, 1024, "B", 0), "empty")]:
        p.write_bytes(content)
        fails("generate", "--model", model, "--tokenizer", p, says=says)
    fails("generate", "--model", model, "--tokenizer", tmp_path / "none", says="No such file")
    tokenizer(p, BYTES, 256, extra=b"merges")
    run("generate", "--model", model, "--tokenizer", p, "--tokens", 3)
    tokenizer(p, BYTES, -1, version=1)
    a, _ = run("generate", "--model", model, "--tokenizer", p, "--tokens", 3)  # eot 50256 is none: a newline
    assert a.startswith("\n")
    tokenizer(p, [b"ab" + bytes([i]) for i in range(256)] + [b"x"], -1)
    fails("generate", "--model", model, "--tokenizer", p, "--prompt", "a", says="merges")
    fails("generate", "--model", model, "--tokenizer", p, says="empty prompt")
    out, _ = run("generate", "--model", model, "--tokenizer", p, "--prompt-tokens", "1,2", "--tokens", 0)
    assert out == "ab\ufffdab\ufffd\n" or out == "ab\x01ab\x02\n"


def test_encode(model, tmp_path):
    chars = ["\n", " ", "a", "b", "é", "日", "😀"]
    toks = [c.encode() for c in chars] + [b"z%d" % i for i in range(0)]
    toks += [chr(0x4000 + i).encode() for i in range(257 - len(toks) - 1)] + [b"<|endoftext|>"]
    p = tmp_path / "t.bin"
    tokenizer(p, toks, 256)
    t = "a é日b😀\n"
    out, _ = run("generate", "--model", model, "--tokenizer", p, "--prompt", t, "--tokens", 0)
    assert out == t + "\n"
    fails("generate", "--model", model, "--tokenizer", p, "--prompt", "aéx", says=r"'x' \(at byte 3\)")
    fails("generate", "--model", model, "--tokenizer", p, "--prompt", "aü", says=r"'ü'")
    fails("generate", "--model", model, "--tokenizer", p, "--prompt", "<|endoftext|>", says=r"'<'")
    tokenizer(p, [bytes([255 - i]) for i in range(256)] + [b"<|endoftext|>"], 256)
    out, _ = run("generate", "--model", model, "--tokenizer", p, "--prompt", t + "<|endoftext|>", "--tokens", 0)
    assert out == t + "<|endoftext|>\n"


def test_utf8(model, tmp_path):
    r = random.Random(0)
    pool = [0x41, 0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0x9F, 0xA0, 0x90, 0x8F, 0xE2, 0x82, 0xAC, 0xFF]
    for _ in range(40):
        b = bytes(r.choice(pool) for _ in range(40))
        out, _ = run("generate", "--model", model, "--prompt-tokens", ",".join(map(str, b)), "--tokens", 0, binary=True)
        assert out.decode() == b.decode("utf-8", "replace") + "\n"


def test_generate(whole, tmp_path, data):
    m = whole["skip"] / "model.bin"
    a = run("generate", "--model", m, "--prompt", "abc", "--tokens", 100)
    b = run("generate", "--model", m, "--prompt", "abc", "--tokens", 100)
    c = run("generate", "--model", m, "--prompt", "abc", "--tokens", 100, "--seed", 5)
    assert a[0] == b[0] != c[0] and a[0].startswith("abc") and "tokens/s" in a[1]
    g = run("generate", "--model", m, "--prompt", "abc", "--tokens", 100, "--temperature", 0)[0]
    assert g == run("generate", "--model", m, "--prompt", "abc", "--tokens", 100, "--top-k", 1)[0]
    assert g == run("generate", "--model", m, "--prompt", "abc", "--tokens", 100, "--top-p", 0)[0]
    assert g == run("generate", "--model", m, "--prompt", "abc", "--tokens", 100, "--temperature", 1e-9)[0]
    fails("generate", "--model", "gpt2", says="without weights")
    fails("generate", says="--model")
    fails("generate", "--model", m, "--prompt", "a", "--prompt-tokens", "1", says="not both")
    for bad in "1,", ",1", "", "1,,2", "1, 2", "-1", "257", "99999999999", "1.5", "a", "+1":
        fails("generate", "--model", m, "--prompt-tokens", bad, says="prompt-tokens")
    fails("generate", "--model", m, "--layers", 4, says="contradicts")
    fails("generate", "--model", m, "--vocab", 4, says="contradicts")
    run("generate", "--model", m, "--layers", 3, "--tokens", 1)
    for att in "vanilla", "depth", "skip":
        run("generate", "--model", m, "--attention", att, "--tokens", 40)
    bare = tmp_path / "bare.bin"
    shutil.copy(m, bare)
    fails("generate", "--model", bare, says="empty prompt")
    fails("generate", "--model", bare, "--prompt", "x", says="tokenizer")
    out, _ = run("generate", "--model", bare, "--prompt-tokens", "5,256,7", "--tokens", 50)
    assert len(out.split()) == 53 and all(0 <= int(t) < 257 for t in out.split())
    # a prompt longer than the context equals the same text reached token by token
    for n in range(1, 110, 7):
        long = [int(t) for t in run("generate", "--model", bare, "--prompt-tokens", "97", "--tokens", n, "--temperature", 0)[0].split()]
        more = run("generate", "--model", bare, "--prompt-tokens", ",".join(map(str, long)), "--tokens", 20, "--temperature", 0)[0].split()
        all_ = run("generate", "--model", bare, "--prompt-tokens", "97", "--tokens", n + 20, "--temperature", 0)[0].split()
        assert more == all_, n


def test_pipe(model):
    p = subprocess.Popen(f"{BIN} generate --model {model} --tokens 2000 2>err.txt | head -c 10", shell=True, stdout=subprocess.PIPE, cwd="/tmp/program", env=ENV)
    assert len(p.stdout.read()) <= 10
    p.wait()
    assert "rror" not in open("/tmp/program/err.txt").read()


def test_eval(whole, data, tmp_path):
    m = whole["depth"] / "model.bin"
    out, _ = run("eval", "--model", m, "--val", data / "val_0.bin", "--sequence", 16, "--batch", 4)
    print(out)
    v = [r for r in metrics(whole["depth"])][-1][2]
    loss = float(re.search(r"loss +([\d.]+)", out)[1])
    assert abs(loss - float(v)) < 1e-5
    for batch in 1, 3, 7, 100:
        o, _ = run("eval", "--model", m, "--val", data / "val_0.bin", "--sequence", 16, "--batch", batch)
        assert abs(float(re.search(r"loss +([\d.]+)", o)[1]) - loss) < 2e-6
    toks = array.array("H", (data / "val_0.bin").read_bytes()[1024:])
    n = (len(toks) - 1) // 16 * 16
    targets = toks[1 : n + 1]
    counts = {t: targets.count(t) for t in set(targets)}
    h = -sum(c / n * math.log(c / n) for c in counts.values())
    assert abs(float(re.search(r"entropy of ([\d.]+)", out)[1]) - h) < 1e-5
    assert abs(float(re.search(r"bits/byte +([\d.]+)", out)[1]) - loss / math.log(2)) < 1e-4
    bare = tmp_path / "bare.bin"
    shutil.copy(m, bare)
    shutil.copy(data / "val_0.bin", tmp_path / "v.bin")
    o, _ = run("eval", "--model", bare, "--val", tmp_path / "v.bin", "--sequence", 16)
    assert "unknown" in o
    o1, _ = run("eval", "--model", m, "--val", data / "val_0.bin", "--attention", "vanilla")
    assert "vanilla" in o1
    fails("eval", "--model", m, says="--val")
    fails("eval", "--model", "gpt2", "--val", data / "val_0.bin", says="without weights")
    fails("eval", "--model", m, "--val", data / "val_0.bin", "--sequence", 33, says="context")


def test_describe(model):
    print(run("describe")[0])
    print(run("describe", "--model", "gpt2-xl", "--attention", "skip")[0])
    print(run("describe", "--model", model)[0])
    fails("describe", "--skip-heads", 13, says="skip heads 13")
    run("describe", "--skip-heads", 3, "--depth-window", 2)
    run("describe", "--layers", 1024, "--channels", 65536, "--heads", 1024, "--context", 1 << 20, "--vocab", 65536, "--batch", 64)
    err = fails("train", "--train", "/dev/null", "--out", "/tmp/program/never", "--layers", 1024, "--channels", 65536, "--heads", 1024)


def test_too_large(data, tmp_path):
    fails("train", "--train", f"{data}/train_*.bin", "--out", tmp_path / "o", "--layers", 1000, "--channels", 16384, "--heads", 64,
          "--context", 32, says="memory")
    assert not (tmp_path / "o").exists()


def test_resume_options(data, whole, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(whole["depth"], out)
    for args, says in [(["--steps", 11], "--steps 11 contradicts.*10"), (["--lr", "1e-2"], "contradicts"), (["--seed", 2], "contradicts"),
                       (["--batch", 2], "contradicts"), (["--attention", "skip"], "contradicts"), (["--layers", 2], "contradicts"),
                       (["--model", "gpt2"], "contradicts"), (["--schedule", "linear"], "contradicts"), (["--depth-stride", 3], "contradicts"),
                       (["--skip-heads", 1], "contradicts"), (["--vocab", 300], "contradicts")]:
        fails("train", "--resume", "--out", out, *args, says=says)
    o, _ = run("train", "--resume", "--out", out, "--steps", 10, "--lr", "0.003", "--val-every", 3, "--layers", 3)
    assert "complete" in o
    # a run stopped, its shards moved
    part = tmp_path / "p"
    code, _, _ = stop_at(train_args(data, part, steps=400, save=100), 5, signal.SIGTERM)
    assert code == 0
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    shard(moved / "train_3.bin", range(50))
    fails("train", "--resume", "--out", part, "--train", f"{moved}/train_*.bin", says="other data")
    os.remove(moved / "train_3.bin")
    shard(moved / "val_0.bin", [5] * 99)
    fails("train", "--resume", "--out", part, "--train", f"{moved}/train_*.bin", "--val", f"{moved}/val_*.bin", says="--val: .*other data")
    shutil.copy(data / "val_0.bin", moved / "val_0.bin")
    run("train", "--resume", "--out", part, "--train", f"{moved}/train_*.bin", "--val", f"{moved}/val_*.bin", "--keep", "--save-every", 100)
    assert sorted(p.name for p in part.glob("model_*")) == [f"model_{n:06d}.bin" for n in (100, 200, 300, 400)]
    # overwrite removes them all
    run(*train_args(data, part, "--overwrite"))
    assert sorted(os.listdir(part)) == ["metrics.csv", "model.bin", "tokenizer.bin"]
    assert metrics(part) == metrics(whole["vanilla"])


def test_overwrite_keeps_on_failure(data, whole, tmp_path):
    out = tmp_path / "o"
    shutil.copytree(whole["vanilla"], out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for bad in ["--total-batch", 63], ["--tokenizer", "/nope"], ["--sequence", 999]:
        args = [str(a) for a in train_args(data, out, "--overwrite")]
        if bad[0] in args:
            i = args.index(bad[0])
            del args[i : i + 2]
        fails(*args, *bad)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_disk_full(data, tmp_path):
    """A file size limit is met in the middle of the second checkpoint's writing."""
    out = tmp_path / "o"
    args = train_args(data, out, steps=6)
    run(*args)
    before = (out / "model.bin").read_bytes()
    part = tmp_path / "p"
    code, _, _ = stop_at(train_args(data, part, steps=5000), 5, signal.SIGTERM)
    good = (part / "model.bin").read_bytes()
    p = subprocess.run(f"ulimit -f 100; exec {BIN} train --out {part} --resume", shell=True, executable="/bin/bash", capture_output=True, text=True, env=ENV)
    assert p.returncode == 1 and p.stderr.startswith("error: ") and "could not be written" in p.stderr and p.stderr.count("\n") == 1, p.stderr
    print(p.stderr)
    assert (part / "model.bin").read_bytes() == good and not list(part.glob("*.tmp"))
    # the folder vanishes
    gone = tmp_path / "gone"
    q = subprocess.Popen([BIN, *map(str, train_args(data, gone, steps=100000, save=1000))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, text=True)
    for line in q.stdout:
        if line.startswith("step 10/"):
            break
    os.rename(gone, tmp_path / "gone2")
    q.stdout.read()
    err = q.stderr.read()
    assert q.wait() == 1 and "could not be written" in err, err
    print(err)


def test_nan(data, tmp_path):
    m = tmp_path / "o"
    run(*train_args(data, m, steps=2))
    b = (m / "model.bin").read_bytes()
    n = (384 + 32) * 16 + 3 * (4 * 16 + 12 * 256 + 9 * 16) + 32
    bad = tmp_path / "nan.bin"
    bad.write_bytes(b[:1020] + struct.pack("<i", 0) + b[1024 : 1024 + 4 * n - 4] + struct.pack("<f", float("nan")))
    fails(*[a for a in train_args(data, tmp_path / "x")], "--model", bad, says="step 1; no checkpoint")
    fails("generate", "--model", bad, "--tokenizer", data / "tokenizer.bin", says="not finite")
    fails("eval", "--model", bad, "--val", data / "val_0.bin", says="not finite")


def test_finetune(data, whole, tmp_path):
    out = tmp_path / "o"
    args = ["train", "--train", f"{data}/train_*.bin", "--out", out, "--model", whole["skip"] / "model.bin", "--steps", 3, "--batch", 2]
    o, _ = run(*args)
    assert "skip" in o
    run(*args[:-2], "--batch", 2, "--overwrite", "--attention", "depth")
    h = struct.unpack("<256i", (out / "model.bin").read_bytes()[:1024])
    assert h[8] == 2
    fails(*args, "--overwrite", "--channels", 32, says="contradicts")
    # bf16 file
    b = (whole["vanilla"] / "model.bin").read_bytes()
    n = (384 + 32) * 16 + 3 * (4 * 16 + 12 * 256 + 9 * 16) + 32
    f = array.array("I", b[1024 : 1024 + 4 * n])
    h5 = rewrite(rewrite(b[:1024], 4, "<i", 5), 1020, "<i", 0)
    p = tmp_path / "b.bin"
    p.write_bytes(h5 + array.array("H", [x >> 16 for x in f]).tobytes())
    run("generate", "--model", p, "--tokenizer", data / "tokenizer.bin", "--tokens", 5)
    p.write_bytes(p.read_bytes() + b"x")
    fails("generate", "--model", p, "--tokenizer", data / "tokenizer.bin", says="asks for")


def test_changed_shards(data, tmp_path):
    d = tmp_path / "d"
    shutil.copytree(data, d)
    for what in "truncate", "remove", "tokens":
        shutil.copy(data / "train_1.bin", d / "train_1.bin")
        out = tmp_path / what
        q = subprocess.Popen([BIN, *map(str, train_args(d, out, steps=100000, save=1000))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV, text=True)
        for line in q.stdout:
            if line.startswith("step 10/"):
                break
        if what == "truncate":
            os.truncate(d / "train_1.bin", 1500)
        elif what == "remove":
            os.remove(d / "train_1.bin")
        else:
            with open(d / "train_1.bin", "r+b") as f:
                f.seek(1024)
                f.write(b"\xff" * 2000)
        q.stdout.read()
        err = q.stderr.read()
        assert q.wait() == 1 and "train_1.bin" in err and err.count("\n") == 1, err
        print(err)
        if what == "remove":
            shutil.copy(data / "train_1.bin", d / "train_1.bin")


def test_schedule(data, tmp_path):
    def lrs(*more):
        out = tmp_path / "s"
        run(*train_args(data, out, *more, "--overwrite", steps=20))
        return [float(r[3]) for r in metrics(out)[1:]]
    a = lrs("--warmup", 5, "--min-lr", "1e-4")
    assert a[0] == pytest.approx(3e-3 / 5) and a[4] == pytest.approx(3e-3) and a[-1] == pytest.approx(1e-4)
    assert a[12] == pytest.approx(1e-4 + 2.9e-3 * (0.5 + 0.5 * math.cos(math.pi * 8 / 15)))
    a = lrs("--warmup", 0, "--schedule", "linear", "--min-lr", 0)
    assert a[0] == pytest.approx(3e-3 * 19 / 20) and a[-1] == 0
    a = lrs("--schedule", "constant", "--warmup", 0)
    assert a == [pytest.approx(3e-3)] * 20
    a = lrs("--schedule", "wsd", "--warmup", 2, "--min-lr", 0)
    assert a[:16] == pytest.approx([1.5e-3] + [3e-3] * 15) and a[16:] == pytest.approx([3e-3 * (1 - math.sqrt(i / 4)) for i in (1, 2, 3, 4)])


def test_order(data, tmp_path):
    """Init and order follow from the seed alone: the first loss is that of every attention with the same weights and data."""
    first = {}
    for att in ["vanilla"], ["skip", "--skip-heads", "0"], ["depth"], ["skip", "--skip-distance", 3]:
        out = tmp_path / "-".join(map(str, att))
        run(*train_args(data, out, "--attention", *att, steps=3))
        first[tuple(att)] = metrics(out)
    assert first[("vanilla",)] == first[("skip", "--skip-heads", "0")] == first[("skip", "--skip-distance", 3)]
    assert first[("vanilla",)] != first[("depth",)]
    out = tmp_path / "seed"
    run(*train_args(data, out, "--seed", 5, steps=3))
    assert metrics(out) != first[("vanilla",)]


def test_chars_peer(tmp_path, data):
    """No tokenizer, no val; V from --vocab."""
    d = tmp_path / "x.bin"
    shard(d, text_tokens(1000))
    out, _ = run("train", "--train", d, "--out", tmp_path / "o", *SHAPE, "--vocab", 300, "--steps", 3)
    assert "--prompt-tokens 0" in out
    run("generate", "--model", tmp_path / "o/model.bin", "--prompt-tokens", "0", "--tokens", 3)
    fails("train", "--train", d, "--out", tmp_path / "o2", *SHAPE, "--vocab", 65537, "--steps", 3)
    # default steps: one pass
    out, _ = run("train", "--train", d, "--out", tmp_path / "o3", *SHAPE, "--vocab", 300)
    assert "step 15/15" in out


def test_tty(data, tmp_path):
    import pty
    out = tmp_path / "o"
    args = [BIN, *map(str, train_args(data, out))]
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(args[0], args)
    text = b""
    while True:
        try:
            b = os.read(fd, 4096)
        except OSError:
            break
        if not b:
            break
        text += b
    os.waitpid(pid, 0)
    text = text.decode()
    assert text.count("\r\x1b[K") == 0 and text.count("\x1b[K") >= 10
    stays = [l for l in text.split("\n") if "val " in l and "step" in l]
    assert len(stays) == 3
