// A folder that one process at a time writes into.
#pragma once
#include <string>

namespace sparsek {

// Held until destroyed, or until the process ends in any way. Sees processes of this machine, on some file systems
// those of others.
class FolderLock {
 public:
  // Makes the folder where there is none. Throws WriteError when that fails, DataError when it is held.
  explicit FolderLock(const std::string& path);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace sparsek
