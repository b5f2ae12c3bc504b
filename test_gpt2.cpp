/*
test_gpt2.cpp: is every gradient right?

    ./test_gpt2                               the dumps in dev/reference, and all tests below
    ./test_gpt2 [-v] MODEL DEBUG_STATE ...    any pairs of files, llm.c's included; -v: a line per tensor

Exit status 0 if all is well, else 1. The tests go through the model's interface in train_gpt2.cpp, so they are the same
for every backend and every attention. The CPU's layers and the GPU's products are also held against plain loops.
*/

#define GPT2_NO_MAIN
#ifdef GPT2_CUDA
#include "train_gpt2.cu"
#else
#include "train_gpt2.cpp"
#endif

#ifdef GPT2_EMULATED
constexpr bool EMULATED = true;  // thousands of times slower than a GPU: some tests then do less
#else
constexpr bool EMULATED = false;
#endif
#ifdef GPT2_CUDA
constexpr bool ON_GPU = !EMULATED;
constexpr int SMALL_HEAD = 8;  // head size of most tests' models; on a GPU it is a multiple of 8
#else
constexpr bool ON_GPU = false;
constexpr int SMALL_HEAD = 12;
#endif

// Whether the algorithm of a product, and with it the rounding of bf16, may depend on the number of tokens
static bool algorithms_vary() {
#ifdef GPT2_EMULATED
    return emulator::settings.algorithms > 1 || emulator::settings.refuse_percent > 0;
#else
    return ON_GPU;
#endif
}

// (B, T, V), of the last forward, before its backward
static void model_logits(Model* m, float* out) {
    const Config& c = m->config;
    with_type(m, [&](auto& model) {
        logits_forward(m->ws, out, model.ln[2 * c.L], model.weight(WTE), m->work.tokens(), c.C, c.V, c.Vp);
    });
}

// Every use of new is counted, so that a test can tell that there was none.
static std::atomic<size_t> allocations{0};
#ifndef __NVCC__  // which takes them for the kernels' own; on a GPU the test looks at its memory alone
[[gnu::noinline]] void* operator new(size_t n) {
    allocations++;
    if (void* p = malloc(n)) return p;
    throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { free(p); }
#endif

static int passed = 0, failed = 0;

static void report(bool ok, const std::string& name, const std::string& detail = "") {
    (ok ? passed : failed)++;
    printf("%s  %s%s%s\n", ok ? "ok    " : "FAILED", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
    fflush(stdout);
}

// --------------------------------------------------------------------------------------------------------------------
// Comparing with the reference

// What some comparisons found: the worst error as a share of its tolerance. NaN counts as worse than anything.
struct Worst {
    double ratio = 0, error = 0, tolerance = 0;
    std::string where = "none";

    bool see(double difference, double tolerated) {  // whether this is the worst so far
        double r = difference == 0 ? 0 : difference / tolerated;
        bool worse = !(r <= ratio);
        if (worse) ratio = std::isnan(r) ? INFINITY : r, error = difference, tolerance = tolerated;
        return worse;
    }
    bool ok() const { return ratio <= 1; }
    std::string text() const { return format("worst %.2f of its tolerance: %s", ratio, where.c_str()); }
};

static double largest(const float* p, size_t n) {
    double max = 0;
    for (size_t i = 0; i < n; i++) max = std::max(max, (double)fabsf(p[i]));
    return max;
}

// What is compared on its own: a layer of a tensor, or the queries', keys' or values' share of it in qkv.
struct Block {
    std::string name;
    size_t begin, n;  // among all parameters, or results
    double tolerance = 5e-5;  // as a share of the largest value, where the reference is float64
};

static std::vector<Block> blocks_of(const Tensor& t) {
    bool qkv = strncmp(t.name, "qkv", 3) == 0, layered = t.name[0] != 'w' && strncmp(t.name, "lnf", 3) != 0;
    size_t parts = qkv ? 3 : 1, n = t.layer_size() / parts;
    std::vector<Block> blocks;
    for (size_t i = 0; i < t.layers * parts; i++)
        blocks.push_back({std::string("d") + t.name + (layered ? format(".%zu", i / parts) : "") +
                          (qkv ? std::string(".") + "qkv"[i % 3] : ""), t.offset + i * n, n});
    return blocks;
}

struct Difference {
    double largest = 0, rms = 0;  // rms is NaN if a value is
};

static Difference difference(const float* a, const float* b, size_t n) {
    double largest = 0, squares = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        largest = std::max(largest, d);
        squares += d * d;
    }
    return {largest, sqrt(squares / n)};
}

// How far a block's values move when the weights are rounded to bf16, by draws: the file's weights tell of those before
// rounding only that they lie among the fp32 values that round to the file's, where each is about as likely as another.
// So results of weights drawn from there differ from the file's results as those of the true weights do.
using Draws = std::vector<Difference>;

static std::vector<float> before_rounding(std::vector<float> parameters, Random& random) {
    for (float& p : parameters) {
        uint32_t shift = (uint32_t)(random.next() >> 48) - 0x8000;  // within half a unit of bf16's last place
        if (p != 0) p = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + shift);
    }
    return parameters;
}

// A bound that one more draw exceeds with probability 5e-6 at most. That is for the largest of 4e7 normal values; for a
// single one, and for the rms of any number, the bound is safer still.
static double most(const Draws& draws, double Difference::*kind) {
    double mean = 0, variance = 0;
    for (const Difference& d : draws) mean += d.*kind / draws.size();
    for (const Difference& d : draws) variance += pow(d.*kind - mean, 2) / (draws.size() - 1);
    return mean + 10 * sqrt(variance);
}

// A gradient that is mathematically 0, like vanilla's key bias, has rounding errors of the size of its neighbours';
// hence the second term.
static Worst compare_block(const float* ours, const float* theirs, const Block& b, double tensor_max, double factor,
                           const Draws& draws = {}) {
    Difference d = difference(ours + b.begin, theirs + b.begin, b.n);
    double tolerance = factor * (b.tolerance * largest(theirs + b.begin, b.n) + 1e-6 * tensor_max);
    Worst worst;
    worst.where = "largest";
    worst.see(d.largest, tolerance + most(draws, &Difference::largest));
    if (worst.see(d.rms, tolerance + most(draws, &Difference::rms))) worst.where = "rms";
    return worst;
}

// All blocks of one tensor, in all gradients: the worst, after a line for each that is off.
static Worst compare_tensor(const Tensor& t, const float* ours, const float* theirs, double factor,
                            std::map<std::string, Draws> draws = {}) {
    double tensor_max = largest(theirs + t.offset, t.size());
    Worst worst;
    for (const Block& block : blocks_of(t)) {
        Worst w = compare_block(ours, theirs, block, tensor_max, factor, draws[block.name]);
        if (!w.ok()) printf("    %s: error %.3g, tolerance %.3g\n", block.name.c_str(), w.error, w.tolerance);
        if (!(w.ratio <= worst.ratio)) worst = w;
    }
    return worst;
}

// The errors of bf16, by block, against those of the reference where it rounds to bf16 at the same points: PATH holds
// these, as rms over many models around the dump's. So are ours here, against our own fp32, since in a small block one
// model's error is an accident. Over so many models, that of a single normal error, like the loss's, varies by 9 %.
static void check_rounding(const std::string& path, const Config& c, int B, int T, const std::vector<int>& x,
                           const std::vector<int>& y, const std::vector<float>& parameters, bool verbose) {
    constexpr int NEARBY = EMULATED ? 12 : 64;
    constexpr double FACTOR = 1.5;
    std::map<std::string, double> reference;
    FILE* file = fopen(path.c_str(), "r");
    char name[64];
    double rms;
    while (file && fscanf(file, "%63s %lf", name, &rms) == 2) reference[name] = rms;
    if (file) fclose(file);

    size_t P = parameter_count(c), logits = (size_t)B * T * c.V, results = P + logits + 1;
    std::vector<Block> blocks = {{"logits", P, logits}, {"loss", P + logits, 1}};
    std::vector<size_t> tensors = {P, P + logits};  // where a block's tensor begins
    for (const Tensor& t : tensor_table(c))
        for (const Block& block : blocks_of(t)) {
            blocks.push_back(block);
            tensors.push_back(t.offset);
        }
    Model* models[2];
    std::vector<float> result[2], near(P);
    for (int p : {FP32, BF16}) {
        models[p] = model_create(c, p, {.B = B, .T = T, .train = true});
        model_set_inputs(models[p], x.data(), y.data());
        result[p].resize(results);
    }
    std::vector<double> squares(blocks.size(), 0.0), tensor_max(results, 0.0);
    Random random = {7};
    for (int i = 0; i < NEARBY; i++) {
        for (size_t k = 0; k < P; k++) near[k] = parameters[k] * (float)(1 + 0.01 * random.normal());
        for (int p : {FP32, BF16}) {
            Model* m = models[p];
            model_put(m, PARAMETERS, 0, P, near.data());
            model_forward(m, true, 1);
            model_logits(m, &result[p][P]);
            result[p][P + logits] = (float)model_loss(m);
            model_backward(m);
            model_get(m, GRADIENTS, 0, P, result[p].data());
            model_update(m, {0, 0, 0, 1, 0}, 0, 1);  // so that gradients begin anew
        }
        for (size_t k = 0; k < blocks.size(); k++) {
            const Block& block = blocks[k];
            double sum = 0;
            for (size_t at = block.begin; at < block.begin + block.n; at++)
                sum += pow((double)result[BF16][at] - result[FP32][at], 2);
            squares[k] += sum / block.n / NEARBY;
            double& max = tensor_max[tensors[k]];
            max = std::max(max, largest(&result[FP32][block.begin], block.n));
        }
    }
    for (Model* m : models) model_free(m);

    Worst worst;
    for (size_t k = 0; k < blocks.size(); k++) {
        auto found = reference.find(blocks[k].name);
        double theirs = found == reference.end() ? NAN : found->second;
        Worst w;
        // The second term is for what is 0 in theory, and so in the reference's float64.
        w.see(sqrt(squares[k]), FACTOR * theirs + 1e-6 * tensor_max[tensors[k]]);
        if (verbose || !w.ok())
            printf("    bf16: %-14s rms error %9.3g, the reference's %9.3g  %s\n", blocks[k].name.c_str(), w.error,
                   theirs, w.ok() ? "ok" : "OFF");
        w.where = blocks[k].name;
        if (!(w.ratio <= worst.ratio)) worst = w;
    }
    report(worst.ok() && reference.size() == blocks.size(), path,
           format("bf16's rms errors up to %.2f of the reference's times %.1f, in %s", worst.ratio, FACTOR,
                  worst.where.c_str()));
}

