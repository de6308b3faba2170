// Runs a model over token ids from a file, for tests in Python and for measurements.
//   model_tool MODEL IDS OUT what=logits|losses|none dtype=f32|bf16 chunk=512 steps=0 attention=dense|window|sparsek
//              [topk= window= sinks= gate= far= scorer= slope=]
// IDS: int32. The last `steps` tokens are read one at a time, the others in chunks. OUT: float32 logits [tokens, vocab]
// or float64 losses [tokens - 1]. Prints one JSON object.
#include <ATen/ops/from_blob.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "model/transformer.h"

namespace {

using sparsek::model::Transformer;

std::vector<int32_t> read_ids(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) sparsek::throw_data("{}: cannot be opened", path);
  std::vector<int32_t> ids(static_cast<size_t>(file.tellg()) / sizeof(int32_t));
  file.seekg(0).read(reinterpret_cast<char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(int32_t)));
  return ids;
}

template <class T>
void append(std::ofstream& file, const T* data, size_t count) {
  file.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(count * sizeof(T)));
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t peak_rss_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string key, rest; status >> key && std::getline(status, rest);) {
    if (key == "VmHWM:") return std::stoll(rest) * 1024;
  }
  return 0;
}

int run(int argc, char** argv) {
  if (argc < 4) sparsek::throw_usage("usage: model_tool MODEL IDS OUT [key=value ...]");
  std::map<std::string, std::string> options = {
      {"what", "none"}, {"dtype", "bf16"}, {"chunk", "512"}, {"steps", "0"}, {"attention", "dense"}};
  for (int i = 4; i < argc; ++i) {
    const std::string text = argv[i];
    options[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
  }
  const auto number = [&](const char* key) -> std::optional<int64_t> {
    return options.contains(key) ? std::optional<int64_t>(std::stoll(options[key])) : std::nullopt;
  };
  sparsek::model::LoadOptions load;
  load.path = argv[1];
  load.placement.dtype = options["dtype"] == "f32" ? at::kFloat : at::kBFloat16;
  load.placement.plain = options.contains("plain");
  load.attention.kind = sparsek::model::parse_attention_kind(options["attention"]);
  load.attention.topk = number("topk");
  load.attention.window_size = number("window");
  load.attention.num_sinks = number("sinks");
  load.attention.far_distance = number("far");
  if (options.contains("gate")) load.attention.gate = sparsek::model::parse_gate(options["gate"]);
  if (options.contains("slope")) load.attention.slope = std::stod(options["slope"]);
  if (options.contains("scorer")) load.attention.scorer = options["scorer"];
  const double load_start = seconds();
  const Transformer model = Transformer::load(load);
  const double load_seconds = seconds() - load_start;

  std::vector<int32_t> ids = read_ids(argv[2]);
  const int64_t tokens = static_cast<int64_t>(ids.size()), steps = std::min(*number("steps"), tokens);
  sparsek::model::DecodeState state = model.new_state();
  std::ofstream out(argv[3], std::ios::binary);
  double chunk_seconds = 0, step_seconds = 0;
  for (int64_t first = 0; first < tokens;) {
    const bool is_step = first >= tokens - steps;
    const int64_t count = is_step ? 1 : std::min(*number("chunk"), tokens - steps - first);
    const double start = seconds();
    const at::Tensor hidden = model.forward(at::from_blob(ids.data() + first, {count}, at::kInt), state);
    if (options["what"] == "logits" || is_step) {
      const at::Tensor logits = model.logits(hidden);
      if (options["what"] == "logits") append(out, logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel()));
    }
    if (options["what"] == "losses") {
      const int64_t rows = std::min(count, tokens - 1 - first);
      const std::vector<double> losses =
          model.losses(hidden.narrow(0, 0, rows), at::from_blob(ids.data() + first + 1, {rows}, at::kInt));
      append(out, losses.data(), losses.size());
    }
    (is_step ? step_seconds : chunk_seconds) += seconds() - start;
    first += count;
  }
  nlohmann::json report = {{"load_seconds", load_seconds},
                           {"weight_bytes", model.weight_bytes()},
                           {"state_bytes", state.size_in_bytes()},
                           {"peak_rss_bytes", peak_rss_bytes()},
                           {"attention", describe(model.attention())},
                           {"notices", model.notices()}};
  if (tokens > steps) report["prefill_tokens_per_second"] = static_cast<double>(tokens - steps) / chunk_seconds;
  if (steps > 0) report["decode_tokens_per_second"] = static_cast<double>(steps) / step_seconds;
  std::cout << report.dump() << "\n";
  return out.flush() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const sparsek::UsageError& error) {
    std::cerr << error.what() << "\n";
    return 2;
  } catch (const sparsek::DataError& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
