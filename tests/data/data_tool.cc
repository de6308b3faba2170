// Lets the Python tests reach data/: one subcommand per question, bytes in on standard input, answers on standard
// output. Not installed.
//
//   data_tool encode SOURCE [parse] [chunk N]   text -> ids, little-endian int32
//   data_tool decode SOURCE                     ids -> text; goes through TextStream
//   data_tool info SOURCE                       one line each: vocab_size, prefix, end_ids, missing_bytes
//   data_tool folder SOURCE FOLDER              the tokenizer as Hugging Face has it, and its fingerprint
//   data_tool template SOURCE                   "role\0content\0..." -> rendered text
//   data_tool time SOURCE REPEATS               load time and MB/s of encoding standard input
//   data_tool tensors FILE                      "name<TAB>type<TAB>shape" for each tensor
//   data_tool values FILE TENSOR                the tensor's values as float32
// SOURCE is a .gguf file, a tokenizer.json or a checkpoint folder; FILE a .gguf file or a checkpoint folder.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "data/chat_template.h"
#include "data/gguf.h"
#include "data/hf_checkpoint.h"
#include "data/tokenizer.h"
#include "data/tokenizer_files.h"

namespace sparsek {
namespace {

std::string read_all(std::istream& in) {
  return {std::istreambuf_iterator<char>(in), {}};
}
bool is_gguf(const std::string& path) {
  return path.ends_with(".gguf");
}

Tokenizer load_tokenizer(const std::string& source) {
  if (is_gguf(source)) return Tokenizer::from_gguf(GgufFile(source));
  if (std::filesystem::is_directory(source)) return Tokenizer::from_hf(HfCheckpoint(source));
  std::ifstream file(source, std::ios::binary);
  return Tokenizer::from_json(read_all(file), "", source);
}

void write(const void* data, size_t size_bytes) {
  std::cout.write(static_cast<const char*>(data), static_cast<std::streamsize>(size_bytes));
}

void encode(const Tokenizer& tokenizer, SpecialTokens special, size_t chunk_bytes) {
  const std::string text = read_all(std::cin);
  std::vector<TokenId> ids;
  if (chunk_bytes == 0) {
    ids = tokenizer.encode(text, special);
  } else {
    Encoder encoder(tokenizer, special);
    for (size_t i = 0; i < text.size(); i += chunk_bytes) {
      encoder.push(std::string_view(text).substr(i, chunk_bytes), ids);
    }
    encoder.finish(ids);
  }
  write(ids.data(), ids.size() * sizeof(TokenId));
}

void decode(const Tokenizer& tokenizer) {
  const std::string bytes = read_all(std::cin);
  TextStream stream(tokenizer);
  for (size_t i = 0; i + sizeof(TokenId) <= bytes.size(); i += sizeof(TokenId)) {
    TokenId id = 0;
    std::copy_n(bytes.data() + i, sizeof(TokenId), reinterpret_cast<char*>(&id));
    std::cout << stream.push(id);
  }
  std::cout << stream.finish();
}

void info(const Tokenizer& tokenizer) {
  std::cout << "vocab_size " << tokenizer.vocab_size() << "\nprefix";
  for (const TokenId id : tokenizer.prefix()) std::cout << ' ' << id;
  std::cout << "\nend_ids";
  for (const TokenId id : tokenizer.end_ids()) std::cout << ' ' << id;
  std::cout << "\nmissing_bytes";
  for (const uint8_t byte : tokenizer.missing_bytes()) std::cout << ' ' << int{byte};
  std::cout << '\n';
}

void write_folder(const Tokenizer& tokenizer, const std::string& folder) {
  const TokenizerFiles files = huggingface_files(tokenizer);
  std::ofstream(folder + "/tokenizer.json", std::ios::binary) << files.tokenizer;
  std::ofstream(folder + "/tokenizer_config.json", std::ios::binary) << files.tokenizer_config;
  std::ofstream(folder + "/generation_config.json", std::ios::binary) << files.generation_config;
  std::cout << tokenizer.fingerprint() << '\n';
}

void render_template(const Tokenizer& tokenizer, const std::string& source) {
  std::vector<ChatMessage> messages;
  std::istringstream in(read_all(std::cin));
  ChatMessage message;
  while (std::getline(in, message.role, '\0') && std::getline(in, message.content, '\0')) messages.push_back(message);
  std::cout << ChatTemplate::recognise(tokenizer.chat_template().value_or(""), source).render(messages);
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void time_encoding(const std::string& source, int repeats) {
  auto begin = std::chrono::steady_clock::now();
  const Tokenizer tokenizer = load_tokenizer(source);
  std::cout << "load_ms " << seconds_since(begin) * 1e3 << '\n';
  const std::string text = read_all(std::cin);
  for (int i = 0; i < repeats; ++i) {
    begin = std::chrono::steady_clock::now();
    const size_t count = tokenizer.encode(text, SpecialTokens::kAsText).size();
    std::cout << "mb_per_s " << static_cast<double>(text.size()) * 1e-6 / seconds_since(begin) << " ids " << count
              << '\n';
  }
}

std::string type_and_shape(const WeightView& view) {
  return std::string(name(view.type)) + '\t' + shape_text(view.shape);
}

void list_tensors(const std::string& path) {
  if (is_gguf(path)) {
    const GgufFile file(path);
    for (const WeightView& view : file.tensors()) std::cout << view.name << '\t' << type_and_shape(view) << '\n';
    return;
  }
  const HfCheckpoint checkpoint(path);
  for (const std::string& name : checkpoint.tensor_names()) {
    std::cout << name << '\t' << type_and_shape(checkpoint.weight(name)) << '\n';
  }
}

void write_values(const WeightView& view) {
  std::vector<float> values(static_cast<size_t>(view.num_elements()));
  dequantise(view.type, view.bytes.data(), view.num_elements(), values.data());
  write(values.data(), values.size() * sizeof(float));
}

int run(const std::vector<std::string>& args) {
  const auto arg = [&](size_t i) { return i < args.size() ? args[i] : std::string(); };
  const std::string command = arg(0);
  const std::string source = arg(1);
  if (command == "encode") {
    const bool parses = arg(2) == "parse";
    const std::string chunk = arg(parses ? 4 : 3);
    encode(load_tokenizer(source), parses ? SpecialTokens::kParse : SpecialTokens::kAsText,
           chunk.empty() ? 0 : std::stoul(chunk));
  } else if (command == "decode") {
    decode(load_tokenizer(source));
  } else if (command == "info") {
    info(load_tokenizer(source));
  } else if (command == "folder") {
    write_folder(load_tokenizer(source), arg(2));
  } else if (command == "template") {
    render_template(load_tokenizer(source), source);
  } else if (command == "time") {
    time_encoding(source, std::stoi(arg(2)));
  } else if (command == "tensors") {
    list_tensors(source);
  } else if (command == "values" && is_gguf(source)) {
    const GgufFile file(source);
    write_values(file.tensor(arg(2)));
  } else if (command == "values") {
    const HfCheckpoint checkpoint(source);
    write_values(checkpoint.weight(arg(2)));
  } else {
    std::cerr << "data_tool: unknown command\n";
    return 2;
  }
  std::cout.flush();
  return std::cout ? 0 : 1;
}

}  // namespace
}  // namespace sparsek

int main(int argc, char** argv) {
  try {
    return sparsek::run({argv + 1, argv + argc});
  } catch (const sparsek::DataError& error) {
    std::cerr << "data_tool: " << error.what() << '\n';
    return 1;
  }
}
