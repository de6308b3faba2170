// The errors a user can cause. Everything else is a bug and shows as an assertion or a plain std::exception.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace sparsek {

// A wrong option or argument: the program exits with 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file, model or text that cannot be used: the program exits with 1.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
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
[[noreturn]] void throw_data(fmt::format_string<Args...> format, Args&&... args) {
  throw DataError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace sparsek
