"""What the tests of train_gpt2 share: running it, writing the files that it reads, reading those that it writes."""

import array
import contextlib
import fcntl
import os
import pathlib
import pty
import random
import re
import signal
import struct
import subprocess
import time

TIMEOUT = 300  # seconds, against programs that hang; no test depends on how long something takes
F_SETPIPE_SZ = 1031  # Linux; Python's fcntl knows the name since 3.10
SMALLEST_PIPE = 4096

HEADER_BYTES = 1024
TRAILER_BYTES = 20
MODEL_MAGIC = 20240326
TOKENIZER_MAGIC = 20240328
SHARD_MAGIC = 20240520
EVAL_MAGIC = 20240522
HAS_TRAILER = 4 * 255  # where in a model's header it says so

# The model that the tests train.
LAYERS, HEADS, CHANNELS, CONTEXT = 3, 2, 16, 32
VOCABULARY, PADDED_VOCABULARY, END_OF_TEXT = 257, 384, 256
BATCH, SEQUENCE = 4, 16
SHAPE = ["--layers", LAYERS, "--heads", HEADS, "--channels", CHANNELS, "--context", CONTEXT,
         "--batch", BATCH, "--sequence", SEQUENCE]
# Embeddings; in each layer four matrices and their biases, two LayerNorms; the last LayerNorm.
PARAMETERS = ((PADDED_VOCABULARY + CONTEXT) * CHANNELS
              + LAYERS * (12 * CHANNELS**2 + 9 * CHANNELS + 4 * CHANNELS) + 2 * CHANNELS)
WEIGHTS_END = HEADER_BYTES + 4 * PARAMETERS  # in a model's file

SOURCE = pathlib.Path(__file__).resolve().parents[2] / "train_gpt2.cpp"
ATTENTIONS = re.findall(r'"(\w+)"', re.search(r"attention_names\[\w*\] = {(.*?)}", SOURCE.read_text())[1])
BYTES_AND_END_OF_TEXT = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]


