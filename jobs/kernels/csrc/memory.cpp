// Memory of large weights.
#include <sys/mman.h>

#include "common.h"

// Ask for pages of 2 MiB for [address, address + bytes) before it is first written. Weights are
// streamed once per token, and with pages of 4 KiB every page is a miss in the table of pages.
RS_EXPORT void rs_advise_huge_pages(void* address, int64_t bytes) {
    constexpr uintptr_t kPage = 4096;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + kPage - 1) & ~(kPage - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes) & ~(kPage - 1);
    // A refusal costs speed only, so its result is not looked at.
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
