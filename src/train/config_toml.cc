// load_config and config_text: TOML to fields and back.
#include <fmt/format.h>

#include <toml++/toml.h>
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "data/quote.h"
#include "data/text_reader.h"
#include "train/config.h"

namespace sparsek::train {
namespace {

int64_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<int64_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int64_t diagonal = row[0];
    row[0] = static_cast<int64_t>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int64_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

std::string last_part(const std::string& name) {
  return name.substr(name.rfind('.') + 1);
}

// The known key that is most like `name`; its last part alone counts too, for a key in the wrong section.
std::string nearest(const std::vector<ConfigKey>& known, const std::string& name) {
  const auto distance = [&](const ConfigKey& key) {
    return std::min(edit_distance(key.name, name), 2 + edit_distance(last_part(key.name), last_part(name)));
  };
  return std::min_element(known.begin(), known.end(),
                          [&](const auto& a, const auto& b) { return distance(a) < distance(b); })
      ->name;
}

const ConfigKey& find(const std::vector<ConfigKey>& known, const std::string& name, const std::string& where) {
  const auto it = std::find_if(known.begin(), known.end(), [&](const ConfigKey& key) { return key.name == name; });
  if (it == known.end())
    throw_usage("{}: unknown key {}; did you mean {}?", where, in_quotes(name), nearest(known, name));
  return *it;
}

const char* type_name(toml::node_type type) {
  switch (type) {
    case toml::node_type::string:
      return "text";
    case toml::node_type::integer:
      return "a whole number";
    case toml::node_type::floating_point:
      return "a number";
    case toml::node_type::boolean:
      return "true or false";
    case toml::node_type::array:
      return "a list";
    case toml::node_type::table:
      return "a section";
    default:
      return "a date or time";
  }
}

void assign(const ConfigKey& key, const toml::node& value, const std::string& where) {
  const auto refuse = [&](const char* wanted) {
    throw_usage("{}: {}: expected {}, found {}", where, key.name, wanted, type_name(value.type()));
  };
  if (auto* const* whole = std::get_if<int64_t*>(&key.field)) {
    if (!value.is_integer()) refuse("a whole number");
    **whole = value.as_integer()->get();
  } else if (auto* const* number = std::get_if<double*>(&key.field)) {
    if (!value.is_number()) refuse("a number");
    **number = value.is_integer() ? static_cast<double>(value.as_integer()->get()) : value.as_floating_point()->get();
  } else if (auto* const* boolean = std::get_if<bool*>(&key.field)) {
    if (!value.is_boolean()) refuse("true or false");
    **boolean = value.as_boolean()->get();
  } else {
    if (!value.is_string()) refuse("text in quotes");
    *std::get<std::string*>(key.field) = value.as_string()->get();
  }
}

void apply_file(const std::vector<ConfigKey>& known, const std::string& text, const std::string& source) {
  toml::table table;
  try {
    table = toml::parse(text);
  } catch (const toml::parse_error& error) {
    throw_usage("{}:{}: {}", source, error.source().begin.line, std::string(error.description()));
  }
  for (const auto& [section, node] : table) {
    const auto where = [&](const toml::node& at) { return fmt::format("{}:{}", source, at.source().begin.line); };
    const std::string section_name(section.str());
    const toml::table* values = node.as_table();
    const bool is_section = std::any_of(known.begin(), known.end(),
                                        [&](const ConfigKey& key) { return key.name.starts_with(section_name + "."); });
    if (values == nullptr || !is_section) find(known, section_name, where(node));  // throws: no key is without a dot
    for (const auto& [name, value] : *values) {
      assign(find(known, section_name + "." + std::string(name.str()), where(value)), value, where(value));
    }
  }
}

// key=value; text may come without quotes.
void apply_override(const std::vector<ConfigKey>& known, const std::string& argument) {
  const size_t equals = argument.find('=');
  if (equals == std::string::npos) throw_usage("{}: expected key=value", in_quotes(argument));
  const std::string name = argument.substr(0, equals), text = argument.substr(equals + 1);
  const std::string where = "command line";
  const ConfigKey& key = find(known, name, where);
  if (std::holds_alternative<std::string*>(key.field) && !text.starts_with('"') && !text.starts_with('\'')) {
    *std::get<std::string*>(key.field) = text;
    return;
  }
  try {
    const toml::table table = toml::parse("value = " + text);
    assign(key, *table.get("value"), where);
  } catch (const toml::parse_error&) {
    throw_usage("{}: {}: expected {}, found {}", where, name,
                std::holds_alternative<bool*>(key.field)          ? "true or false"
                : std::holds_alternative<std::string*>(key.field) ? "text"
                                                                  : "a number",
                in_quotes(text));
  }
}

std::string value_text(const ConfigKey& key) {
  if (auto* const* whole = std::get_if<int64_t*>(&key.field)) return fmt::format("{}", **whole);
  if (auto* const* boolean = std::get_if<bool*>(&key.field)) return **boolean ? "true" : "false";
  if (auto* const* number = std::get_if<double*>(&key.field)) {
    std::string text = fmt::format("{}", **number);
    if (text.find_first_of(".en") == std::string::npos) text += ".0";  // TOML tells whole numbers from others
    return text;
  }
  std::string quoted = "\"";
  for (const char c : *std::get<std::string*>(key.field)) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      quoted += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

// A budget that is asked for on the command line is not hidden by the layers of a file.
void refuse_hidden_budgets(const TrainConfig& config, const std::vector<std::string>& overrides) {
  const auto is_given = [&](const std::string& key) {
    return std::any_of(overrides.begin(), overrides.end(),
                       [&](const std::string& argument) { return argument.starts_with(key + "="); });
  };
  if (config.attention.kind != "sparsek" || config.attention.layers.empty() || is_given("attention.layers")) return;
  for (const char* key : {"attention.topk", "attention.window_size"}) {
    if (is_given(key)) {
      throw_field(key,
                  "expected none beside the configuration's attention.layers; add attention.layers= to have one "
                  "budget in all layers");
    }
  }
}

}  // namespace

TrainConfig parse_config(const std::string& text, const std::string& source,
                         const std::vector<std::string>& overrides) {
  TrainConfig config;
  const std::vector<ConfigKey> known = keys(config);
  apply_file(known, text, source);
  for (const std::string& argument : overrides) apply_override(known, argument);
  refuse_hidden_budgets(config, overrides);
  check_config(config);
  return config;
}

TrainConfig load_config(const std::string& path, const std::vector<std::string>& overrides) {
  if (path.empty()) return parse_config("", "", overrides);
  return parse_config(read_text(path), path, overrides);
}

std::string config_text(TrainConfig config) {
  std::string text, section;
  for (const ConfigKey& key : keys(config)) {
    const size_t dot = key.name.find('.');
    if (key.name.substr(0, dot) != section) {
      section = key.name.substr(0, dot);
      text += fmt::format("{}[{}]\n", text.empty() ? "" : "\n", section);
    }
    const std::string line = fmt::format("{} = {}", key.name.substr(dot + 1), value_text(key));
    text += *key.meaning == 0 ? line + "\n" : fmt::format("{:<28} # {}\n", line, key.meaning);
  }
  return text;
}

}  // namespace sparsek::train
