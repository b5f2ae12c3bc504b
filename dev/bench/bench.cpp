/*
bench.cpp: how fast the layers of train_gpt2.cpp (or, with GPT2_CUDA, of train_gpt2.cu) train and generate.

    make bench && dev/bench/bench --help
    dev/bench/bench --profile --sequence 256

Every rate stands beside its limit on this machine, measured in turns with it: multiply-adds alone, or reading memory
alone. --profile takes a training step apart: it times each kind of layer by itself, on the model's own buffers.
*/

#define GPT2_NO_MAIN
#ifdef GPT2_CUDA
#include "../../train_gpt2.cu"
#else
#include "../../train_gpt2.cpp"
#endif

#include "limits.h"

// --------------------------------------------------------------------------------------------------------------------
// The parts of a training step
//
// A layer runs here without its neighbours, so its inputs come from memory, although in a step some are still in cache:
// the parts together take a few percent more or less than the step.

enum Part { EMBEDDING, LAYERNORM, MATMULS, MATMULS_DX, MATMULS_DW, ATTENTION, DEPTH_MIXING, CLASSIFIER, ADAMW, PARTS };
static const char* const part_names[PARTS] = {"embedding", "LayerNorm", "matmuls", "matmuls, dx", "matmuls, dw",
                                              "attention", "depth mixing", "classifier", "AdamW"};

static const AdamW adamw = {.lr = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f};

// Makes those calls of forward, backward and update that belong to one part, on what the last step left in memory. The
// results are of no use, but finite, and the next step overwrites them.
template <class X>
static void run_part(ModelOf<X>& m, Part part, int step) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const int T = m.work.T, last = 2 * c.L;
    const size_t B = m.work.B, BT = B * T, C = c.C;
    const bool recompute = m.recomputes();
    X *dx = m.dresidual, *dln = m.dln;

    auto layernorm = [&](int i, const X* w, const X* b, float* dw, float* db) {
        X *y = m.ln[i], *x = m.residual[i];
        float *mean = m.ln_mean[i], *rstd = m.ln_rstd[i];
        layernorm_forward(y, mean, rstd, x, w, b, BT, C);
        if (recompute && i < last) layernorm_forward(y, mean, rstd, x, w, b, BT, C, true);
        layernorm_backward(ws, dx, dw, db, dln, x, w, mean, rstd, BT, C, i < last, false);
    };
    for (int l = 0; l < c.L; l++) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        auto d = [&](int tensor) { return m.gradient(tensor, l); };
        const int i = 2 * l, j = i + 1;
        X *x = m.residual[i], *x2 = m.residual[j], *x3 = m.residual[j + 1], *ln1 = m.ln[i], *ln2 = m.ln[j];
        X *qkv = m.qkv[l], *atty = m.atty[l], *fch = m.fch[l], *fch_gelu = m.fch_gelu[l];
        const Heads<X> q = heads(qkv, 0, 3, c, T);
        const KeysValues<X> kv = keys_values(qkv, 3, c, T);
        float* a = m.a + depth_place(m, l, 1);
        const AttentionShape shape = training_shape(m);

        switch (part) {
        case LAYERNORM:
            layernorm(i, w(LN1W), w(LN1B), d(LN1W), d(LN1B));
            layernorm(j, w(LN2W), w(LN2B), d(LN2W), d(LN2B));
            break;
        case MATMULS:
            qkv_forward(m, l, qkv, ln1, BT);
            linear_forward(ws, x2, x, atty, w(ATTPROJW), w(ATTPROJB), BT, C, C, C);
            linear_gelu_forward(ws, fch_gelu, fch, ln2, w(FCW), w(FCB), BT, C, 4 * C);
            linear_forward(ws, x3, x2, fch_gelu, w(FCPROJW), w(FCPROJB), BT, 4 * C, C, C);
            break;
        case MATMULS_DX:
            linear_gelu_backward_input(ws, m.dfch, recompute ? fch_gelu : nullptr, fch, dx, w(FCPROJW), BT, 4 * C, C);
            linear_backward_input(ws, dln, m.dfch, w(FCW), BT, C, 4 * C, 4 * C);
            linear_backward_input(ws, m.datty, dx, w(ATTPROJW), BT, C, C, C);
            for_live_columns(m, l, [&](size_t at, size_t count, bool first, bool end) {
                linear_backward_input(ws, dln, m.dqkv + at, w(QKVW) + at * C, BT, C, count, 3 * C, first, end);
            });
            break;
        case MATMULS_DW:
            linear_backward_weight(ws, d(FCPROJW), d(FCPROJB), dx, fch_gelu, BT, 4 * C, C, C, false);
            linear_backward_weight(ws, d(FCW), d(FCB), m.dfch, ln2, BT, C, 4 * C, 4 * C, false);
            linear_backward_weight(ws, d(ATTPROJW), d(ATTPROJB), dx, atty, BT, C, C, C, false);
            for_live_columns(m, l, [&](size_t at, size_t count, bool, bool) {
                linear_backward_weight(ws, d(QKVW) + at * C, d(QKVB) + at, m.dqkv + at, ln1, BT, C, count, 3 * C,
                                       false);
            });
            break;
        case ATTENTION:
            if (c.attention == DEPTH) {  // without depth_forward and depth_backward
                attention_forward<X>(ws, heads(atty, 0, 1, c, T), m.lse[l], q, kv, shape);
                attention_gradients(m, l, keys_values(m.dkv, 2, c, T), kv);
            } else {
                attend_forward(m, l, atty);
                attend_backward(m, l);
            }
            break;
        case DEPTH_MIXING:
            if (l > 0) depth_forward<X>(ws, kv.v, a, q, kv.k, m.qkv.stride, c, l, shape);
            depth_backward(ws, m.dqkv, m.dkv, m.ds + depth_place(m, l, 0), a, qkv, m.qkv.stride, c, l, BT);
            break;
        default: break;
        }
    }
    if (part == EMBEDDING) {
        embedding_forward(m.residual[0], m.inputs.x, m.weight(WTE), m.weight(WPE), B, T, C);
        embedding_backward(m.gradient(WTE), m.gradient(WPE), dx, m.inputs, B, T, C, false);
    }
    if (part == LAYERNORM) layernorm(last, m.weight(LNFW), m.weight(LNFB), m.gradient(LNFW), m.gradient(LNFB));
    if (part == CLASSIFIER) {
        classifier(m, m.ln[last], 1.0f / BT);
        sum_losses(m.results, m.losses, BT, false);
    }
    if (part == ADAMW) update(m, adamw, 1, step);
}

