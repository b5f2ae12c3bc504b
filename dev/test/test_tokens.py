"""From text to tokens, as tiktoken does, and from logits to a token."""

import math
import random
import struct
import subprocess
import sys
import unicodedata

import pytest

from helpers import BYTES_AND_END_OF_TEXT, write_tokenizer

WORDS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", " ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u00a0",
         "\u200b", "\u3000", "a", "Zed", "é", "ſ", "日本", "٣", "½", "Ⅷ", "7", "😀", ".", "!?", "\0", "<|endoftext|>"]


@pytest.fixture(scope="session")
def gpt2_tokenizer(root, gpt2_bpe, tmp_path_factory):
    """As prepare.py writes it."""
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "text").write_text("some text")
    subprocess.run([sys.executable, root / "data_prep/prepare.py", "--tokenizer", "gpt2", "--val-fraction", "0",
                    "--out", folder, folder / "text"], check=True)
    return folder / "tokenizer.bin"


def some_text(r):
    """Words of all kinds, characters of all of Unicode, and bytes that are no UTF-8."""
    parts = []
    for _ in range(r.randint(1, 30)):
        code = r.randrange(0x110000 - 0x800)
        parts.append(r.choices([r.choice(WORDS).encode() * r.randint(1, 3), bytes([r.randrange(256)]),
                                chr(code + 0x800 * (code >= 0xd800)).encode()], [4, 1, 3])[0])
    return b"".join(parts)


def test_gpt2_tokens_are_tiktokens(parts, gpt2_bpe, gpt2_tokenizer, test_data):
    r = random.Random(0)
    texts = [some_text(r) for _ in range(200)] + [(test_data / "tinyshakespeare.txt").read_bytes()]
    expected = [gpt2_bpe.encode_ordinary(text.decode(errors="replace")) for text in texts]
    assert parts.encode(gpt2_tokenizer, texts) == expected


def test_letters_numbers_and_white_space(parts, gpt2_bpe, gpt2_tokenizer, tmp_path):
    """The tokens tell which characters stand in a word with a letter, a number or a dot. Characters are those at both
    ends of each range of Unicode's."""
    tiktoken = pytest.importorskip("tiktoken")
    tokens = BYTES_AND_END_OF_TEXT[:256] + [bytes([c, first]) for c in b"a1." for first in range(0xc2, 0xf5)]
    data = gpt2_tokenizer.read_bytes()
    write_tokenizer(tmp_path / "t.bin", tokens, appendix=data[-struct.unpack_from("<i", data, 16)[0]:])
    characters = [chr(c) for c in range(0x110000) if not 0xd800 <= c < 0xe000]
    kinds = [unicodedata.category(c)[0] for c in characters]
    ends = [i for i in range(1, len(kinds)) if kinds[i - 1] != kinds[i]]
    text = "".join(f"a{c}1{c}.{c}\n" for i in ends for c in characters[i - 1:i + 1])
    by_words = tiktoken.Encoding("t", pat_str=gpt2_bpe._pat_str, special_tokens={},
                                 mergeable_ranks={token: i for i, token in enumerate(tokens)})
    assert parts.encode(tmp_path / "t.bin", [text.encode()]) == [by_words.encode_ordinary(text)]


@pytest.mark.parametrize("text", [b" " * 10**6, b"a" * 10**6, b"." * 10**6,
                                  bytes(random.Random(1).choices(range(97, 123), k=10**6))],
                         ids=["spaces", "letter", "dots", "letters"])
def test_a_word_of_any_length(parts, gpt2_bpe, gpt2_tokenizer, text):
    assert parts.encode(gpt2_tokenizer, [text]) == [gpt2_bpe.encode_ordinary(text.decode())]


def test_byte_that_is_no_token(each_build, without_state, tmp_path):
    write_tokenizer(tmp_path / "t.bin", BYTES_AND_END_OF_TEXT[:250] + [b"ab"] * 7)
    args = ["generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--tokens", 0, "--prompt"]
    each_build.fails(*args, "a", says="byte 250 is not among them")