enum Bf16 { NEVER, MAY, MUST };  // whether a file of bf16's errors beside a dump is used, or has to be there

// Compares the model of one file with what a dump says of it: logits, loss, every gradient, the losses of AdamW steps.
// And with what stands beside the dump about bf16.
static void check_dump(const std::string& model_path, const std::string& state_path, bool verbose, Bf16 bf16) {
    ModelFile file = open_model(model_path);
    InputFile state = open_file(state_path);
    Header header;
    if (state.size < HEADER_BYTES) die("%s: only %zu bytes, too short for a header", state_path.c_str(), state.size);
    must_read_at(state, 0, header.data(), HEADER_BYTES);
    const char* name = state_path.c_str();
    if (header[0] != DUMP_MAGIC) die("%s: not a debug state (magic %d, not %d)", name, header[0], DUMP_MAGIC);
    if (header[1] != 2) die("%s: debug state of version %d, not 2", name, header[1]);
    const Config& c = file.config;
    if (c.head_size() % SMALL_HEAD != 0 && SMALL_HEAD == 8) {
        printf("left out  %s: on a GPU the head size is a multiple of 8\n", model_path.c_str());
        return;
    }
    int B = header[2], T = header[3], steps = header[4];
    if (header[5] != 0 && header[5] != 64) die("%s: computed in float%d? 0 or 64 is known", name, header[5]);
    double factor = header[5] == 64 ? 1 : 10;  // a dump made in fp32 has rounding errors of its own
    if (B < 1 || T < 1 || T > c.maxT || B > 1 << 20 || steps < 0)
        die("%s: B %d, T %d, %d steps do not fit a context of %d", name, B, T, steps, c.maxT);
    size_t BT = (size_t)B * T, V = c.V, P = parameter_count(c);
    size_t size = HEADER_BYTES + 4 * (2 * BT + BT * V + 1 + P + (steps > 0 ? 5 + (size_t)steps : 0));
    if (state.size != size)
        die("%s: %zu bytes, not the %zu of B %d, T %d and this model", name, state.size, size, B, T);

    size_t offset = HEADER_BYTES;
    auto read = [&](void* out, size_t n) {
        must_read_at(state, offset, out, n * 4);
        offset += n * 4;
    };
    std::vector<int> x(BT), y(BT);
    const size_t losses = P + BT * V;  // where they begin in results: gradients, logits, loss, losses of the steps
    std::vector<float> theirs(losses + 1 + steps);
    float adamw[5] = {0, 0, 0, 1, 0};
    read(x.data(), BT);
    read(y.data(), BT);
    for (size_t i = 0; i < 2 * BT; i++) {
        int token = i < BT ? x[i] : y[i - BT];
        if (token < 0 || token >= c.V) die("%s: token %d, outside the vocabulary of %d", name, token, c.V);
    }
    read(&theirs[P], BT * V + 1);
    read(theirs.data(), P);
    if (steps > 0) {
        read(adamw, 5);
        read(&theirs[losses + 1], steps);
    }

    Model* m = model_create(c, FP32, {.B = B, .T = T, .train = true});
    read_quantity(file, m, PARAMETERS, HEADER_BYTES);
    std::vector<float> parameters(P);
    model_get(m, PARAMETERS, 0, P, parameters.data());
    auto compute = [&](const std::vector<float>& from) {
        std::vector<float> results(theirs.size());
        model_put(m, PARAMETERS, 0, P, from.data());
        for (Quantity moment : {MOMENT1, MOMENT2}) model_put(m, moment, 0, P, results.data());  // zeros
        for (int step = 0; step == 0 || step < steps; step++) {
            model_set_inputs(m, x.data(), y.data());
            model_forward(m, true, 1);
            if (step == 0) model_logits(m, &results[P]);
            model_backward(m);
            if (step == 0) model_get(m, GRADIENTS, 0, P, results.data());
            const float loss = (float)model_loss(m);
            if (step == 0) results[losses] = loss;
            if (step < steps) results[losses + 1 + step] = loss;
            model_update(m, {adamw[0], adamw[1], adamw[2], adamw[3], adamw[4]}, 0, step + 1);
        }
        return results;
    };
    const std::vector<float> ours = compute(parameters);
    std::vector<Block> blocks = {{"logits", P, BT * V}, {"loss", losses, 1, 1e-5}};
    for (int step = 0; step < steps; step++) blocks.push_back({format("step %d", step), losses + 1 + step, 1, 2e-5});
    // llm.c computes a debug state first and then rounds the weights to bf16 for the file. If that happened here, the
    // logits already differ by far more than fp32's rounding errors.
    bool unrounded = file.value_bytes == 2 && !compare_block(ours.data(), theirs.data(), blocks[0], 0, 1).ok();
    std::map<std::string, Draws> draws;  // by block
    Random random = {11};
    for (int i = 0; unrounded && i < 32; i++) {
        const std::vector<float> results = compute(before_rounding(parameters, random));
        auto add = [&](const Block& b) {
            draws[b.name].push_back(difference(&results[b.begin], &ours[b.begin], b.n));
        };
        for (const Block& b : blocks) add(b);
        for (const Tensor& t : tensor_table(c))
            for (const Block& b : blocks_of(t)) add(b);
    }
    model_free(m);
    // If the logits differ by far less than the draws' do, the weights are the file's, and the difference is a mistake.
    if (unrounded && difference(&theirs[P], &ours[P], BT * V).rms < most(draws["logits"], &Difference::rms) / 30) {
        unrounded = false;
        draws.clear();
    }

    double worst = 0;
    auto see = [&](const std::string& what, const Worst& w) {
        if (!(w.ratio <= worst)) worst = w.ratio;
        if (verbose || !w.ok())
            printf("    %-10s %s error %9.3g, tolerance %9.3g  %s\n", what.c_str(), w.where.c_str(), w.error,
                   w.tolerance, w.ok() ? "ok" : "OFF");
    };
    for (const Block& b : blocks)
        see(b.name, compare_block(ours.data(), theirs.data(), b, 0, factor, draws[b.name]));
    for (const Tensor& t : tensor_table(c))
        see(std::string("d") + t.name, compare_tensor(t, ours.data(), theirs.data(), factor, draws));
    close(state.fd);
    close(file.file.fd);
    report(worst <= 1, model_path, format("worst error %.3g of its tolerance%s", worst, unrounded ?
           ", which allows for weights rounded to bf16 after the state was computed" : ""));
    std::string rounding = state_path.substr(0, state_path.rfind(".state.bin")) + ".bf16.txt";
    if (bf16 == MUST || (bf16 == MAY && exists(rounding))) check_rounding(rounding, c, B, T, x, y, parameters, verbose);
}

// --------------------------------------------------------------------------------------------------------------------
// Models made at random, as wide as the dumps': every source's share in skip and depth counts

static Config small_config(int attention, int L = 5, int NH = 3, int HS = SMALL_HEAD) {
    Config c;
    c.maxT = 40, c.V = 61, c.Vp = 128, c.L = L, c.NH = NH, c.C = NH * HS;
    c.attention = attention, c.skip_distance = 2, c.skip_heads = 2, c.depth_stride = 2, c.depth_window = 1;
    return c;
}

static std::string name_of(const Config& c) {
    if (c.attention == SKIP)
        return format("skip, L %d, distance %d, %d of %d heads", c.L, c.skip_distance, c.skip_heads, c.NH);
    if (c.attention == DEPTH) return format("depth, L %d, stride %d, window %d", c.L, c.depth_stride, c.depth_window);
    const char* name = attention_names[c.attention];
    return c.L == 1 ? format("%s, V %d, C %d", name, c.V, c.C) : name;
}

static std::vector<float> random_parameters(const Config& c, uint64_t seed) {
    std::vector<float> p(parameter_count(c), 0.0f);
    Random random = {seed};
    for (const Tensor& t : tensor_table(c)) {
        size_t n = t.offset == 0 ? (size_t)c.V * c.C : t.size();  // wte's padding stays 0
        for (size_t i = 0; i < n; i++)
            p[t.offset + i] = (float)(t.decays ? 1.2 / sqrt(t.cols) * random.normal() : t.mean + 0.3 * random.normal());
    }
    return p;
}

static std::vector<int> random_tokens(size_t n, int V, uint64_t seed) {
    std::vector<int> tokens(n);
    Random random = {seed};
    for (int& t : tokens) t = (int)random.below(V);
    return tokens;
}

struct Batch {
    int B, T;
    std::vector<int> x, y;

    Batch(const Config& c, int b, int t)
        : B(b), T(t), x(random_tokens(b * t, c.V, 1)), y(random_tokens(b * t, c.V, 2)) {}
};

static Model* random_model(const Config& c, int precision, const Workload& work) {
    Model* m = model_create(c, precision, work);
    std::vector<float> p = random_parameters(c, 3);
    model_put(m, PARAMETERS, 0, p.size(), p.data());
    return m;
}

static const AdamW test_adamw = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f};

