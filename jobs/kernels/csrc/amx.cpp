#include "amx.h"

#include <cstdlib>
#include <cstring>

#ifdef RS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rs {
namespace {

bool ask_for_amx() {
    const char* wish = std::getenv("RAYSMITH_AMX");
    if (wish && std::strcmp(wish, "0") == 0) return false;
#ifdef RS_AMX
    // The kernel saves the tiles of processes that asked only: Documentation/arch/x86/xstate.rst.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_amx() {
    static const bool found = ask_for_amx();
    return found;
}

}  // namespace rs

// Write 1 where products of int8 rows run on AMX, else 0.
RS_EXPORT void rs_has_amx(int32_t* found) { *found = rs::has_amx(); }
