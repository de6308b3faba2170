// One typed config per subcommand, filled by main.cc, and the function that runs it. Each returns the exit code.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "infer/sampler.h"
#include "model/attention_config.h"

namespace sparsek::cli {

struct ModelConfig {
  std::string model;                       // a path, or "smollm2"
  model::AttentionRequest attention;       // but for its scorer: attention_request (source.h)
  std::optional<std::string> scorer;       // window_mass, key_norm or an adapter's path, where one was asked for
  std::string dtype = "bf16";              // bf16, f32
  std::string device = "cpu";              // cpu, cuda, cuda:N
  std::optional<int64_t> chunk_size = {};  // tokens computed at once while reading; default: tokens_at_once (source.h)
  int64_t threads = 0;                     // 0: one a core
  bool random_weights = false;             // bench model: `model` is a config.json, its weights are made up
};

struct GenerateConfig {
  ModelConfig model;
  std::string file;    // read first; "-" is standard input; empty: none
  std::string prompt;  // then this
  bool chat = false;   // file and prompt become the user's message of the model's chat template
  std::string system;  // system message for chat
  int64_t max_tokens = 256;
  SamplingOptions sampling;
  std::vector<std::string> stop;
  bool ignore_end = false;  // do not stop at the model's end tokens
  bool json = false;
};
int run_generate(const GenerateConfig& config);

struct PerplexityConfig {
  ModelConfig model;
  std::string file;
  int64_t skip_tokens = 0;
  int64_t max_tokens = 0;  // 0: all
  bool json = false;
};
int run_perplexity(const PerplexityConfig& config);

struct NeedlesConfig {
  ModelConfig model;
  std::string file;  // the text that needles are put into
  std::string task = "keys";
  int64_t tokens = 8192, depths = 10, samples = 4, digits = 0;
  uint64_t seed = 1;
  bool json = false;
};
int run_needles(const NeedlesConfig& config);

struct InspectConfig {
  ModelConfig model;
  bool json = false;
};
int run_inspect(const InspectConfig& config);

struct InspectShardsConfig {
  std::string shards;  // folder
  std::string model;   // of which the shards have to be; empty: any
  bool verify = false;
  std::optional<int64_t> document;  // prints its text instead
  bool json = false;
};
int run_inspect_shards(const InspectShardsConfig& config);

struct TokenizeConfig {
  std::vector<std::string> inputs;  // files, folders, patterns
  std::vector<std::string> suffixes;
  std::string model;  // whose tokenizer
  std::string out;
  std::string field = "text";
  std::string end_token = "auto";
  bool parse_special = false;
  bool skip_bad_lines = false;
  int64_t shard_mib = 128;
  int64_t threads = 0;  // 0: one a core
  bool json = false;
};
int run_tokenize(const TokenizeConfig& config);

struct BenchAttentionConfig {
  std::vector<int64_t> seqlens{2048, 8192, 32768};
  int64_t num_heads = 9, num_kv_heads = 3, head_dim = 64, topk = 512, window_size = 512, num_sinks = 0;
  std::string dtype = "bf16";
  std::string scores = "random";  // random, rising
  bool backward = false, dense = true;
  int64_t repeats = 5;
  int64_t threads = 0;
  bool json = false;
};
int run_bench_attention(const BenchAttentionConfig& config);

struct BenchModelConfig {
  ModelConfig model;
  std::vector<int64_t> contexts{1024, 8192};
  std::vector<int64_t> batches{1};  // documents decoded side by side
  int64_t decode_tokens = 64;       // of each
  int64_t repeats = 1;              // readings of each context
  bool json = false;
};
int run_bench_model(const BenchModelConfig& config);

struct BenchTrainConfig {
  std::vector<std::string> overrides;  // key=value, as `sparsek train` takes them
  std::vector<int64_t> seqlens{16384, 32768};
  std::vector<std::string> backends{"flash", "cudnn", "efficient"};  // of torch's dense attention on a GPU
  int64_t steps = 8;                                                 // timed at most, for each length and backend
  double seconds = 5;                                                // of timed steps, but two steps at least
  bool json = false;
};
int run_bench_train(const BenchTrainConfig& config);

}  // namespace sparsek::cli
