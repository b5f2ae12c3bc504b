/*
fuzz.cpp: can an input make a reader of train_gpt2.cpp crash, hang, or take memory that its length does not explain?

    make -C dev dev/fuzz/fuzz && dev/fuzz/fuzz       every reader for five seconds, as in `make test`
    dev/fuzz/fuzz --seconds 600 model tokenizer      these two for ten minutes
    dev/fuzz/fuzz --read model FILE...               what a reader says of these files
    dev/fuzz/fuzz --seeds FOLDER                     writes the inputs that all others are made from, by reader
    make -C dev fuzz SECONDS=600                     the same with libFuzzer, if clang++ is installed

The program runs inside this one, under AddressSanitizer and UndefinedBehaviorSanitizer; where it would exit, it throws.
Every input must be read, or be refused with status 1 and one line. Memory is counted at each allocation; the table of
readers says how much an input may take. Inputs are what the program wrote, changed. In most of them, lengths and
checksums are then made to fit again, so that they get past the first check.
*/

// In the program, these replace names of the C library, whose headers therefore come first. `form` is the name that die
// gives to the format of its message; everywhere else it is the variable here.
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
struct Exit {
    int status = 0;
    const char* form = "";
};
static const char* const form = "";
static FILE* messages = stderr;
#define exit(status) throw Exit{status, form}
#undef stderr
#define stderr messages
#define isatty(fd) false
#define main test_main
[[maybe_unused]] static int test_main(int, char**);  // static, so that the tests are not compiled
#include "../../test_gpt2.cpp"                       // for check_dump; it includes train_gpt2.cpp
#undef exit
#undef main

#include <memory>
#include <set>
#include <sys/prctl.h>
#include <sys/wait.h>

// Functions of AddressSanitizer, whose header GCC lacks
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));
extern "C" size_t __sanitizer_get_allocated_size(const volatile void*);
extern "C" void __sanitizer_print_stack_trace();
// The first two make it three times as fast. The third: libFuzzer uses operators that test_gpt2.cpp does not replace.
extern "C" const char* __asan_default_options() {
    return "quarantine_size_mb=4:malloc_context_size=3:alloc_dealloc_mismatch=0";
}

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fault(const char* form, ...) {
    va_list args;
    va_start(args, form);
    dprintf(STDERR_FILENO, "fault: %s\n", format_list(form, args).c_str());
    va_end(args);
    __sanitizer_print_stack_trace();
    abort();
}

// --------------------------------------------------------------------------------------------------------------------
// Files

using Bytes = std::string;
constexpr size_t LONGEST = 1 << 16;      // of the inputs, in bytes
constexpr size_t FREE_MEMORY = 64 << 20;  // what the program finds free, in bytes
constexpr int T = 8, V = 27, B = 2;

static void write_bytes(const std::string& path, const Bytes& content) {
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, content.data(), content.size()) != (ssize_t)content.size()) fault("%s", path.c_str());
    close(fd);
}
static Bytes read_bytes(const std::string& path) { return read_whole(open_file(path)); }

static Header header_of(const Bytes& s) {
    Header h = {};
    memcpy(h.data(), s.data(), std::min(s.size(), HEADER_BYTES));
    return h;
}
static Bytes with_header(const Header& h, const Bytes& body) {
    return Bytes((const char*)h.data(), HEADER_BYTES) + body;
}
static void set_field(Bytes& s, int i, int32_t value) {
    if (4 * (size_t)i + 4 <= s.size()) memcpy(&s[4 * i], &value, 4);
}

static Bytes made_up_tokens(int n) {
    std::vector<uint16_t> tokens(n);
    for (int i = 0; i < n; i++) tokens[i] = i * i % V;
    return Bytes((const char*)tokens.data(), 2 * n);
}
static Bytes tokenizer_file(const std::vector<std::string>& tokens, int end_of_text) {
    Bytes table;
    for (const std::string& token : tokens) table += (char)token.size() + token;
    return with_header({TOKENIZER_MAGIC, 2, (int)tokens.size(), end_of_text}, table);
}
// Byte at which a model's tensors end
static size_t tensors_end(const Bytes& model) {
    const Header h = header_of(model);
    Config c;
    for (const Setting& s : config_settings) c.*s.field = h[s.header];
    c.Vp = h[7];
    return HEADER_BYTES + parameter_count(c) * (h[1] % 1000 == 5 ? 2 : 4);
}