// All that a few training steps leave behind: logits, losses, gradients, parameters, moments; and the logits after a
// prompt and after each of a few more tokens.
static std::vector<float> everything(const Config& c, Precision precision, const Batch& batch, int steps = 2) {
    size_t P = parameter_count(c), BT = batch.x.size();
    const int sequences = 2, prompt = 5, decoded = 3;
    Model* m = random_model(c, precision, {.B = batch.B, .T = batch.T, .train = true, .sequences = sequences});
    std::vector<float> all(BT * c.V + BT + 4 * P + (1 + decoded) * sequences * c.V);
    float *tensors = all.data() + BT * c.V + BT, *logits = tensors + 4 * P;
    for (int step = 1; step <= steps; step++) {
        model_set_inputs(m, batch.x.data(), batch.y.data());
        model_forward(m, true, 1);
        model_logits(m, all.data());
        model_token_losses(m, all.data() + BT * c.V);
        model_backward(m);
        model_update(m, test_adamw, 1, step);
    }
    for (Quantity q : {PARAMETERS, GRADIENTS, MOMENT1, MOMENT2}) model_get(m, q, 0, P, tensors), tensors += P;
    std::vector<int> tokens = random_tokens(sequences * prompt, c.V, 4);
    model_prefill(m, tokens.data(), prompt, logits);
    for (int i = 1; i <= decoded; i++) model_prefill(m, tokens.data() + i, 1, logits + i * sequences * c.V);
    model_free(m);
    return all;
}

static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The settings that the tests below go through.
static std::vector<Config> settings() {
    std::vector<Config> all;
    for (int attention = 0; attention < ATTENTIONS; attention++) all.push_back(small_config(attention));
    for (int distance : {1, 2, 4})
        for (int heads : {1, 2, 3}) {
            Config c = small_config(SKIP);
            c.skip_distance = distance, c.skip_heads = heads;
            if (distance != 2 || heads != 2) all.push_back(c);
        }
    for (int stride : {1, 2, 3})
        for (int window : {0, 1, 2}) {
            Config c = small_config(DEPTH);
            c.depth_stride = stride, c.depth_window = window;
            if (stride != 2 || window != 1) all.push_back(c);
        }
    return all;
}

// A vocabulary, and channels, that take a GPU's blocks more rounds and more warps than one.
static std::vector<Config> wide_settings() {
    std::vector<Config> all = {small_config(VANILLA, 1, 3, 88), small_config(VANILLA, 1, 3, 104),
                               small_config(VANILLA, 1)};
    all[2].V = 16300, all[2].Vp = 16384;
#ifdef GPT2_CUDA
    all.push_back(small_config(VANILLA, 1, 9, 120));  // beyond what layernorm_forward keeps in registers
#endif
    return all;
}

// --------------------------------------------------------------------------------------------------------------------
// Tests through the model interface

// An attention that reaches no other layer is vanilla, to the bit.
static void test_identities(Precision precision) {
    Config c = small_config(VANILLA), one_layer = small_config(VANILLA, 1);
    Batch batch(c, 2, 37);
    std::vector<float> vanilla = everything(c, precision, batch), vanilla_1 = everything(one_layer, precision, batch);
    auto same = [&](const Config& other, const std::vector<float>& as) {
        return same_bits(everything(other, precision, batch), as);
    };
    std::string in = format("%s: ", precision_names[precision]);
    for (int attention = VANILLA + 1; attention < ATTENTIONS; attention++) {
        const char* name = attention_names[attention];
        c.attention = one_layer.attention = attention;
        report(same(one_layer, vanilla_1), in + name + " with one layer equals vanilla to the bit");
        report(!same(c, vanilla), in + name + " with more layers does not equal vanilla");
    }
    c.attention = SKIP, c.skip_heads = 0;
    report(same(c, vanilla), in + "skip with no heads equals vanilla to the bit");
    c.skip_heads = 2, c.skip_distance = c.L;
    report(same(c, vanilla), in + "skip as far as the depth equals vanilla to the bit");
}

static void test_threads(Precision precision) {
#ifdef _OPENMP
    int threads = omp_get_max_threads();
    for (int attention = 0; attention < ATTENTIONS; attention++) {
        Config c = small_config(attention, 4, 3, 24);
        Batch batch(c, 3, 37);
        omp_set_num_threads(1);
        std::vector<float> one = everything(c, precision, batch);
        bool same = true;
        for (int n : {2, 3, 7}) {
            omp_set_num_threads(n);
            same = same && same_bits(everything(c, precision, batch), one);
        }
        report(same, format("%s: 1, 2, 3 and 7 threads give the same bits: %s", precision_names[precision],
                            attention_names[attention]));
    }
    omp_set_num_threads(threads);
#else
    (void)precision;
#endif
}

// Along a random direction u, for each layer of each tensor: (loss(w + h u) - loss(w - h u))/2h = dw·u, up to h² and
// the rounding of the loss, which is why h is not small. A setting has one in so many of these, and the next others.
static void test_finite_differences(const std::vector<Config>& configs, size_t one_in = 1) {
    size_t turn = 0;
    for (const Config& c : configs) {
        size_t P = parameter_count(c);
        Batch batch(c, 1, 21);
        Model* m = random_model(c, FP32, {.B = 1, .T = 21, .train = true});
        std::vector<float> gradients(P), w = random_parameters(c, 3), moved;
        model_set_inputs(m, batch.x.data(), batch.y.data());
        model_forward(m, true, 1);
        model_backward(m);
        model_loss(m);
        model_get(m, GRADIENTS, 0, P, gradients.data());
        Worst worst;
        Random random = {5};
        for (const Tensor& t : tensor_table(c)) {
            for (const auto& [name, begin, n, tolerance] : blocks_of(t)) {
                if (turn++ % one_in != 0) continue;
                std::vector<float> u(n);
                double expected = 0, gradient2 = 0, u2 = 0;
                for (size_t i = 0; i < n; i++) {
                    u[i] = t.offset == 0 && i >= (size_t)c.V * c.C ? 0 : (float)random.normal();
                    gradient2 += (double)gradients[begin + i] * gradients[begin + i];
                    u2 += (double)u[i] * u[i];
                }
                if (gradient2 == 0) continue;  // what nobody reads; the dumps check that it is 0
                // Half at random, half along the gradient, so that there is a slope to measure.
                for (size_t i = 0; i < n; i++) u[i] = (float)(u[i] / sqrt(u2) + gradients[begin + i] / sqrt(gradient2));
                for (size_t i = 0; i < n; i++) expected += (double)u[i] * gradients[begin + i];
                double h = 2e-2, losses[2];
                for (int side = 0; side < 2; side++) {
                    moved = w;
                    for (size_t i = 0; i < n; i++) moved[begin + i] += (float)((side ? -h : h) * u[i]);
                    model_put(m, PARAMETERS, 0, P, moved.data());
                    model_forward(m, false, 0);
                    losses[side] = model_loss(m);
                }
                double difference = (losses[0] - losses[1]) / (2 * h);
                if (worst.see(fabs(difference - expected), 0.02 * fabs(expected) + 1e-4))
                    worst.where = format("%s: %.5g, not %.5g", name.c_str(), expected, difference);
            }
        }
        model_free(m);
        report(worst.ok(), "finite differences, each tensor of each layer: " + name_of(c), worst.text());
    }
}

// Four micro-batches at a quarter of the scale each are one batch. A token's activations and their gradients are then
// the same bits, rounded or not; only sums over tokens, in fp32, run in another order. Nothing waits for a GPU in
// between, whose batches come in by turns in two buffers.
static void test_accumulation(Precision precision, const Config& c, int B, int T) {
    const int parts = 4;
    size_t P = parameter_count(c), part = (size_t)B * T;
    Batch batch(c, parts * B, T);
    std::vector<float> whole(P), sums(P), again(P);
    Model* m = random_model(c, precision, {.B = parts * B, .T = T, .train = true});
    model_set_inputs(m, batch.x.data(), batch.y.data());
    model_forward(m, true, 1);
    model_backward(m);
    double loss = model_loss(m);
    model_get(m, GRADIENTS, 0, P, whole.data());
    model_free(m);
    m = random_model(c, precision, {.B = B, .T = T, .train = true});
    auto accumulate = [&] {
        for (int i = 0; i < parts; i++) {
            model_set_inputs(m, batch.x.data() + i * part, batch.y.data() + i * part);
            model_forward(m, true, 1.0f / parts);
            model_backward(m);
        }
    };
    accumulate();
    double loss_of_parts = model_loss(m);
    model_get(m, GRADIENTS, 0, P, sums.data());
    Worst worst;
    // If one algorithm rounds before bias or GELU and another does not, bf16 gradients move by up to 4 % of a block's
    // largest, and the key bias's, which should be 0, by 0.2 % of all of qkvb's (emulated). A micro-batch that is
    // forgotten makes a quarter.
    const double looser = algorithms_vary() && precision == BF16 ? 4000 : 1;
    worst.see(fabs(loss - loss_of_parts), looser * 1e-6 * loss);
    for (const Tensor& t : tensor_table(c)) {
        Worst w = compare_tensor(t, sums.data(), whole.data(), looser);
        if (!(w.ratio <= worst.ratio)) worst = w;
    }
    // After an update, gradients begin anew.
    model_update(m, {0, 0.9f, 0.95f, 1e-8f, 0}, 0, 1);
    accumulate();
    model_get(m, GRADIENTS, 0, P, again.data());
    model_free(m);
    report(worst.ok() && same_bits(again, sums),
           format("%s: gradients accumulate: %s, B %d, T %d", precision_names[precision], attention_names[c.attention],
                  parts * B, T), format("worst %.2f of its tolerance", worst.ratio));
}

