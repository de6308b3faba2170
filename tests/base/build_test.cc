// How the tests themselves are built.
#include <gtest/gtest.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPARSEK_TEST_ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SPARSEK_TEST_ADDRESS_SANITIZER
#endif

namespace sparsek {
namespace {

TEST(Build, AssertionsRunUnderTheSanitizers) {
#ifndef SPARSEK_TEST_ADDRESS_SANITIZER
  GTEST_SKIP() << "not built with SPARSEK_SANITIZE";
#elif defined(NDEBUG)
  FAIL() << "NDEBUG is defined";
#endif
}

}  // namespace
}  // namespace sparsek
