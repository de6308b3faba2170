// Which packed document a position belongs to.
#pragma once
#include <cstdint>

namespace sparsek::cuda {

struct Document {
  int begin, end, ordinal;
};
// cu_seqlens: [num_documents + 1] starts or null (one document). They are the caller's, on the device, unchecked:
// clamped so that begin <= position < end <= seqlen.
__device__ __forceinline__ Document document_of(const int32_t* cu_seqlens, int num_documents, int seqlen,
                                                int position) {
  if (cu_seqlens == nullptr) return {0, seqlen, 0};
  int low = 0, high = num_documents;  // the last start <= position
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= position)
      low = middle;
    else
      high = middle;
  }
  return {min(max(cu_seqlens[low], 0), position), min(max(cu_seqlens[low + 1], position + 1), seqlen), low};
}

}  // namespace sparsek::cuda
