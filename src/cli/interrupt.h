// Ctrl-C and SIGTERM as a flag that loops look at. A second Ctrl-C ends the program at once.
#pragma once

namespace sparsek::cli {

inline constexpr int kInterruptedExitCode = 130;  // 128 + SIGINT, as shells report it

void install_interrupt_handler();
bool interrupted();

}  // namespace sparsek::cli