// Head sizes and lengths around those of tiles: what bf16 gives is near what fp32 gives. A gradient's block differs by
// its rounding errors, a hundredth of its size or so (a tenth in a model of 15 channels); a tile, a mask or a row that
// is wrong shows as much more. Vanilla's key bias, whose gradient is 0 in theory, is left out.
static void test_head_sizes(const std::vector<int>& sizes, const std::vector<int>& lengths) {
    for (int attention = 0; attention < ATTENTIONS; attention++) {
        Worst worst;
        for (int HS : sizes)
            for (int T : lengths) {
                const int NH = HS % 2 ? 1 : 2, B = NH;  // an odd one leaves nothing at a multiple of 16 bytes
                Config c = small_config(attention, 3, NH, HS);
                c.maxT = T, c.skip_distance = 1, c.skip_heads = 1;
                Batch batch(c, B, T);
                size_t P = parameter_count(c);
                std::vector<float> gradients[2];
                for (int p : {BF16, FP32}) {
                    gradients[p].resize(P);
                    Model* m = random_model(c, p, {.B = B, .T = T, .train = true});
                    model_set_inputs(m, batch.x.data(), batch.y.data());
                    model_forward(m, true, 1);
                    model_backward(m);
                    model_get(m, GRADIENTS, 0, P, gradients[p].data());
                    model_free(m);
                }
                for (const Tensor& t : tensor_table(c))
                    for (const Block& block : blocks_of(t)) {
                        double error = 0, square = 0;
                        for (size_t i = block.begin; i < block.begin + block.n; i++) {
                            error += pow((double)gradients[BF16][i] - gradients[FP32][i], 2);
                            square += pow((double)gradients[FP32][i], 2);
                        }
                        bool key_bias = block.name.starts_with("dqkvb") && block.name.ends_with("k");
                        bool alone = T == 1 && block.name.starts_with("dqkv") && !block.name.ends_with("v");
                        // A single token has no choice of what to attend to; and has no use for a layer that skips.
                        if (key_bias || alone || (T == 1 && NH == 1)) continue;
                        if (worst.see(sqrt(error), (NH == 1 ? 0.3 : 0.06) * sqrt(square)))
                            worst.where = format("%s, HS %d, T %d", block.name.c_str(), HS, T);
                    }
            }
        report(worst.ok(), format("bf16 is near fp32 at all head sizes and lengths: %s", attention_names[attention]),
               worst.text());
    }
}

// AdamW and clipping against their definition in double; what must not change does not.
static void test_update(Precision precision) {
    Config c = small_config(SKIP);
    c.skip_distance = 3;  // layers 3 and 4 have keys and values that nobody reads
    size_t P = parameter_count(c);
    Batch batch(c, 2, 17);
    Model* m = random_model(c, precision, {.B = 2, .T = 17, .train = true});
    std::vector<double> w(P), first(P, 0.0), second(P, 0.0);
    std::vector<float> ours(P), gradients(P);
    model_get(m, PARAMETERS, 0, P, ours.data());
    std::copy(ours.begin(), ours.end(), w.begin());
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.3, clip = 0.7;
    const AdamW adamw = {(float)lr, (float)beta1, (float)beta2, (float)eps, (float)decay};
    bool norms_ok = true;
    for (int step = 1; step <= 3; step++) {
        model_set_inputs(m, batch.x.data(), batch.y.data());
        model_forward(m, true, 1);
        model_backward(m);
        model_get(m, GRADIENTS, 0, P, gradients.data());
        double norm = 0;
        for (float g : gradients) norm += (double)g * g;
        norm = sqrt(norm);
        model_update(m, adamw, (float)clip, step);
        double our_norm = model_norm(m);
        norms_ok = norms_ok && fabs(our_norm - norm) <= 1e-6 * norm && norm > clip;
        for (const Tensor& t : tensor_table(c))
            for (size_t i = t.offset; i < t.offset + t.size(); i++) {
                double g = gradients[i] * std::min(1.0, clip / norm);
                first[i] = beta1 * first[i] + (1 - beta1) * g;
                second[i] = beta2 * second[i] + (1 - beta2) * g * g;
                double m_hat = first[i] / (1 - pow(beta1, step)), v_hat = second[i] / (1 - pow(beta2, step));
                bool matrix = t.cols > 1;  // vectors do not decay
                w[i] -= lr * (m_hat / (sqrt(v_hat) + eps) + (matrix ? decay : 0) * w[i]);
            }
    }
    model_get(m, PARAMETERS, 0, P, ours.data());
    Worst worst;
    for (size_t i = 0; i < P; i++) worst.see(fabs(ours[i] - w[i]), 3e-6 * (1 + fabs(w[i])));
    std::string in = format("%s: ", precision_names[precision]);
    report(worst.ok() && norms_ok, in + "AdamW, decay and clipping equal their definition",
           format("worst %.2f of its tolerance", worst.ratio));

    auto zero = [&](const std::vector<float>& p) {
        return std::all_of(&p[(size_t)c.V * c.C], &p[(size_t)c.Vp * c.C], [](float f) { return f == 0; });
    };
    report(zero(gradients) && zero(ours), in + "padded rows of wte get no gradient and no update");

    auto values = [&] {  // parameters and moments
        std::vector<float> all(3 * P);
        model_get(m, PARAMETERS, 0, P, &all[0]);
        model_get(m, MOMENT1, 0, P, &all[P]);
        model_get(m, MOMENT2, 0, P, &all[2 * P]);
        return all;
    };
    const std::vector<float> before = values();
    bool kept = true;
    for (float bad : {NAN, INFINITY}) {
        model_put(m, GRADIENTS, P / 2, 1, &bad);
        model_update(m, adamw, (float)clip, 4);
        kept = kept && !std::isfinite(model_norm(m)) && same_bits(values(), before);
    }
    report(kept, in + "a gradient that is not finite changes nothing");

    // The model computes with what it was updated to.
    std::vector<float> updated(batch.x.size() * c.V), put(updated.size());
    model_forward(m, false, 0);
    model_logits(m, updated.data());
    model_free(m);
    m = model_create(c, precision, {.B = 2, .T = 17});
    model_put(m, PARAMETERS, 0, P, ours.data());
    model_set_inputs(m, batch.x.data(), batch.y.data());
    model_forward(m, false, 0);
    model_logits(m, put.data());
    model_free(m);
    report(same_bits(updated, put), in + "updated parameters are those in use");
}

// The logits of a forward pass, (B, T, V)
static std::vector<float> forward_logits(const Config& c, Precision precision, const Batch& batch) {
    Model* m = random_model(c, precision, {.B = batch.B, .T = batch.T});
    std::vector<float> logits(batch.x.size() * c.V);
    model_set_inputs(m, batch.x.data(), batch.y.data());
    model_forward(m, false, 0);
    model_logits(m, logits.data());
    model_free(m);
    return logits;
}

// A sequence decoded from a cache against all at once: three pieces of some tokens, then ten single ones, or, where
// pieces are single tokens, all of it so. Sums run in another order where a piece is a single token: in fp32, logits
// agree to rounding. In bf16, where each then rounds in its own way, decoding must be as near to fp32 as the forward
// pass is.
static void check_decoding(const Config& c, Precision precision, const std::vector<int>& pieces) {
    const int T = c.maxT;
    const size_t V = c.V;
    Batch batch(c, 2, T);
    std::vector<float> expected = forward_logits(c, FP32, batch), last(2 * V);
    std::vector<float> forward = precision == BF16 ? forward_logits(c, BF16, batch) : expected;
    double scale = largest(expected.data(), expected.size());
    Worst worst;
    Model* m = random_model(c, precision, {.sequences = 2});
    for (int piece : pieces) {
        model_reset_cache(m);
        std::vector<int> tokens(2 * (size_t)piece);
        double error = 0, rounding = 0;
        for (int t = 0, n; t < (piece == 1 ? T : std::min(T, 3 * piece + 10)); t += n) {
            n = t < 3 * piece && t + piece <= T ? piece : 1;
            for (int b = 0; b < 2; b++) std::copy_n(batch.x.data() + b * T + t, n, tokens.data() + b * n);
            model_prefill(m, tokens.data(), n, last.data());
            for (size_t b = 0; b < 2; b++)
                for (size_t v = 0, at = (b * T + t + n - 1) * V; v < V; v++, at++) {
                    double difference = last[b * V + v] - expected[at];
                    if (precision == FP32) worst.see(fabs(difference), 1e-5 * scale);
                    error += difference * difference, rounding += pow(forward[at] - expected[at], 2);
                }
        }
        if (precision == BF16) worst.see(sqrt(error), 1.5 * sqrt(rounding));
    }
    model_free(m);
    report(worst.ok(), format("%s: cached decoding equals the forward pass: %s, %d heads of %d, T %d",
                              precision_names[precision], name_of(c).c_str(), c.NH, c.head_size(), T),
           format("worst %.2f of its tolerance", worst.ratio));
}

static void test_decoding(Precision precision) {
    for (Config c : settings()) {
        c.maxT = EMULATED ? 70 : 150;
        check_decoding(c, precision, {1, 2, 33, c.maxT});
    }
    // On a GPU, bf16's heads of these sizes are attended to in tiles; and one token has rounds of 256 keys.
    for (int attention = 0; attention < ATTENTIONS; attention++) {
        Config c = small_config(attention, 3, 2, attention == DEPTH ? 128 : 64);
        c.maxT = 280, c.skip_distance = 1, c.skip_heads = 1;
        check_decoding(c, precision, {135});
    }
}

// Skip's cache is smaller by its unread heads.
static void test_memory() {
    Config c = small_config(SKIP, 12, 12, 8);
    c.skip_distance = 9, c.skip_heads = 9;
    Memory skip = model_memory(c, FP32, {.sequences = 2});
    c.attention = VANILLA;
    Memory vanilla = model_memory(c, FP32, {.sequences = 2});
    c.attention = DEPTH;
    Memory depth = model_memory(c, FP32, {.sequences = 2});
    size_t expected = 2ul * c.L * c.maxT * 2 * c.C * sizeof(float);
    report(vanilla.cache == expected && depth.cache == expected && skip.cache == expected - expected * 27 / 144,
           "KV cache: depth's as large as vanilla's, skip's smaller by its unread heads");
#ifdef GPT2_EMULATED  // (a GPU's own allocator rounds up)
    bool equal = true;
    for (int attention = 0; attention < ATTENTIONS; attention++)
        for (int precision : {FP32, BF16})
            for (Workload work : {Workload{.B = 2, .T = 17, .train = true},
                                  {.B = 2, .T = 17, .train = true, .recompute = true}, {.B = 2, .T = 17},
                                  {.B = 1, .T = 5, .train = true, .sequences = 1}, {.sequences = 3}}) {
                Config small = small_config(attention);
                size_t before = device_free_memory();
                Model* m = model_create(small, precision, work);
                size_t taken = before - device_free_memory();
                equal = equal && taken == model_memory(small, precision, work).total();
                model_free(m);
                equal = equal && device_free_memory() == before;
            }
    report(equal, "the memory that is counted is what is allocated, to the byte, and is given back");
#endif
}