// Make the length fit the rest of a file.
static void fit_shard(Bytes& s) {
    if (header_of(s)[0] == SHARD_MAGIC) set_field(s, 2, (s.size() - HEADER_BYTES) / 2);
}
static void fit_tokenizer(Bytes& s) {
    size_t at = HEADER_BYTES;
    for (int i = 0; i < header_of(s)[2] && at < s.size(); i++) at += 1 + (uint8_t)s[at];
    set_field(s, 4, s.size() - at);
}
static void fit_model(Bytes& s) {  // or a checkpoint, whose state has what the moments leave
    const size_t end = tensors_end(s), least = end + 8 + 2 * (end - HEADER_BYTES) + sizeof(Trailer);
    const uint64_t n = s.size() - least;
    if (end > LONGEST) return;
    if (header_of(s)[255] != 1) s.resize(end);
    else if (s.size() < least) s.resize(end + sizeof(Trailer));
    else memcpy(&s[end], &n, 8);
}
// Writes a trailer that fits the rest of a file.
static void seal(Bytes& s) {
    const size_t end = tensors_end(s), trailer = s.size() - sizeof(Trailer);
    if (header_of(s)[255] != 1 || end > LONGEST || end + sizeof(Trailer) > s.size()) return;
    const Trailer t = {TRAILER_MAGIC, crc32(0, s.data(), end), crc32(0, &s[end], trailer - end), s.size()};
    memcpy(&s[trailer], &t, sizeof t);
}

// --------------------------------------------------------------------------------------------------------------------
// Seeds: inputs that must be read without an error

static std::map<std::string, std::vector<Bytes>> seeds;  // by reader
static std::vector<Tokenizer> tokenizers;

// Closes what was opened since, as the end of the process would.
struct Descriptors {
    const int first = dup(0);
    ~Descriptors() { close_range(first, ~0U, 0); }
};

