// The errors a user can cause. Everything else is a bug and shows as an assertion or a plain std::exception.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace sparsek {

// A wrong option or argument: the program exits with 2. Libraries name the field of their options that is wrong;
// whoever filled it knows what a person calls it.
class UsageError : public std::runtime_error {
 public:
  explicit UsageError(const std::string& problem) : std::runtime_error(problem) {}
  UsageError(const std::string& field, const std::string& problem)
      : std::runtime_error(field + ": " + problem), field_(field) {}
  const std::string& field() const { return field_; }  // what() starts with it; empty: no field is to blame

 private:
  std::string field_;
};

// A file, model or text that cannot be used: the program exits with 1.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What does not fit into the memory there is. It says what was expected and found; whoever knows what can be asked for
// less of says what to do.
class MemoryError : public DataError {
 public:
  using DataError::DataError;
};

// A signal came while waiting for input: the program exits with 130.
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void throw_usage(fmt::format_string<Args...> format, Args&&... args) {
  throw UsageError(fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
[[noreturn]] void throw_field(const std::string& field, fmt::format_string<Args...> format, Args&&... args) {
  throw UsageError(field, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
[[noreturn]] void throw_data(fmt::format_string<Args...> format, Args&&... args) {
  throw DataError(fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
[[noreturn]] void throw_memory(fmt::format_string<Args...> format, Args&&... args) {
  throw MemoryError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace sparsek