// Neither a training step nor decoding asks for memory: on a CPU by `new`, on a GPU by taking it from what is free.
static void test_allocations(Precision precision) {
    size_t times = 0;
    bool as_before = true;
    for (int attention = 0; attention < ATTENTIONS; attention++) {
        Config c = small_config(attention);
        Batch batch(c, 2, 17);
        std::vector<float> logits(c.V);
        Model* m = random_model(c, precision, {.B = 2, .T = 17, .train = true, .sequences = 1});
        [[maybe_unused]] bool steady = false;  // in one round at the least: other programs may use the GPU, too
        for (int round = 0; round < (ON_GPU ? 4 : 1); round++) {  // a GPU loads code when it is first used
            const size_t free_before = device_free_memory();
            times -= allocations;
            model_reset_cache(m);
            model_set_inputs(m, batch.x.data(), batch.y.data());
            model_forward(m, true, 1);
            model_backward(m);
            model_update(m, test_adamw, 1, 1);
            model_prefill(m, batch.x.data(), 17, logits.data());
            model_prefill(m, batch.x.data(), 1, logits.data());
            times += allocations;
            steady = steady || device_free_memory() == free_before;
        }
#ifdef GPT2_CUDA
        as_before = as_before && steady;
        times = 0;  // CUDA's library may well call new
#endif
        model_free(m);
    }
    report(times == 0 && as_before, format("%s: steps and decoding allocate nothing", precision_names[precision]),
           format("%zu times", times));
}

#ifndef GPT2_CUDA
// --------------------------------------------------------------------------------------------------------------------
// The CPU's inner parts against plain loops

template <class X>
static std::vector<X> random_values(size_t n, uint64_t seed) {
    std::vector<X> v(n);
    Random random = {seed};
    for (X& f : v) f = (float)random.normal();
    return v;
}

struct TestWorkspace {
    std::vector<float> local, partial, dx_sum;
    Workspace ws;

    TestWorkspace(size_t local_size)
        : local(thread_count() * local_size, NAN), partial(1 << 18, NAN), dx_sum(1 << 18, NAN) {
        ws = {.local = local.data(), .local_size = local_size, .partial = partial.data(), .squares = nullptr,
              .dx_sum = dx_sum.data()};
    }
};

// The fast matmul equals matmul_plain for either order of either operand, stores each element once, and gives the same
// bits with any number of threads. Between the rows of all arrays lies NaN.
template <class X>
static void test_matmul(const char* type) {
    constexpr size_t PER = K_PER_STEP<X>;
    const size_t whole_KC = KC;
    Worst worst;
    size_t turn = 0;
    std::vector<float> results;
    auto check = [&](const TestWorkspace& space, size_t M, size_t N, size_t K) {
        // Rows at even and odd distances, and (of bf16) beginning at a multiple of four bytes or not
        const size_t gap = turn % 4, begin = turn / 4 % 2, tail = turn / 8 % 2;
        const bool prefetch = turn++ / 16 % 2;
        auto operand = [&](std::vector<X>& values, size_t n, bool is_along_k, uint64_t seed) {
            const size_t rows = is_along_k ? n : K, columns = is_along_k ? K : n, stride = columns + gap;
            const std::vector<X> inner = random_values<X>(rows * columns, seed);
            values.assign(begin + (rows - 1) * stride + columns + tail * stride, NAN);
            for (size_t r = 0; r < rows; r++) std::copy_n(&inner[r * columns], columns, &values[begin + r * stride]);
            return Operand<X>{values.data() + begin, stride, is_along_k};
        };
        const std::vector<X> other(prefetch ? M * N : 0, NAN);
        std::vector<X> a, b;
        const size_t ldc = N + gap;
        std::vector<float> c(M * ldc);
        std::vector<double> expected(M * N);
        size_t strays = 0;
        for (int layout = 0; layout < 4; layout++) {
            const Operand<X> A = operand(a, M, layout & 1, M), B = operand(b, N, layout & 2, N + 1);
            std::fill(c.begin(), c.end(), NAN);
            for (bool add : {false, true}) matmul(space.ws, M, N, K, A, B, StoreSums{c.data(), ldc, add});
            matmul(space.ws, M, N, K, A, B, [&](size_t m, size_t n, vec x, size_t count) {
                float* c_mn = &c[m * ldc + n];
                store(c_mn, load(c_mn, count) + x, count);
            }, prefetch ? other.data() : nullptr);
            results.insert(results.end(), c.begin(), c.end());
            matmul_plain(expected.data(), M, N, K, A, B);
            for (size_t m = 0; m < M; m++) {
                for (size_t n = N; n < ldc; n++) strays += !std::isnan(c[m * ldc + n]);
                for (size_t n = 0; n < N; n++) {
                    double absolute = 0;
                    for (size_t k = 0; k < K; k++) absolute += fabs((double)A.value(m, k) * B.value(n, k));
                    // Each product and each addition rounds by at most 2^-24 of a partial sum.
                    const double tolerance = 3 * (K + 2.0) * 0x1p-24 * absolute + 1e-30;
                    if (worst.see(fabs(c[m * ldc + n] - 3 * expected[m * N + n]) + strays, tolerance))
                        worst.where = format("%zu x %zu x %zu, layout %d, gap %zu", M, N, K, layout, gap);
                }
            }
        }
    };
    const TestWorkspace space(matmul_local_size<X>());
    for (size_t n = 1; n <= 70; n++)
        for (size_t other : {1, 17, 33})
            for (size_t third : {1, 17, 33}) {
                check(space, n, other, third);
                check(space, other, n, third);
                check(space, other, third, n);
            }
    Random random = {11};
    for (int i = 0; i < 10; i++) check(space, 1 + random.below(200), 1 + random.below(300), 1 + random.below(900));
    for (size_t M = 1; M <= FEW_ROWS; M++) check(space, M, 16 * LANES * thread_count() + 5, 70);
    check(space, 1, 37, 1301);
    check(space, 29, 2 * NC + 1, 2 * KC + 1);

    const int threads = thread_count();
    KC = AMX<X> ? LANES : 4;
    std::vector<float> of_one_thread;
    for (int n : {1, 3}) {
        set_thread_count(n);  // few, for wide and high blocks
        const TestWorkspace few(matmul_local_size<X>());
        turn = 0;
        results.clear();
        for (size_t i = 0; i < 4; i++) {  // with each gap
            check(few, 31, 130, 4 * KC * PER - 1);                     // some chunks of K
            check(few, 15, NR + LANES, 3 * KC * PER - 2 * PER);        // B in place, but not in whole panels
            check(few, 15, 2 * NC_PACKED + 5, 10 * KC * PER + 1 - i);  // more columns than a block has
            check(few, 3 * 1027, NR + LANES - i, 2 * PER + 1);         // blocks of rows
            check(few, 5, (1 << 15) + LANES, 5);                       // rows of B far apart: packed
        }
        check(few, SUMS / NR + 7, 8, 2 * KC * PER + 1);  // sums that wait for the next chunk: blocks of rows
        check(few, SUMS / NC_PACKED + 9, 2 * NC_PACKED, 8 * KC * PER + PER);
        if (n == 1) of_one_thread = results;
    }
    KC = whole_KC;
    set_thread_count(threads);
    report(same_bits(results, of_one_thread), format("matmul of %s: 1 and 3 threads give the same bits", type));
    report(worst.ok(), format("matmul of %s equals its three loops", type), worst.text());
}