// Makes data and a run, from which the seeds are, in the current folder. Then this process belongs to one reader.
static void set_up() {
    chunk_values = 1000;
    longest_prompt = 1000;
    for (const char* folder : {"data", "system/proc"}) std::filesystem::create_directories(folder);
    write_bytes("system/proc/meminfo", format("MemAvailable: %zu kB\n", FREE_MEMORY >> 10));
    system_root = "system";
    std::vector<std::string> bytes, letters = {"\n"}, characters = {"\u00e9", "\u65e5", "\U0001f600", " ", "'", "1"};
    for (int i = 0; i < 256; i++) bytes.push_back({(char)i});
    for (char c = 'a'; c <= 'z'; c++) letters.push_back({c});
    bytes.push_back("<|endoftext|>");
    characters.insert(characters.end(), letters.begin(), letters.end());
    std::vector<std::string> pairs = bytes;
    for (const char* token : {"th", "he", "\u00e9", " th", "the", " t", " the", "'t", "11"}) pairs.push_back(token);
    const uint32_t classes[] = {2, 'A', 'z', 0xe9, 0x7fff, 1, '0', '9', 2, '\t', '\r', ' ', ' '};  // not all of them
    Bytes with_classes = tokenizer_file(pairs, 256) + Bytes((const char*)classes, sizeof classes);
    fit_tokenizer(with_classes);
    seeds["tokenizer"] = {tokenizer_file(bytes, 256), with_classes, tokenizer_file(characters, -1),
                          tokenizer_file(pairs, 256)};
    for (int i = 0; i < 3; i++) {
        write_bytes("data/tokenizer.bin", seeds["tokenizer"][i]);
        tokenizers.push_back(read_tokenizer("data/tokenizer.bin"));
    }
    seeds["prompt"] = {"once upon  a time\n the cat's 11 ", "\u00e9t\u00e9 \u65e5 \U0001f600"};
    // A short question; one of 500 tokens and 500 endings
    std::vector<uint16_t> words = {65535, 0, 0, 1, 2, 3, 5, 6, 7, 1, 8, 2, 9, 10, 65535, 0, 1, 0, 500, 500};
    words.resize(words.size() + 3 * 500, 1);
    seeds["questions"] = {with_header({EVAL_MAGIC, 1, 2}, Bytes((const char*)words.data(), 2 * words.size()))};
    seeds["shard"] = {with_header({SHARD_MAGIC, 1, 150}, made_up_tokens(150)), made_up_tokens(100)};
    write_bytes("data/tokenizer.bin", tokenizer_file(letters, -1));
    write_bytes("data/train_0.bin", seeds["shard"][0]);
    write_bytes("data/val_0.bin", seeds["shard"][1]);
    Bytes manifest = "gpt2x3 manifest 1\n";
    for (const std::string name : {"train_0.bin", "val_0.bin", "tokenizer.bin"})
        manifest += name + " " + fingerprint(open_file("data/" + name)) + "\n";
    seeds["manifest"] = {manifest};

    for (const char* attention : attention_names) {
        const Descriptors opened;
        const std::string line =
            "x train --train data/train_*.bin --val data/val_*.bin --out run --overwrite --steps 4 --layers 2 "
            "--heads 2 --channels 4 --context 8 --batch 2 --save-every 2 --keep --attention ";
        std::vector<std::string> arguments = split(line + attention, ' ');
        std::vector<char*> argv;
        for (std::string& word : arguments) argv.push_back(word.data());
        run_program(argv.size(), argv.data());
        const Bytes checkpoint = read_bytes("run/model_000002.bin");
        const size_t end = tensors_end(checkpoint), moments = 2 * (end - HEADER_BYTES);
        seeds["checkpoint"].push_back(checkpoint);
        seeds["state"].push_back(checkpoint.substr(end + 8, checkpoint.size() - sizeof(Trailer) - moments - (end + 8)));
        Bytes weights = checkpoint.substr(0, end), halves(HEADER_BYTES + (end - HEADER_BYTES) / 2, '\0');
        set_field(weights, 255, 0);
        halves.replace(0, HEADER_BYTES, weights, 0, HEADER_BYTES);
        set_field(halves, 1, header_of(weights)[1] + 2);
        for (const Bytes& model : {checkpoint, weights, halves}) seeds["model"].push_back(model);
    }
    for (int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGXCPU}) signal(number, SIG_DFL);
    seeds["metrics"] = {read_bytes("run/metrics.csv")};
    const size_t values = (seeds["model"][1].size() - HEADER_BYTES) / 4;
    for (int steps : {0, 2})
        seeds["dump"].push_back(with_header({DUMP_MAGIC, 2, B, T, steps, 64},
            Bytes(4 * (2 * B * T + B * T * V + 1 + values + (steps > 0 ? 5 + steps : 0)), '\0')));
    seeds["options"] = {
        "train --train x --val y --out run --batch 4 --total-batch 64 --steps 100 --lr 1e-3 --min-lr 1e-4 --warmup 5 "
        "--schedule wsd --weight-decay 0.1 --beta1 0.9 --beta2 0.95 --clip 1 --seed 3 --keep --layers 2 --heads 2 "
        "--channels 8 --context 16 --sequence 16 --attention skip --skip-heads 1 ",
        "train --out x --overwrite --recompute --log-every 1 --val-every 2 --val-tokens 30 --vocab 27 --save-every 0 "
        "--sample-every 1 --prompt-tokens 1,2,3 --top-k 5 --attention depth --depth-window 1 --layers 3 --heads 1 "
        "--channels 6 --context 32 ",
        "eval --model gpt2 --val x --precision bf16 ", "eval --hellaswag x --by-position --depth-weights y ",
        "generate --prompt ab --stop c --stop d --samples 2 --tokens 9 ", "generate --temperature 0 --top-p .5 ",
        "generate --prompt-file - --stop-at-end --repetition-penalty 1.2 ",
        "describe --model gpt2-xl --batch 8 --skip-distance 3 ",
        "describe --layers 5 --heads 3 --channels 12 --depth-stride 2 ", "train --help ", "--version "};
    for (Bytes& line : seeds["options"]) std::ranges::replace(line, ' ', '\0');
}

