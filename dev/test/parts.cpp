/*
parts.cpp: functions of train_gpt2.cpp that the program does not show by themselves, for the tests in this folder.

    parts encode TOKENIZER < texts > tokens            each text after its length in bytes, uint32; its tokens, uint16,
                                                       after their number, uint32
    parts choose DRAWS SEEN --option value... < logits how often each token is sampled, with generate's --temperature,
                                                       --top-k, --top-p, --repetition-penalty and --seed, after tokens
                                                       SEEN, like 1,2,3; logits as float32
*/

#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"

static std::string standard_input() { return read_prompt("-"); }

static void print_tokens(const char* name) {
    const Tokenizer tokenizer = read_tokenizer(name);
    const std::string texts = standard_input();
    uint32_t length;
    for (size_t at = 0; at < texts.size(); at += sizeof length + length) {
        memcpy(&length, &texts[at], sizeof length);
        const std::vector<int> tokens = encode(tokenizer, texts.substr(at + sizeof length, length));
        const uint32_t n = tokens.size();
        fwrite(&n, sizeof n, 1, stdout);
        for (int token : tokens) {
            const uint16_t narrow = token;
            fwrite(&narrow, sizeof narrow, 1, stdout);
        }
    }
}

static void print_counts(int draws, const char* seen, const std::vector<std::string>& words) {
    Options o;
    OptionTable table = option_table(o);
    parse_options(table, words, "choose", "");
    const std::string bytes = standard_input();
    std::vector<float> logits(bytes.size() / sizeof(float));
    memcpy(logits.data(), bytes.data(), logits.size() * sizeof(float));
    std::vector<bool> has(logits.size());
    for (int token : parse_tokens(seen, logits.size())) has[token] = true;
    penalize_repetition(logits, has, o.repetition_penalty);
    std::vector<int> counts(logits.size());
    Random r = random_stream(o.seed, SAMPLES);
    for (int i = 0; i < draws; i++) counts[choose_token(logits, o, r)]++;
    for (int n : counts) printf("%d\n", n);
}

int main(int argc, char** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    if (part == "encode" && argc == 3) print_tokens(argv[2]);
    else if (part == "choose" && argc > 3) print_counts(atoi(argv[2]), argv[3], {argv + 4, argv + argc});
    else die("encode TOKENIZER, or choose DRAWS SEEN; see parts.cpp");
}