// Loads and stores of some lanes leave others alone, and round as bf16's constructor does.
template <class X>
static void test_vectors(const char* type) {
    auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    bool some = true, all = true;
    for (size_t n = 0; n <= LANES + 3; n++) {
        const size_t lanes = std::min<size_t>(n, LANES);
        std::vector<X> from = random_values<X>(lanes, n + 1), to(LANES + 4, (X)7.0f);
        from.reserve(1);  // no null pointer
        const vec v = load(from.data(), n < LANES ? n : LANES + n);  // nothing lies behind the n values
        store(to.data() + 1, v, n);
        for (size_t i = 0; i < LANES; i++) some = some && v[i] == (i < lanes ? (float)from[i] : 0.0f);
        for (size_t i = 0; i < to.size(); i++)
            some = some && (float)to[i] == (i > 0 && i <= lanes ? (float)from[i - 1] : 7.0f);
    }
    report(some, format("%s: loads and stores of some lanes", type));
    for (uint32_t upper = 0; upper <= 0xffff; upper++) {
        const uint32_t lower[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
        vec v;
        for (int i = 0; i < LANES; i++) v[i] = std::bit_cast<float>(upper << 16 | lower[i % 6]);
        const vec r = rounded<X>(v);
        X to[LANES];
        store(to, v);
        const vec back = load(to);
        for (int i = 0; i < LANES; i++) {
            const float expected = (X)(float)v[i];
            for (float value : {r[i], (float)to[i], back[i]}) all = all && bits(value) == bits(expected);
        }
    }
    report(all, format("%s: vectors round to it as single values do", type));
}

static void test_maxima() {
    bool largest = true;
    for (size_t rows = 0; rows < 12; rows++) {
        const std::vector<float> s = random_values<float>(11 * NR + LANES, rows);
        const vec start = load(random_values<float>(LANES, 100).data()), most = maxima(start, s.data(), NR, rows);
        for (int lane = 0; lane < LANES; lane++) {
            float expected = start[lane];
            for (size_t r = 0; r < rows; r++) expected = std::max(expected, s[r * NR + lane]);
            largest = largest && most[lane] == expected;
        }
    }
    for (size_t n = 1; n <= 5 * LANES + 1; n++) {
        std::vector<float> s = random_values<float>(n, n);
        for (size_t at = 0; at < n; at++) {
            const float x = s[at];
            s[at] = 100;
            largest = largest && maximum(s.data(), n) == 100;
            s[at] = x;
        }
    }
    report(largest, "maxima");
}

// What ThreadTrials makes of times that depend on the number of threads: it settles on the fastest number, returns to
// it after trials, which become rarer, and follows when the times change.
static void test_thread_trials() {
    // Trials of four steps, the first after 16 steps, each after twice as many as the one before, up to 512
    constexpr int MANY = 10000, ON_TRIAL = 4 * (6 + MANY / 512);
    for (int most : {1, 2, 3, 16}) {
        std::string wrong;
        auto expect = [&](bool holds, const char* what) {
            if (!holds && wrong.empty()) wrong = what;
        };
        auto steps = [&](ThreadTrials& trials, int n, auto time) {  // how many of n steps took each number of threads
            std::vector<int> used(most + 1, 0);
            for (int i = 0; i < n; i++) {
                const int threads = trials.threads;
                const bool in_range = threads >= 1 && threads <= most;
                expect(in_range, "no more than are allowed, and at least one");
                if (in_range) used[threads]++;
                expect(trials.next(time(threads)) == trials.threads, "`next` returns the number in use");
            }
            return used;
        };
        auto settles = [&](ThreadTrials& trials, int at, auto time) {
            steps(trials, 4000, time);
            const int others = MANY - steps(trials, MANY, time)[at];
            return others <= ON_TRIAL && (most == 1 || others > 0);
        };
        const int some = std::max(1, most / 4);
        auto all_fastest = [](int threads) { return 0.1 / threads; };
        auto one_fastest = [](int threads) { return 0.001 * threads; };
        auto some_fastest = [&](int threads) { return 0.01 * (1 + abs(threads - some)); };

        ThreadTrials trials = {.most = most};
        expect(200 - steps(trials, 200, all_fastest)[most] <= 8, "from the start all threads, and short trials");
        expect(settles(trials, most, all_fastest), "all threads are fastest");
        expect(settles(trials, 1, one_fastest), "then one is");
        expect(settles(trials, most, all_fastest), "then all are again");
        expect(settles(trials, some, some_fastest), "then some are");
        expect(settles(trials, most, all_fastest), "then all are again, from there");
        const int before_trial = steps(trials, 40, [&](int threads) { return threads == most ? 0.25 : 0.01; })[most];
        expect(most == 1 || before_trial < 20, "a step that takes twice as long brings on a trial");
        expect(settles(trials, 1, one_fastest), "then one is again");
        expect(settles(trials, 1, [](int threads) { return 0.4 * threads; }), "and of long steps, too");
        report(wrong.empty(), format("number of threads tried out, %d allowed", most), wrong);
    }
#ifdef _OPENMP
    // What is timed: forward and backward, although the next batch is set before the update.
    const Config c = small_config(VANILLA);
    const Batch batch(c, 2, 37);
    Model* m = random_model(c, FP32, {.B = 2, .T = 37, .train = true});
    model_set_inputs(m, batch.x.data(), batch.y.data());
    const double start = seconds();
    model_forward(m, true, 1);
    model_backward(m);
    const double passes = seconds() - start;
    model_set_inputs(m, batch.x.data(), batch.y.data());
    model_update(m, test_adamw, 1, 1);
    report(thread_trials.times[0] >= 0.9 * passes, "trials time forward and backward");
    model_free(m);
#endif
}

// A sum of many equal products, whose roundings all go one way: it may lose no more than its chunks and their sum do.
static void test_long_sum() {
    const size_t M = 15, N = 70, K = 50257;
    const std::vector<float> a(M * K, 0.1f), b(K * N, 0.3f);
    std::vector<float> c(M * N);
    const TestWorkspace space(matmul_local_size<float>());
    matmul(space.ws, M, N, K, along_k(a.data(), K), across_k(b.data(), N), StoreSums{c.data(), N, false});
    const double expected = K * (double)0.1f * 0.3f;
    double worst = 0;
    for (float sum : c) worst = std::max(worst, fabs(sum / expected - 1));
    report(worst < 1e-5, "a long sum rounds little", format("%.1e of it", worst));
}

// Limits of control groups, by files like the kernel's in a folder that takes the place of the root.
static void test_control_groups() {
    char folder[] = "/tmp/test_gpt2_XXXXXX";
    if (!mkdtemp(folder)) die("%s: %s", folder, strerror(errno));
    system_root = folder;
    auto write = [&](const std::string& path, const std::string& text) {
        std::filesystem::create_directories(folder_of(folder + path));
        OutputFile f = create_file(folder + path, text);
        commit_file(f);
    };
    auto expect = [&](const char* name, const char* own, const std::map<std::string, std::string>& files, double mib,
                      int threads) {
        std::filesystem::remove_all(folder);
        write("/proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable:    2097152 kB\n");
        write("/proc/self/cgroup", own);
        for (const auto& [path, text] : files) write("/sys/fs/cgroup/" + path, text);
        const double free = device_free_memory() / 0x1p20;
        report(free == mib && allowed_threads() == threads, std::string("limits of control groups: ") + name,
               format("%g MiB, %d threads", free, allowed_threads()));
    };
    const std::string mib_60 = std::to_string(60 << 20), mib_10 = std::to_string(10 << 20);
    const std::string stat = "anon 1\ninactive_file 2097152\nactive_file 1048576\n";
    const std::string stat_1 = "inactive_file 0\ntotal_inactive_file 2097152\ntotal_active_file 1048576\n";
    expect("none", "", {}, 2048, INT_MAX);
    expect("version 2, in a container", "0::/\n",
           {{"memory.max", mib_60}, {"memory.current", mib_10}, {"memory.stat", stat}, {"cpu.max", "150000 100000"}},
           53, 2);
    expect("version 2, its own", "0::/user.slice/a.service\n",
           {{"user.slice/a.service/memory.max", mib_60}, {"user.slice/a.service/memory.current", mib_10},
            {"user.slice/a.service/cpu.max", "max 100000"}, {"cpu.max", "300000 100000"}}, 50, 3);
    expect("version 2, of a group above", "0::/user.slice/a:b/c\n",
           {{"user.slice/memory.max", mib_60}, {"user.slice/memory.current", mib_10},
            {"user.slice/a:b/c/memory.max", "max"}, {"user.slice/a:b/cpu.max", "50000 100000"},
            {"user.slice/cpu.max", "400000 100000"}}, 50, 1);
    expect("version 1", "11:cpu,cpuacct:/slurm/job\n4:memory:/slurm/job\n0::/\n",
           {{"memory/slurm/job/memory.limit_in_bytes", mib_60}, {"memory/slurm/job/memory.usage_in_bytes", mib_10},
            {"memory/memory.limit_in_bytes", "9223372036854771712"},
            {"memory/memory.usage_in_bytes", "0"}, {"cpu/slurm/cpu.cfs_quota_us", "200000"},
            {"cpu/slurm/cpu.cfs_period_us", "100000"}, {"cpu/slurm/job/cpu.cfs_quota_us", "-1"}}, 50, 2);
    expect("version 1, in a container", "4:memory:/docker/0123\n1:cpu:/docker/0123\n",
           {{"memory/memory.limit_in_bytes", mib_60}, {"memory/memory.usage_in_bytes", mib_10},
            {"memory/memory.stat", stat_1}, {"cpu/cpu.cfs_quota_us", "100"}}, 53, 1);
    expect("no room left", "0::/\n", {{"memory.max", mib_10}, {"memory.current", mib_60}}, 0, INT_MAX);
    expect("damaged files", "x\n::\n0::\n4:memory\n\n", {{"memory.max", "x"}, {"cpu.max", ""}}, 2048, INT_MAX);
    std::filesystem::remove_all(folder);
    system_root = "";
}

// Holds results against what they should be: each may be off by a share of its size, of the root mean square of all,
// and of the operands' size, 1.
template <class X>
static void see_all(Worst& worst, const X* ours, size_t ld, const std::vector<double>& expected, size_t columns,
                    double share, const std::string& where) {
    double squares = 0;
    for (double e : expected) squares += e * e;
    double rms = sqrt(squares / expected.size());
    for (size_t i = 0; i < expected.size(); i++) {
        double off = fabs((double)ours[i / columns * ld + i % columns] - expected[i]);
        if (worst.see(off, share * (fabs(expected[i]) + rms + 1))) worst.where = where;
    }
}

// Pairs of sizes: each from 1 to 70 with the other in {1, 17, 33}, and a few larger ones at random.
static std::vector<std::pair<size_t, size_t>> size_pairs() {
    std::vector<std::pair<size_t, size_t>> pairs;
    for (size_t n = 1; n <= 70; n++)
        for (size_t other : {1, 17, 33}) pairs.push_back({n, other}), pairs.push_back({other, n});
    Random random = {13};
    for (int i = 0; i < 5; i++) pairs.push_back({71 + random.below(200), 71 + random.below(200)});
    return pairs;
}

// Attention in tiles equals attention_plain in double.
template <class X>
static void test_attention_head(const char* type, double tolerance) {
    Worst worst;
    std::vector<std::pair<size_t, size_t>> sizes = size_pairs();  // T, HS
    for (size_t T : {KEYS<X>, KEYS<X> + 1, 2 * KEYS<X> + 5}) sizes.push_back({T, 64});
    for (auto [T, HS] : sizes) {
        const std::string at = format(", T %zu, HS %zu", T, HS);
        size_t ld = HS + 3;  // rows lie further apart than they are long
        std::vector<X> q = random_values<X>(T * ld, 1), k = random_values<X>(T * ld, 2);
        std::vector<X> v = random_values<X>(T * ld, 3), dout = random_values<X>(T * ld, 4);
        std::vector<X> o(T * ld, NAN), dq(o), dk(o), dv(o);
        for (auto* a : {&q, &k, &v, &dout})
            for (size_t t = 0; t < T; t++) std::fill_n(&(*a)[t * ld + HS], ld - HS, (X)NAN);
        auto in = [&](const std::vector<X>& a, size_t row = 0) { return Rows<const X>{&a[row * ld], ld}; };
        auto out = [&](std::vector<X>& a) { return Rows<X>{a.data(), ld}; };
        std::vector<float> lse(T, NAN), local(HeadScratch<X>{nullptr, T, HS, true}.size, NAN);
        attention_head_forward(local.data(), out(o), lse.data(), in(q), in(k), in(v), T, 0, HS);
        std::fill(local.begin(), local.end(), NAN);
        attention_head_backward(local.data(), out(dq), out(dk), out(dv), in(dout), in(o), lse.data(), in(q), in(k),
                                in(v), T, HS);
        std::vector<double> ro(T * HS), rdq(ro), rdk(ro), rdv(ro), p(T * T), rlse(T);
        attention_plain_forward(ro.data(), p.data(), in(q), in(k), in(v), T, HS);
        attention_plain_backward(rdq.data(), rdk.data(), rdv.data(), in(dout), p.data(), in(q), in(k), in(v), T, HS);
        for (size_t i = 0; i < T; i++) {
            double score = 0;  // p_i0 = e^(score - lse)
            for (size_t d = 0; d < HS; d++) score += (double)q[i * ld + d] * k[d];
            rlse[i] = score / sqrt(HS) - log(p[i * T]);
            // A few positions decoded, given those before as cached
            if (i % 5 == 4) {
                std::vector<X> one(HS), few(2 * ld);
                attention_head_decode(local.data(), one.data(), &q[i * ld], in(k), in(v), i + 1, HS);
                attention_head_forward(local.data(), out(few), nullptr, in(q, i - 1), in(k), in(v), 2, i - 1, HS);
                std::vector<double> o_i(&o[i * ld], &o[i * ld + HS]);
                see_all(worst, one.data(), HS, o_i, HS, tolerance, "decode" + at);
                see_all(worst, &few[ld], HS, o_i, HS, tolerance, "prompt" + at);
            }
        }
        if (T > 1) {  // the first is cached: where bf16 is multiplied in pairs, a vector of queries ends within one
            std::vector<X> rest(T * ld, NAN);
            attention_head_forward(local.data(), out(rest), nullptr, in(q, 1), in(k), in(v), T - 1, 1, HS);
            see_all(worst, rest.data(), ld, std::vector<double>(ro.begin() + HS, ro.end()), HS, tolerance, "rest" + at);
        }
        for (const auto* a : {&o, &dq, &dk, &dv})  // nothing is written between the rows
            for (size_t i = 0; i < a->size(); i++)
                if (i % ld >= HS && worst.see(!std::isnan((float)(*a)[i]), 0)) worst.where = "past a row's end" + at;
        see_all(worst, lse.data(), 1, rlse, 1, tolerance, "log-sum-exp" + at);
        see_all(worst, o.data(), ld, ro, HS, tolerance, "o" + at);
        see_all(worst, dq.data(), ld, rdq, HS, tolerance, "dq" + at);
        see_all(worst, dk.data(), ld, rdk, HS, tolerance, "dk" + at);
        see_all(worst, dv.data(), ld, rdv, HS, tolerance, "dv" + at);
    }
    report(worst.ok(), format("attention in tiles equals the plain one, in %s", type), worst.text());
}

// y = (x - mean) rstd w + b over C channels, and its derivatives, from the definition; results to be stored in X round
// to `tolerance` of their size.
template <class X>
static void test_layernorm(const char* type, double tolerance) {
    Worst worst;
    TestWorkspace space(0);
    for (auto [rows, C] : size_pairs()) {
        const std::string at = format(", rows %zu, C %zu", rows, C);
        std::vector<X> x = random_values<X>(rows * C, 1), dy = random_values<X>(rows * C, 2);
        std::vector<X> w = random_values<X>(C, 3), b = random_values<X>(C, 4), y(rows * C, NAN), again(y), dx(y);
        std::vector<float> mean(rows, NAN), rstd(mean), dw(C, NAN), db(dw);
        layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), rows, C);
        layernorm_forward(again.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), rows, C, true);
        layernorm_backward(space.ws, dx.data(), dw.data(), db.data(), dy.data(), x.data(), w.data(), mean.data(),
                           rstd.data(), rows, C, false, false);
        auto see = [&](double ours, double expected, double tolerated, const char* what) {
            if (worst.see(fabs(ours - expected), tolerated)) worst.where = what + at;
        };
        std::vector<double> rdw(C, 0.0), rdb(C, 0.0), scale(C, 0.0), n(C);
        for (size_t r = 0; r < rows; r++) {
            const X *x_r = &x[r * C], *dy_r = &dy[r * C];
            double m = 0, variance = 0, g_mean = 0, gn_mean = 0, g_largest = 0;
            for (size_t i = 0; i < C; i++) m += (double)x_r[i] / C;
            for (size_t i = 0; i < C; i++) variance += ((double)x_r[i] - m) * ((double)x_r[i] - m) / C;
            double s = 1 / sqrt(variance + 1e-5);
            for (size_t i = 0; i < C; i++) {
                double g = (double)dy_r[i] * w[i];
                n[i] = (x_r[i] - m) * s;
                g_mean += g / C, gn_mean += g * n[i] / C, g_largest = std::max(g_largest, fabs(g));
                rdw[i] += dy_r[i] * n[i], rdb[i] += dy_r[i], scale[i] += fabs(dy_r[i]) * (1 + s * 0.1);
            }
            for (size_t i = 0; i < C; i++) {
                double y_i = n[i] * w[i] + b[i], dx_i = s * ((double)dy_r[i] * w[i] - g_mean - n[i] * gn_mean);
                see(y[r * C + i], y_i, tolerance * (1 + fabs(y_i)) + 1e-6 * s, "y");
                see(again[r * C + i], y[r * C + i], 1e-30, "y again");
                double rounding = 1e-5 * s * (1 + 0.1 * s) * g_largest;
                see(dx[r * C + i], dx_i, tolerance * fabs(dx_i) + rounding, "dx");
            }
        }
        for (size_t i = 0; i < C; i++) {
            see(dw[i], rdw[i], 1e-5 * (1 + scale[i]), "dw");
            see(db[i], rdb[i], 1e-5 * (1 + scale[i]), "db");
        }
    }
    report(worst.ok(), format("LayerNorm equals its definition, in %s", type), worst.text());
}