// --------------------------------------------------------------------------------------------------------------------
// Readers

static void read_shard(const Bytes&) {
    const std::vector<Shard> shards = open_shards("val", {"data/train_0.bin"}, T);
    std::vector<int> x(T), y(T);
    Loader l = {.shards = split_shards(shards), .T = T, .V = V, .seed = 1};
    use_shard(l);
    for (size_t i = 0; i < window_count(shards, T); i++) {
        read_window(shards, i, x.data(), y.data(), T, V);
        loader_batch(l, x.data(), y.data(), 1);
        if (std::ranges::max(x) >= V || std::ranges::max(y) >= V) fault("a token outside the vocabulary");
    }
}

static void read_manifest(const Bytes&) { check_manifest("data", {"data/train_0.bin", "data/val_0.bin"}); }

static void read_a_tokenizer(const Bytes&) { encode(read_tokenizer("data/tokenizer.bin"), "isn't the 11  th\n"); }

static void encode_prompt(const Bytes& text) {
    Utf8Stream valid;  // byte pair encodings see the text so
    valid.put(text);
    valid.finish();
    for (const Tokenizer& t : tokenizers) {
        Bytes decoded;
        for (int token : encode(t, text)) decoded += t.tokens[token];
        if (decoded != text && decoded != valid.ready) fault("the tokens of a prompt are not its text");
    }
}

static void read_a_question(const Bytes&) { read_questions("questions", V, {}); }

static void read_model(const Bytes& input) {
    const ModelFile m = open_model("run/model.bin");
    Bytes sealed = input;
    seal(sealed);
    if (sealed != input) fault("a checkpoint is read although its trailer does not fit");
    read_state(m);
    const Workload work = {.B = 1, .T = 1, .train = true};
    check_memory(m.config, FP32, work);
    const std::unique_ptr<Model, decltype(&model_free)> model(model_create(m.config, FP32, work), model_free);
    read_quantity(m, model.get(), PARAMETERS, HEADER_BYTES);
}

// Resumes a run up to its first step. After that, nothing is read.
static void read_checkpoint(const Bytes& input) {
    write_bytes("run/metrics.csv", seeds["metrics"][0]);
    Options o;
    OptionTable table = option_table(o);
    std::vector<std::string> words = {"--out", "run", "--resume"};
    if (input.size() % 2 > 0) words.insert(words.end(), {"--steps", "9"});
    parse_options(table, words, "train", "");
    Run run = {.o = o, .table = table};
    auto free_model = [](Run* r) { if (r->model) model_free(r->model); };
    const std::unique_ptr<Run, decltype(free_model)> at_end(&run, free_model);
    check_folder(run);
    if (!open_checkpoint(run)) return;
    open_data(run);
    complete_options(run);
    create_run_model(run);
    fclose(open_metrics(run));
}

// The input is the text of a checkpoint's state.
static void read_state_text(const Bytes& text) {
    Bytes checkpoint = seeds["checkpoint"][0];
    checkpoint.replace(checkpoint.find(seeds["state"][0]), seeds["state"][0].size(), text);
    fit_model(checkpoint);
    seal(checkpoint);
    write_bytes("run/model.bin", checkpoint);
    read_checkpoint(text);
}

static void read_metrics(const Bytes&) {
    Options o;
    o.out = "run";
    OptionTable table;
    Run run = {.o = o, .table = table};
    run.step = 3;
    fclose(open_metrics(run));
}

// The input is a command line: words that end in 0 bytes.
static void read_options(const Bytes& input) {
    std::vector<std::string> words = split(input, '\0');
    std::vector<char*> argv = {(char*)"x"};
    for (size_t i = 0; i + 1 < words.size(); i++) argv.push_back(words[i].data());
    if (argv.size() < 2 || words[0].empty()) return;  // shows all commands, in many lines
    auto command = std::ranges::find(commands, words[0], &Command::name);
    if (command == std::end(commands) || command->bit == DESCRIBE) return (void)run_program(argv.size(), argv.data());
    // The other commands go on as far as they need no files.
    Options o;
    OptionTable table = option_table(o);
    std::erase_if(table, [&](const Option& option) { return !(option.commands & command->bit); });
    if (!parse_options(table, {argv.begin() + 2, argv.end()}, command->name, "")) return;
    Run run = {.o = o, .table = table};
    run.tokenizer = read_tokenizer("data/tokenizer.bin");
    run.c = configure(o, {}, run.tokenizer);
    prompt_of(o, run.tokenizer, V);
    if (command->bit != TRAIN) return;
    run.train = {{"data/train_0.bin", "", HEADER_BYTES, 150}};
    complete_options(run);
    check_memory(run.c, o.precision, {.B = o.batch, .T = o.sequence, .train = true});
}