struct Work {
    double operations, bytes;
};

// What a part does in a step: operations, as flops_per_token counts them, and bytes that it reads and writes if every
// array comes from memory once per layer
static Work part_work(const Model& m, Part part) {
    const Config& c = m.config;
    const double C = c.C, L = c.L, T = m.work.T, BT = m.work.B * T, x = m.precision == BF16 ? 2 : 4;  // x: sizeof(X)
    const double rows = BT * C * x;   // bytes of an array (B, T, C)
    double columns = 0, sources = 0;  // of all layers: columns of qkv that are projected, |S_l|
    for (int l = 0; l < c.L; l++) {
        columns += C + 2.0 * kv_channels(c, l);
        sources += depth_source_count(c, l);
    }
    // qkv: C → columns; attproj: C → C; fc: C → 4C; fcproj: 4C → C
    const double weights = C * (columns + 9 * L * C), inputs_outputs = (columns + 13 * L * C) * BT * x;
    const double wte = 1.0 * c.V * C;
    switch (part) {
    case EMBEDDING: return {0, 4 * rows + 2 * 4 * BT * C + 2 * 4 * T * C};
    case LAYERNORM: return {0, (2 * L * (m.recomputes() ? 8 : 6) + 5) * rows};
    case MATMULS:
    case MATMULS_DX: return {2 * BT * weights, weights * x + inputs_outputs};
    case MATMULS_DW: return {2 * BT * weights, weights * 4 + inputs_outputs};
    case ATTENTION: return {6 * L * C * T * BT, 12 * L * rows};
    case DEPTH_MIXING: return {12 * BT * C * (sources + L - 1), (8 * sources + 10 * (L - 1)) * rows};
    case CLASSIFIER: return {6 * BT * wte, wte * (2 * x + 4) + 3 * rows};
    default: return {0, parameter_count(c) * (x == 2 ? 34.0 : 32.0)};  // ADAMW: the gradients twice, for their norm
    }
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return (v[(v.size() - 1) / 2] + v[v.size() / 2]) / 2;
}