def heed_signals():
    """The program ignores signals that are ignored where it is started, as in a background job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)


class Program:
    """train_gpt2, run as a user runs it."""

    def __init__(self, path):
        self.path = path

    def command(self, args):
        return [str(word) for word in (self.path, *args)]

    def environment(self, threads=1):
        return dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")

    def finish(self, *args, threads=1):
        """Exit status, standard output and standard error, as bytes."""
        done = subprocess.run(self.command(args), capture_output=True, env=self.environment(threads), timeout=TIMEOUT)
        return done.returncode, done.stdout, done.stderr

    def run(self, *args, threads=1):
        """The standard output of a command that succeeds."""
        status, out, err = self.finish(*args, threads=threads)
        assert status == 0, err.decode()
        return out.decode()

    def fails(self, *args, says=""):
        """Checks that a command is refused in one line, which holds the pattern `says`."""
        status, _, err = self.finish(*args)
        assert_one_line(status, err.decode(), says)

    @contextlib.contextmanager
    def start(self, *args):
        """The process, which is killed in the end. Where its output is not read on, it waits after some fifty lines,
        so it never gets far beyond the line that was read last."""
        with subprocess.Popen(self.command(args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=self.environment(), preexec_fn=heed_signals) as process:
            fcntl.fcntl(process.stdout, F_SETPIPE_SZ, SMALLEST_PIPE)
            try:
                yield process
            finally:
                process.kill()

    def stop(self, *args, after, by):
        """Sends the signal `by` once step `after` is done. Exit status, the rest of the output, standard error."""
        with self.start(*args) as process:
            read_to_step(process, after)
            process.send_signal(by)
            return ended(process)


class Parts(Program):
    """parts.cpp"""

    def encode(self, tokenizer, texts):
        """The tokens of each text, which is bytes."""
        said = subprocess.run([self.path, "encode", tokenizer], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT,
                              input=b"".join(struct.pack("<I", len(text)) + text for text in texts)).stdout
        tokens, at = [], 0
        while at < len(said):
            n, = struct.unpack_from("<I", said, at)
            tokens.append(list(struct.unpack_from(f"<{n}H", said, at + 4)))
            at += 4 + 2 * n
        return tokens

    def choose(self, draws, seen, logits, *options):
        """How often each token is sampled."""
        command = self.command(["choose", draws, ",".join(map(str, seen)), *options])
        said = subprocess.run(command, input=struct.pack(f"<{len(logits)}f", *logits), stdout=subprocess.PIPE,
                              check=True, timeout=TIMEOUT).stdout
        return [int(n) for n in said.split()]


class Emulated(Program):
    """The program under dev/emulator, whose settings have these names (cuda_emulator.h)."""

    def __init__(self, path, **settings):
        super().__init__(path)
        self.settings = {f"GPT2_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}

    def environment(self, threads=1):
        return super().environment(threads) | self.settings


def on_terminal(program, args):
    """Exit status and output, standard error included, of a command that is run on a terminal."""
    command = program.command(args)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, program.environment())
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def assert_one_line(status, err, says):
    assert status == 1, (status, err)
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert re.search(says, err), err


def read_to_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


def ended(process):
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(TIMEOUT), out, err


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def signal_mask(process, field, signal_number):
    """Whether the signal is in a mask of /proc/PID/status: SigCgt, those with a handler; ShdPnd, not yet delivered."""
    with open(f"/proc/{process.pid}/status") as status:
        mask = re.search(rf"{field}:\s*(\w+)", status.read())[1]
    return bool(int(mask, 16) >> (signal_number - 1) & 1)


def bytes_read(process):
    with open(f"/proc/{process.pid}/io") as file:
        return int(file.readline().split()[1])  # rchar


def training(data, out, *more, steps=10, save_every=3):
    """The arguments of a short run. What stands in `more` replaces the option's value here."""
    options = {"--train": f"{data}/train_*.bin", "--val": f"{data}/val_*.bin", "--out": out,
               **dict(zip(SHAPE[::2], SHAPE[1::2])), "--total-batch": 2 * BATCH * SEQUENCE, "--steps": steps,
               "--lr": "3e-3", "--log-every": 1, "--val-every": 4, "--save-every": save_every}
    kept = [word for name, value in options.items() if name not in more for word in (name, value)]
    return ["train", *kept, *more]


def metrics(out):
    """The rows of metrics.csv without the columns of times, which differ from run to run."""
    return [line.split(",")[:5] for line in (out / "metrics.csv").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def header(*fields):
    return struct.pack("<256i", *fields, *[0] * (256 - len(fields)))


def tokens_bytes(tokens):
    return array.array("H", tokens).tobytes()


def write_shard(path, tokens):
    path.write_bytes(header(SHARD_MAGIC, 1, len(tokens)) + tokens_bytes(tokens))


def read_shard(path):
    return list(array.array("H", path.read_bytes()[HEADER_BYTES:]))


def write_tokenizer(path, tokens, end_of_text=-1, version=2, appendix=b""):
    table = b"".join(bytes([len(token)]) + token for token in tokens)
    path.write_bytes(header(TOKENIZER_MAGIC, version, len(tokens), end_of_text, len(appendix)) + table + appendix)


def changed(data, at, form, value):
    """The bytes with one value written over them."""
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form):]


def weights_only(checkpoint):
    """A model as llm.c writes it: without training state and trailer."""
    return changed(checkpoint[:WEIGHTS_END], HAS_TRAILER, "<i", 0)


def made_up_tokens(n, seed=0):
    """A document of words from a small vocabulary."""
    r = random.Random(seed)
    words = ["".join(r.choice("abcdefgh") for _ in range(r.randint(1, 6))) for _ in range(30)]
    text = " ".join(r.choice(words) for _ in range(n))
    return [END_OF_TEXT, *text[:n - 1].encode()]