static void read_dump(const Bytes&) { check_dump("run/model.bin", "dump", false, NEVER); }

struct Reader {
    const char *name, *file;  // the file that the input replaces, if any
    void (*read)(const Bytes&);
    size_t constant, factor;  // an input of n bytes may take constant + factor·n bytes of memory
    void (*fit)(Bytes&) = nullptr;
};
// The constants are buffers and, where a model is created, the layers' workspace; options of a checkpoint may ask for
// all memory that is free. The factors: a string takes 32 bytes, a list of them up to three times as much while it
// grows; a parameter has a gradient and two moments, and where C = 1 each has a slot for 32 values.
static const Reader readers[] = {
    {"shard", "data/train_0.bin", read_shard, 256 << 10, 32, fit_shard},
    {"manifest", "data/gpt2x3_manifest.txt", read_manifest, 256 << 10, 128},
    {"tokenizer", "data/tokenizer.bin", read_a_tokenizer, 64 << 10, 128, fit_tokenizer},
    {"prompt", nullptr, encode_prompt, 64 << 10, 128},
    {"questions", "questions", read_a_question, 64 << 10, 64},
    {"model", "run/model.bin", read_model, 2 << 20, 256, fit_model},
    {"checkpoint", "run/model.bin", read_checkpoint, FREE_MEMORY + (1 << 20), 256, fit_model},
    {"state", nullptr, read_state_text, FREE_MEMORY + (1 << 20), 256},
    {"metrics", "run/metrics.csv", read_metrics, 64 << 10, 128},
    {"options", nullptr, read_options, 256 << 10, 512},
    {"dump", "dump", read_dump, 2 << 20, 128},
};

static const Reader& find_reader(const std::string& name) {
    for (const Reader& reader : readers)
        if (name == reader.name) return reader;
    fault("there is no reader %s", name.c_str());
}

// --------------------------------------------------------------------------------------------------------------------
// One input

static std::atomic<size_t> allocated{0}, limit{SIZE_MAX}, peak{0};  // bytes

static void count_allocation(const volatile void*, size_t n) {
    const size_t now = allocated += n;
    peak = std::max<size_t>(peak, now);
    if (now > limit) fault("another %zu bytes make %zu, more than %zu", n, now, limit.exchange(SIZE_MAX));
}
static void count_release(const volatile void* p) {
    if (p) allocated -= __sanitizer_get_allocated_size(p);
}