// Each part's time, its share of the step's, and its rate beside the limit that it has: operations or memory
static void print_profile(const Model& m, const std::vector<double> (&times)[PARTS], double step_time, double peak,
                          double bandwidth) {
    double rest = step_time;
    for (int p = 0; p < PARTS; p++) {
        if (times[p].empty()) continue;
        const double time = median(times[p]);
        const auto [operations, bytes] = part_work(m, (Part)p);
        const bool computes = operations / peak > bytes / bandwidth;
        const double rate = (computes ? operations : bytes) / time, limit = computes ? peak : bandwidth;
        printf("    %-14s %9.2f ms %5.1f%%  %8.1f %s, %.0f%% of %.0f\n", part_names[p], time * 1e3,
               100 * time / step_time, rate * 1e-9, computes ? "GFLOP/s" : "GB/s", 100 * rate / limit, limit * 1e-9);
        rest -= time;
    }
    printf("    %-14s %9.2f ms %5.1f%%\n", "other", rest * 1e3, 100 * rest / step_time);
}

// --------------------------------------------------------------------------------------------------------------------
// The benchmark

static Workload training(const Options& o) {
    return {.B = o.batch, .T = o.sequence, .train = true, .recompute = o.recompute};
}

static std::vector<int> random_tokens(size_t n, int V, Random& r) {
    std::vector<int> tokens(n);
    for (int& t : tokens) t = r.below(V);
    return tokens;
}

// What all threads can reach, even where a model's steps have settled on fewer
static double full_peak(int precision) {
#if defined(_OPENMP) && !defined(GPT2_CUDA)
    const int threads = omp_get_max_threads();
    omp_set_num_threads(thread_trials.most);
    const double peak = device_peak(precision);
    omp_set_num_threads(threads);
    return peak;
#else
    return device_peak(precision);
#endif
}

static void bench_training(const Options& o, const std::vector<Config>& configs, bool profile) {
    const int precision = o.precision;
    const int B = o.batch, T = o.sequence, steps = o.steps > 0 ? o.steps : 5;
    Random r = random_stream(o.seed, SAMPLES);
    const std::vector<int> x = random_tokens((size_t)B * T, configs[0].V, r);
    const std::vector<int> y = random_tokens(x.size(), configs[0].V, r);
    printf("\ntraining: batch %d, sequence %d; %d steps after one to warm up\n", B, T, steps);
    printf("%-12s %9s %9s %10s %9s %9s %9s\n", "attention", "ms/step", "best", "tokens/s", "GFLOP/s", "of peak", "MiB");
    const double bandwidth = profile ? device_bandwidth(true) : 0;
    for (const Config& c : configs) {
        device_reset_most_memory();
        Model* model = model_create(c, precision, training(o));
        initialize_parameters(model, c, o.seed);
        std::vector<double> times, peaks, part_times[PARTS];
        double next_peak = 0;
        for (int step = 0; step <= steps; step++) {
            if (seconds() >= next_peak) {  // short steps follow each other, as in training
                peaks.push_back(full_peak(precision));
                next_peak = seconds() + 1;
            }
            double start = seconds();
            model_set_inputs(model, x.data(), y.data());
            model_forward(model, true, 1);
            model_backward(model);
            model_update(model, adamw, 1, step + 1);
            model_loss(model);
            if (step > 0) times.push_back(seconds() - start);
            for (int p = 0; p < PARTS && step > 0 && profile; p++) {
                if (p == DEPTH_MIXING && c.attention != DEPTH) continue;
                start = seconds();
                with_type(model, [&](auto& m) { run_part(m, (Part)p, step + 1); });
                float loss;
                copy_to_host(&loss, model->losses, sizeof loss);  // waits for a GPU
                part_times[p].push_back(seconds() - start);
            }
        }
        const double time = median(times), best = *std::min_element(times.begin(), times.end()), peak = median(peaks);
        const double tokens = (double)B * T, flops = flops_per_token(c, T) * tokens;
        printf("%-12s %9.2f %9.2f %10.1f %9.1f %8.1f%% %9.0f\n", split(attention_text(c), ':')[0].c_str(), time * 1e3,
               best * 1e3, tokens / time, flops / time * 1e-9, 100 * flops / time / peak, device_most_memory(*model));
        if (profile) print_profile(*model, part_times, time, peak, bandwidth);
        model_free(model);
    }
}

