#include "cli/interrupt.h"

#include <csignal>

namespace sparsek::cli {
namespace {

volatile std::sig_atomic_t interrupt_seen = 0;

void on_signal(int) {
  interrupt_seen = 1;
}

}  // namespace

void install_interrupt_handler() {
  struct sigaction action{};
  action.sa_handler = on_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);  // the second one ends the program; no SA_RESTART: reads return
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() {
  return interrupt_seen != 0;
}

}  // namespace sparsek::cli