static std::string make_folder() {
    std::string folder = (access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + std::string("/fuzz-XXXXXX");
    if (!mkdtemp(folder.data())) fault("%s cannot be made", folder.c_str());
    return folder;
}

static void start(const std::string& folder) {
    if (chdir(folder.c_str()) != 0) fault("%s: %s", folder.c_str(), strerror(errno));
    if (!freopen("/dev/null", "r", stdin) || !freopen("/dev/null", "w", stdout)) fault("no /dev/null");
    set_up();
    __sanitizer_install_malloc_and_free_hooks(count_allocation, count_release);
}

struct Outcome {
    std::string said;  // the message, or ""
    const char* form;  // its format
    double memory;     // share of what the input may take
};

static Outcome read_input(const Reader& reader, const Bytes& input) {
    const Descriptors opened;
    char* text = nullptr;
    size_t length = 0;
    Exit end;
    if (reader.file) write_bytes(reader.file, input);
    messages = open_memstream(&text, &length);
    const size_t before = peak = allocated.load(), most = reader.constant + reader.factor * input.size();
    limit = before + most;
    try {
        reader.read(input);
    } catch (const Exit& thrown) {
        end = thrown;
    } catch (const std::exception& e) {
        fault("an exception is no message for a user: %.200s", e.what());
    }
    limit = SIZE_MAX;
    fclose(messages);
    const std::string said(text, length);
    free(text);
    const size_t controls = std::ranges::count_if(said, [](char c) { return iscntrl((uint8_t)c); });
    const bool line = said.starts_with("error: ") && said.ends_with('\n') && controls == 1;
    const bool well = end.status == 0 ? said.empty() : end.status == 1 && line;
    if (!well) fault("status %d, and it says: %.500s", end.status, said.c_str());
    if (said.ends_with("the disk fails\n")) fault("a length was not checked: %.500s", said.c_str());
    return {said, end.form, (double)(peak - before) / most};
}

#ifdef LIBFUZZER
static const Reader* reader;
static std::string folder;

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    reader = &find_reader(getenv("READER"));
    start(folder = make_folder());
    atexit([] { std::filesystem::remove_all(folder); });
    return 0;
}
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
    Bytes s((char*)data, LLVMFuzzerMutate(data, size, most));
    if (reader->fit && seed % 2 == 0) reader->fit(s);
    if (reader->fit == fit_model && seed % 8 < 7) seal(s);
    return s.copy((char*)data, most);
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    read_input(*reader, Bytes((const char*)data, size));
    return 0;
}
#else

// --------------------------------------------------------------------------------------------------------------------
// Many inputs

// Where the word at a place begins, and its length
static std::pair<size_t, size_t> word_at(const Bytes& s, size_t at) {
    static const Bytes separators("\n ,=/\0", 6);
    const size_t begin = at > 0 ? s.find_last_of(separators, at - 1) + 1 : 0;
    return {begin, std::min(s.find_first_of(separators, at), s.size()) - begin};
}

// Makes one or a few changes.
static void mutate(Bytes& s, const std::vector<Bytes>& others, Random& r) {
    static const int32_t integers[] = {0, 1, 2, 7, -1, 127, 256, 65535, 65536, 1 << 24, INT_MAX, INT_MIN, 0x7f800000};
    static const Bytes words[] = {
        "", "nan", "inf", "1e999", "-0", "-1", "0x10", "1.5", "65536", "2147483647", "18446744073709551615", "%s%n",
        "\n", "\xff", "\x1b[31m", "\u009b", "\u65e5", "..", "*", "--", "-h", "/dev/zero", Bytes(5000, '1')};
    do {
        const Bytes& other = others[r.below(others.size())];
        const size_t n = s.size(), at = r.below(n + 1), there = r.below(other.size() + 1);
        const size_t field = r.below(3) == 0 ? at / 4 : r.below(8) > 0 ? r.below(13) : 255;  // of a header, mostly
        auto length = [&] { return r.below(3) == 0 ? 0 : r.below(8) == 0 ? LONGEST : r.below(2 << r.below(10)); };
        switch (r.below(5)) {
        case 0:
            set_field(s, field, integers[r.below(std::size(integers))]);
            break;
        case 1:
            if (4 * field < n) s[4 * field] += r.below(9) - 4;
            break;
        case 2:
            if (at < n) s[at] ^= 1 << r.below(8);
            break;
        case 3:  // cuts out, inserts, replaces, truncates or splices
            s.replace(at, length(), other.substr(r.below(2) == 0 ? std::min(at, other.size()) : there, length()));
            break;
        case 4: {
            const auto [begin, letters] = word_at(s, at);
            const auto [from, count] = word_at(other, there);
            s.replace(begin, letters, r.below(2) == 0 ? other.substr(from, count) : words[r.below(std::size(words))]);
        }
        }
    } while (r.below(2) > 0);
    s.resize(std::min(s.size(), LONGEST));
}

// What a reader's process leaves for its parent
struct Progress {
    size_t inputs, refused, messages;
    double memory;  // largest share of what an input may take
    size_t length;
    char input[LONGEST];
};