// -log softmax(x wteᵀ)[y] and its derivatives, from the definition, for a vocabulary shorter than its padding.
template <class X>
static void test_classifier(const char* type, double tolerance) {
    Worst worst;
    TestWorkspace space(matmul_local_size<X>());
    std::vector<std::array<size_t, 3>> sizes;  // rows, C, V
    for (size_t n = 1; n <= 70; n++)
        for (size_t other : {1, 17, 33}) {
            sizes.push_back({n, other, 33});
            sizes.push_back({17, n, other});
            sizes.push_back({other, 17, n});
        }
    sizes.push_back({97, 80, 300});
    for (auto [rows, C, V] : sizes) {
        const std::string at = format(", rows %zu, C %zu, V %zu", rows, C, V);
        const size_t Vp = round_up(V, 128);
        const double gradient_scale = 0.5;
        std::vector<X> x = random_values<X>(rows * C, 1), wte = random_values<X>(Vp * C, 2), dx(rows * C, NAN);
        std::vector<X> logits(classifier_rows(rows, Vp) * Vp, NAN);
        std::vector<int> targets = random_tokens(rows, (int)V, 5);
        for (X& w : wte) w = (float)w / sqrtf(C);  // so that logits are about 1
        std::vector<float> losses(rows, NAN), dwte(Vp * C, NAN);
        ModelOf<X> m = {};  // as much of it as the classifier uses; wte is its only tensor
        m.config = {.V = (int)V, .Vp = (int)Vp, .C = (int)C};
        m.work = {.B = (int)rows, .T = 1, .train = true};
        m.ws = space.ws;
        m.inputs.y = targets.data(), m.weights = wte.data(), m.gradients = dwte.data();
        m.losses = losses.data(), m.dln = dx.data(), m.logits = logits.data();
        classifier(m, x.data(), (float)gradient_scale);
        std::vector<double> p(V), rlosses(rows), rdx(rows * C, 0.0), rdwte(V * C, 0.0);
        for (size_t r = 0; r < rows; r++) {
            double sum = 0;
            for (size_t v = 0; v < V; v++) {
                p[v] = 0;
                for (size_t i = 0; i < C; i++) p[v] += (double)x[r * C + i] * wte[v * C + i];
            }
            double logit_y = p[targets[r]];
            for (double& e : p) {
                e = exp(e);
                sum += e;
            }
            rlosses[r] = log(sum) - logit_y;
            for (double& e : p) e /= sum;
            p[targets[r]] -= 1;
            for (size_t v = 0; v < V; v++)
                for (size_t i = 0; i < C; i++) {
                    rdx[r * C + i] += gradient_scale * p[v] * wte[v * C + i];
                    rdwte[v * C + i] += gradient_scale * p[v] * x[r * C + i];
                }
        }
        see_all(worst, losses.data(), 1, rlosses, 1, tolerance, "losses" + at);
        see_all(worst, dx.data(), C, rdx, C, tolerance, "dx" + at);
        see_all(worst, dwte.data(), C, rdwte, C, tolerance, "dwte" + at);
    }
    report(worst.ok(), format("classifier equals its definition, in %s", type), worst.text());
}