def test_merges_in_order(parts, tmp_path):
    """The lowest token first, of equals the leftmost; a word that is a token stays whole."""
    tokenizer, letters = tmp_path / "t.bin", BYTES_AND_END_OF_TEXT[:256]
    write_tokenizer(tokenizer, letters + [b"aa", b"ab", b" a", b"aab", b"aa", b"bab", b"<|endoftext|>"], 262)
    a, b, aa, ab, space_a, aab, bab = 97, 98, 256, 257, 258, 259, 261
    for text, tokens in {"": [], "aaa": [aa, a], "aab": [aab], "aabab": [aab, ab], "bab": [bab], "babb": [bab, b],
                         "a aab": [a, 32, aab], " ab": [32, ab], " a": [space_a], " ac": [space_a, 99],
                         "<|endoftext|>": [*b"<|endoftext|>"]}.items():
        assert parts.encode(tokenizer, [text.encode()]) == [tokens], text


@pytest.mark.parametrize("appendix", [b"\1", b"\1\0\0\0", struct.pack("<3I", 2**31, 97, 122),
                                      struct.pack("<3I", 1, 0x4e00, 0x9fff)], ids=len)
def test_damaged_classes_of_characters(each_build, without_state, tmp_path, appendix):
    tokens = BYTES_AND_END_OF_TEXT[:256] + [b"ab"]
    write_tokenizer(tmp_path / "t.bin", tokens, appendix=appendix)
    args = ["generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--prompt", "é"]
    each_build.fails(*args, says="t.bin: damaged: what follows its tokens is cut off")


def test_classes_are_needed_beyond_ascii(each_build, without_state, tmp_path):
    """llm.c's tokenizer lacks them."""
    write_tokenizer(tmp_path / "t.bin", BYTES_AND_END_OF_TEXT[:256] + [b"ab"])
    args = ["generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--tokens", 0, "--prompt"]
    assert each_build.run(*args, "ab <|endoftext|>\n") == "ab <|endoftext|>\n\n"
    each_build.fails(*args, "é", says="t.bin: does not say which characters beyond ASCII are letters; prepare.py --tok")


# Sampling


def distribution(logits, seen, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0):
    """The probability of each token."""
    logits = [l if i not in seen else l / penalty if l > 0 else l * penalty for i, l in enumerate(logits)]
    weights = [math.exp((l - max(logits)) / temperature) for l in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept, reached = [], 0
    for i in order[:top_k or None]:
        if kept and reached >= top_p * sum(weights[j] for j in order[:top_k or None]):
            break
        kept.append(i)
        reached += weights[i]
    return [weights[i] / reached if i in kept else 0 for i in range(len(logits))]


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5}, {"temperature": 2.5}, {"top_k": 7}, {"top_p": 0.8}, {"penalty": 1.7}, {"penalty": 0.6},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "penalty": 1.3},
], ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()))
def test_sampled_distribution(parts, options):
    """Chi-square: with k degrees of freedom, its cube root is nearly normal (Wilson and Hilferty)."""
    r, draws = random.Random(3), 100_000
    logits = [struct.unpack("f", struct.pack("f", r.gauss(0, 1.5)))[0] for _ in range(60)]
    seen = r.sample(range(60), 20)
    options = {"temperature": 1.0, "top_p": 1.0, **options}
    words = [word for name, value in options.items()
             for word in ("--" + {"penalty": "repetition-penalty"}.get(name, name.replace("_", "-")), value)]
    counts = parts.choose(draws, seen + seen[::2], logits, *words)  # however often the text has a token
    expected = [draws * p for p in distribution(logits, set(seen), **options)]
    assert all(n == 0 for n, e in zip(counts, expected) if e == 0)
    cells = [(n, e) for n, e in zip(counts, expected) if e >= 5]
    rest = draws - sum(n for n, _ in cells), draws - sum(e for _, e in cells)
    cells += [rest] * (rest[1] >= 5)
    k = len(cells) - 1
    chi_square = sum((n - e)**2 / e for n, e in cells)
    assert ((chi_square / k)**(1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k)) < 4.5  # one in 300,000