// A prompt that all but fills the context, then n tokens one at a time. Each of these reads the weights that it uses
// once, and all of the cache, so reading memory is the limit.
static void bench_generating(const Options& o, const std::vector<Config>& configs, int n) {
    const int precision = o.precision;
    const int maxT = configs[0].maxT, prompt = maxT - n;
    Random r = random_stream(o.seed, SAMPLES);
    const std::vector<int> tokens = random_tokens(maxT, configs[0].V, r);
    std::vector<float> logits(configs[0].V);
    printf("\ngenerating: a prompt of %s, then %d one by one\n", plural(prompt, "token").c_str(), n);
    printf("%-12s %16s %10s %10s %9s %11s\n", "attention", "prompt, tokens/s", "ms/token", "tokens/s", "GB/s",
           "of reading");
    for (const Config& c : configs) {
        const Workload work = {.sequences = 1};
        const Memory memory = check_memory(c, precision, work, device_bandwidth_memory());
        Model* model = model_create(c, precision, work);
        initialize_parameters(model, c, o.seed);
        std::vector<double> times, bandwidths, prompt_times;
        for (int round = 0; round < 4; round++) {  // the first warms up
            model_reset_cache(model);
            double start = seconds();
            model_prefill(model, tokens.data(), prompt, logits.data());
            if (round > 0) prompt_times.push_back(seconds() - start);
        }
        for (int i = prompt; i < maxT; i++) {
            if ((i - prompt) % 16 == 0) bandwidths.push_back(device_bandwidth(false));
            double start = seconds();
            model_prefill(model, &tokens[i], 1, logits.data());
            times.push_back(seconds() - start);
        }
        model_free(model);
        size_t used = parameter_count(c) - (size_t)(c.maxT + c.Vp - c.V) * c.C;
        for (int l = 0; l < c.L; l++) used -= 2 * (c.C - kv_channels(c, l)) * c.C;
        const double bytes = used * (precision == BF16 ? 2.0 : 4.0) + (double)memory.cache / maxT * (prompt + n / 2);
        const double time = median(times), rate = bytes / time;
        printf("%-12s %16.1f %10.2f %10.1f %9.1f %10.1f%%\n", split(attention_text(c), ':')[0].c_str(),
               prompt / median(prompt_times), time * 1e3, 1 / time, rate * 1e-9, 100 * rate / median(bandwidths));
    }
}

static void bench(Options& o, OptionTable& table, bool profile) {
    if (is_file(o.model)) die("bench takes a shape, but --model %s is a file", o.model.c_str());
    const Tokenizer tokenizer = o.tokenizer.empty() ? Tokenizer{} : read_tokenizer(o.tokenizer);
    const Config shape = configure(o, {}, tokenizer, true);
    const int precision = o.precision;
    std::vector<Config> configs;
    for (int a = 0; a < ATTENTIONS; a++)
        if (!is_given(table, "attention") || a == o.attention) configs.push_back(with_attention(shape, a, o, {}));
    const int tokens = is_given(table, "tokens") ? o.tokens : shape.maxT / 16;
    if (tokens >= shape.maxT) die("--tokens %d leaves no room for a prompt in a context of %d", tokens, shape.maxT);
    for (const Config& c : configs) check_memory(c, precision, training(o), device_peak_memory(precision));
    printf("%s\n%s, %s\n", config_text(shape).c_str(), precision_names[precision], device_name().c_str());
    bench_training(o, configs, profile);
    if (tokens > 0) bench_generating(o, configs, tokens);
}

// The options of describe, and three more
static OptionTable bench_options(Options& o, bool& profile) {
    OptionTable table = option_table(o);
    auto take = [&](const char* name, const char* help) {
        Option* option = find_option(table, name);
        option->commands |= DESCRIBE;
        option->help = help;
    };
    take("steps", "training steps to time, after one to warm up [5]");
    take("tokens", "tokens to generate; 0: only train [1/16 of the context]");
    table.push_back({"profile", &profile, "", DESCRIBE, TRANSIENT, "also show where the time of a training step goes"});
    std::erase_if(table, [](const Option& option) { return !(option.commands & DESCRIBE); });
    return table;
}

int main(int argc, char** argv) {
    Options o;
    bool profile = false;
    OptionTable table = bench_options(o, profile);
    setvbuf(stdout, nullptr, _IOLBF, 0);  // rows appear at once in a pipe, too
    if (!parse_options(table, {argv + 1, argv + argc}, "bench", format("see %s --help", argv[0]))) {
        printf("%s [--option value]...\n"
               "Times training and generating on random tokens, with each attention or with the one given.\n\n"
               "Times are medians. In turns with what is timed, it measures the peak, which multiply-adds alone reach,\n"
               "and the rate of reading memory alone. MiB is the most memory in use.\n\n"
               "Options [and their defaults]\n", argv[0]);
        for (bool common : {false, true}) print_options(stdout, table, common);
        printf("\n%s\n", device_help());
        return 0;
    }
    device_start(argv);
    device_init();
    bench(o, table, profile);
    if (fflush(stdout) != 0 || ferror(stdout)) die("standard output could not be written");
}