// GELU and its derivative, in GPT-2's form with tanh, over the whole range
static void test_gelu() {
    Worst worst;
    auto see = [&](double at) {
        double x = (float)at, c = sqrt(2 / M_PI), u = c * (x + 0.044715 * x * x * x), t = tanh(u);
        double derivative = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x);
        const Gelu g = gelu(vec{} + (float)x);
        bool worse = worst.see(fabs(g.value[0] - 0.5 * x * (1 + t)), 1e-6 * (0.1 + fabs(x)));
        worse |= worst.see(fabs(g.derivative[0] - derivative), 2e-6 * (1 + fabs(x)));
        if (worse) worst.where = format("at %g", x);
    };
    for (double x = -12; x <= 12; x += 1e-4) see(x);
    for (double x = 1e-30; x < 1e6; x *= 1.01) see(x), see(-x);
    report(worst.ok(), "GELU and its derivative", worst.text());
}

static void test_exp() {
    Worst worst;
    for (double x = -87; x <= 87; x += 1.7e-5) {
        double expected = exp((double)(float)x);
        const float y = exp_approx((float)x), lane = exp_approx(vec{} + (float)x)[LANES - 1];
        if (worst.see(fabs(y - expected), 0x1p-23 * expected)) worst.where = format("at %g", x);
        if (worst.see(fabs(lane - y), 0)) worst.where = format("in a vector, at %g", x);
    }
    report(worst.ok(), "exp_approx", worst.text());
    bool same = true;
    for (float x : {-INFINITY, -88.0f, -87.0f, -0.0f, 87.0f, 88.0f, INFINITY})
        for (int lane = 0; lane < LANES; lane++) same = same && exp_approx(vec{} + x)[lane] == exp_approx(x);
    report(same && std::isnan(exp_approx(vec{} + NAN)[0]), "exp_approx of -inf, 0, inf and NaN, in a vector");
    report(exp_approx(-INFINITY) == 0 && exp_approx(-88.0f) == 0 && exp_approx(0.0f) == 1 &&
               std::isnan(exp_approx(NAN)) && exp_approx(88.0f) == exp_approx(87.0f) &&
               exp_approx(INFINITY) == exp_approx(87.0f),
           "exp_approx of -inf, 0, inf and NaN");
}
#endif

#ifdef GPT2_CUDA
// --------------------------------------------------------------------------------------------------------------------
// The GPU's products against plain loops

// matmul, and matmul_plain in its place, equal three loops for either order of either operand, with nothing, y or
// another matrix added, and write nothing between the rows of y. Operands at other multiples of 16 bytes give the same
// bits.
template <class X, class Y>
static void test_products(const char* types) {
    constexpr size_t M = 37, N = 72, K = 129, LD = 136, SIZE = LD * LD;
    Random random = {7};
    std::vector<X> a(SIZE), b(SIZE);
    std::vector<Y> added(SIZE), poison(SIZE, (Y)NAN);
    for (X& x : a) x = (X)(float)random.normal();
    for (X& x : b) x = (X)(float)random.normal();
    for (Y& y : added) y = (Y)(float)random.normal();
    char* memory[4];
    for (char*& p : memory) p = (char*)device_allocate(SIZE * sizeof(float) + 16, false);
    Workspace ws = {};
    ws.cublas = (char*)device_allocate(CUBLAS_WORKSPACE, false);

    enum { NOTHING, SELF, OTHER };
    auto product = [&](bool a_along, bool b_along, int add, size_t shift, bool plain) {  // everything shifted by bytes
        auto put = [&](int i, const auto& values) {
            copy_to_device(memory[i] + shift, values.data(), SIZE * sizeof values[0]);
            return memory[i] + shift;
        };
        const Operand<X> A = {(X*)put(0, a), LD, a_along}, B = {(X*)put(1, b), LD, b_along};
        Y *other = (Y*)put(2, added), *y = (Y*)put(3, add == SELF ? added : poison);
        const Y* summand = add == NOTHING ? nullptr : add == SELF ? y : other;
        if (plain) matmul_plain<X, Y>(y, LD, M, N, K, A, B, summand);
        else matmul<X, Y>(ws, y, LD, M, N, K, A, B, summand);
        std::vector<Y> result(SIZE);
        copy_to_host(result.data(), y, SIZE * sizeof(Y));
        return result;
    };
    Worst worst;
    bool kept = true, same = true;
    auto check_all = [&] {
        for (int variant = 0; variant < 12; variant++) {
            const bool a_along = variant & 1, b_along = variant & 2;
            const int add = variant / 4;
            const std::vector<Y>& before = add == SELF ? added : poison;
            const std::vector<Y> first = product(a_along, b_along, add, 0, false);
            const std::vector<Y> shifted = product(a_along, b_along, add, 16, false);
            same = same && memcmp(first.data(), shifted.data(), SIZE * sizeof(Y)) == 0;
            for (const std::vector<Y>& y : {first, product(a_along, b_along, add, sizeof(float), false),
                                            product(a_along, b_along, add, 0, true)})
                for (size_t i = 0; i < SIZE; i++) {
                    const size_t m = i / LD, n = i % LD;
                    if (m >= M || n >= N) {
                        kept = kept && memcmp(&y[i], &before[i], sizeof(Y)) == 0;
                        continue;
                    }
                    double sum = add == NOTHING ? 0 : (double)(float)added[i], size = fabs(sum);
                    for (size_t k = 0; k < K; k++) {
                        const double term = (double)(float)a[a_along ? m * LD + k : k * LD + m] *
                                            (float)b[b_along ? n * LD + k : k * LD + n];
                        sum += term, size += fabs(term);
                    }
                    const double rounding = sizeof(Y) == 4 ? 0 : 0x1p-8 * fabs(sum);
                    if (worst.see(fabs((float)y[i] - sum), 1e-6 * size + rounding))
                        worst.where = format("y[%zu,%zu] of variant %d", m, n, variant);
                }
        }
    };
    check_all();
    report(worst.ok() && kept, format("products of %s equal their three loops", types), worst.text());
    report(same, format("products of %s: the same bits wherever they lie", types));
#ifdef GPT2_EMULATED
    const long long searches = emulator::searches, refusals = emulator::refusals;
    check_all();
    report(emulator::searches == searches && emulator::refusals == refusals && emulator::given_up.empty(),
           format("products of %s: one search for each, which finds what there is", types));
#endif
    for (char* p : memory) device_free(p);
    device_free(ws.cublas);
}
#endif

// The tests' own judge: NaN is never forgotten.
static void test_worst() {
    Worst worst;
    worst.see(0.5, 1), worst.see(NAN, 1), worst.see(0, 1), worst.see(0.1, 1);
    report(!worst.ok(), "NaN counts as an error");
}

int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    poison_memory = true;
    device_start(argv);
    device_init();
    std::vector<std::string> paths(argv + 1, argv + argc);
    bool verbose = !paths.empty() && paths[0] == "-v";
    if (verbose) paths.erase(paths.begin());
    if (paths.size() % 2 || (!paths.empty() && paths[0][0] == '-')) {
        fprintf(stderr, "usage: test_gpt2 [-v] [MODEL DEBUG_STATE] ...\n");
        return 1;
    }
#ifdef GPT2_CUDA
    test_products<float, float>("fp32");
    test_products<bf16, bf16>("bf16");
    test_products<bf16, float>("bf16 into fp32");
#endif
    if (!paths.empty()) {
        for (size_t i = 0; i < paths.size(); i += 2) check_dump(paths[i], paths[i + 1], verbose, MAY);
    } else {
        const std::string ending = ".state.bin";
        auto check_all = [&](Bf16 bf16) {
            for (std::string state : expand_glob("dumps", "dev/reference/*" + ending))
                check_dump(state.substr(0, state.size() - ending.size()) + ".model.bin", state, verbose, bf16);
        };
        check_all(MUST);
        // Again with every loop in more rounds than one, as large models have them.
        printf("the same in small pieces\n");
        chunk_values = 1000, classifier_rows_least = 8, classifier_logits_most = 1;
#ifdef GPT2_CUDA
        const size_t block_shared = std::exchange(gpu.block_shared, 0);
        fuses = false;
#else
        const size_t whole_KC = KC;
        KC = 16, vocabulary_chunk = 32;
#endif
        check_all(NEVER);
#ifdef GPT2_CUDA
        gpu.block_shared = block_shared;
        fuses = true;
#else
        KC = whole_KC;
        test_exp();
        test_vectors<float>("fp32");
        test_vectors<bf16>("bf16");
        test_maxima();
        test_thread_trials();
        test_control_groups();
        test_long_sum();
        test_matmul<float>("fp32");
        test_matmul<bf16>("bf16");
        test_attention_head<float>("fp32", 1e-5);
        test_attention_head<bf16>("bf16", 0x1p-6);
        test_layernorm<float>("fp32", 1e-6);
        test_layernorm<bf16>("bf16", 0x1.1p-8);
        test_classifier<float>("fp32", 1e-6);
        test_classifier<bf16>("bf16", 0x1p-6);
        test_gelu();
#endif
        for (Precision precision : {FP32, BF16}) {
            test_identities(precision);
            test_threads(precision);
            for (int attention = 0; attention < ATTENTIONS; attention++)
                test_accumulation(precision, small_config(attention), 1, 23);
            test_accumulation(precision, small_config(VANILLA, 1), 264, 1);  // many runs for one block to sum up
            test_update(precision);
            test_decoding(precision);
            test_allocations(precision);
        }
        test_head_sizes({SMALL_HEAD == 8 ? 8 : 15, 24, 32, 64, 128, 200}, {1, 17, 64, 65, 161});
        test_finite_differences(settings(), EMULATED ? 6 : 1);
        test_finite_differences(wide_settings());
        test_memory();
        test_worst();
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || fflush(stdout) != 0;
}