static void fuzz(const Reader& reader, Progress& p, double most_seconds) {
    constexpr int HANGS = 10;  // seconds
    Random r = {1};
    std::vector<Bytes> inputs = seeds[reader.name];  // and the first input with each message
    std::set<const char*> forms;
    const double begin = seconds();
    for (size_t i = 0; i < seeds[reader.name].size() || seconds() < begin + most_seconds; i++) {
        const bool seed = i < seeds[reader.name].size();
        Bytes s = inputs[seed ? i : r.below(inputs.size())];
        if (!seed) mutate(s, inputs, r);
        if (!seed && reader.fit && r.below(2) == 0) reader.fit(s);
        if (!seed && reader.fit == fit_model && r.below(8) > 0) seal(s);
        p.length = s.copy(p.input, LONGEST);
        alarm(HANGS);
        const auto [said, form, memory] = read_input(reader, s);
        if (seed && !said.empty()) fault("a seed must be read: %s", said.c_str());
        p.inputs++;
        p.refused += !said.empty();
        p.memory = std::max(p.memory, memory);
        if (forms.insert(form).second) inputs.push_back(s);
        p.messages = forms.size() - 1;
    }
}

static void report_reader(const Reader& reader, const Progress& p, int status) {
    report(status == 0, reader.name,
           format("%s, %s refused with %zu messages; at most %.2f of the memory allowed",
                  plural(p.inputs, "input").c_str(), commas(p.refused).c_str(), p.messages, p.memory));
    if (status == 0) return;
    const std::string file = std::filesystem::temp_directory_path() / (std::string("fuzz_") + reader.name);
    write_bytes(file, Bytes(p.input, p.length));
    printf("        %s; again: dev/fuzz/fuzz --read %s %s\n",
           WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "see above", reader.name, file.c_str());
}

// Each reader in a process of its own, as many at a time as there are cores
static void fuzz_all(const std::vector<std::string>& names, double most_seconds, const std::string& folder) {
    Progress* all = (Progress*)mmap(nullptr, sizeof(Progress) * names.size(), PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    std::map<pid_t, size_t> running;
    for (size_t next = 0; next < names.size() || !running.empty();) {
        if (next == names.size() || running.size() == (size_t)sysconf(_SC_NPROCESSORS_ONLN)) {
            int status;
            const size_t i = running.extract(wait(&status)).mapped();
            report_reader(find_reader(names[i]), all[i], status);
            continue;
        }
        const std::string own = folder + "/" + names[next];
        std::filesystem::create_directory(own);
        fflush(stdout);  // else the child has what is not yet written, too
        const pid_t pid = fork();
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);  // it ends with its parent
            start(own);
            fuzz(find_reader(names[next]), all[next], most_seconds);
            exit(0);
        }
        running[pid] = next++;
    }
    printf("%d passed, %d failed\n", passed, failed);
}

int main(int argc, char** argv) {
    std::vector<std::string> words(argv + 1, argv + argc);
    const std::string option = words.size() > 1 && words[0].starts_with("--") ? words[0] : "";
    const std::string value = option.empty() ? "" : words[1];
    static const std::string folder = make_folder();
    for (int number : {SIGINT, SIGTERM})
        signal(number, [](int) {
            std::filesystem::remove_all(folder);
            _exit(130);
        });
    if (!option.empty()) words.erase(words.begin(), words.begin() + 2);
    if (option == "--seeds") {
        const std::string to = std::filesystem::absolute(value);
        start(folder);
        for (const auto& [name, inputs] : seeds) {
            std::filesystem::create_directories(to + "/" + name);
            for (size_t i = 0; i < inputs.size(); i++)
                write_bytes(to + "/" + name + "/" + std::to_string(i), inputs[i]);
        }
    } else if (option == "--read") {
        for (std::string& word : words) word = read_bytes(word);
        start(folder);
        for (const Bytes& s : words) dprintf(STDERR_FILENO, "%s", read_input(find_reader(value), s).said.c_str());
    } else {
        const bool all = words.empty();
        for (const Reader& reader : readers)
            if (all) words.push_back(reader.name);
        fuzz_all(words, option == "--seconds" ? atof(value.c_str()) : 5, folder);
    }
    std::filesystem::remove_all(folder);
    return failed > 0;
}
#endif
