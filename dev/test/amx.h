// Intel's AMX in plain C++, so that its microkernel can be tested on any processor. Put in front of the program:
//
//     g++ -include dev/test/amx.h ... test_gpt2.cpp        (make -C dev test_gpt2_amx)
//
// Vectors become 16 floats wide too, as on all processors that have AMX; the compiler splits them where need be.

#ifndef AMX_H
#define AMX_H

#include <cpuid.h>
#include <immintrin.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

struct AmxTile {
    int rows = 0, bytes = 0;  // 0: not shaped yet
    alignas(64) unsigned char row[16][64];
};
static thread_local AmxTile amx_tiles[8];

inline AmxTile& amx_tile(int i) {
    if (amx_tiles[i].rows > 0) return amx_tiles[i];
    fprintf(stderr, "amx.h: a thread uses tile %d before it has shaped its tiles\n", i);
    abort();
}

inline void amx_loadconfig(const void* config) {
    const uint8_t* bytes = (const uint8_t*)config;
    uint16_t row_bytes[16];
    memcpy(row_bytes, bytes + 16, sizeof row_bytes);
    bool valid = bytes[0] == 1 && bytes[1] == 0;
    for (int i = 2; i < 16; i++) valid = valid && bytes[i] == 0;
    for (int i = 0; i < 16; i++) valid = valid && (i < 8 ? row_bytes[i] <= 64 && bytes[48 + i] <= 16 : !row_bytes[i]);
    if (!valid) fprintf(stderr, "amx.h: not a tile configuration\n"), abort();  // the processor would raise a fault
    for (int i = 0; i < 8; i++) amx_tiles[i].rows = bytes[48 + i], amx_tiles[i].bytes = row_bytes[i];
}

inline void amx_zero(int i) { memset(amx_tile(i).row, 0, sizeof AmxTile::row); }
inline void amx_load(int i, const void* p, size_t stride) {
    AmxTile& t = amx_tile(i);
    for (int r = 0; r < t.rows; r++) memcpy(t.row[r], (const char*)p + r * stride, t.bytes);
}
inline void amx_store(int i, void* p, size_t stride) {
    AmxTile& t = amx_tile(i);
    for (int r = 0; r < t.rows; r++) memcpy((char*)p + r * stride, t.row[r], t.bytes);
}

// c (rows, columns) += Σ over pairs k of a (rows, pairs) b (pairs, columns). The processor adds up the two halves of
// the pairs apart and takes denormals for 0, so results agree with its own to rounding.
inline void amx_multiply(int c, int a, int b) {
    AmxTile &C = amx_tile(c), &A = amx_tile(a), &B = amx_tile(b);
    if (A.rows != C.rows || B.bytes != C.bytes || A.bytes != 4 * B.rows) {
        fprintf(stderr, "amx.h: tiles %d, %d and %d do not fit\n", c, a, b);
        abort();
    }
    for (int m = 0; m < C.rows; m++) {
        float sum[16], a_low[16], a_high[16];
        memcpy(sum, C.row[m], 64);
        uint32_t pairs[16], b_pairs[16];
        memcpy(pairs, A.row[m], 64);
        for (int k = 0; k < 16; k++) {
            uint32_t low = pairs[k] << 16, high = pairs[k] & 0xffff0000;
            memcpy(&a_low[k], &low, 4), memcpy(&a_high[k], &high, 4);
        }
        for (int k = 0; k < A.bytes / 4; k++) {
            memcpy(b_pairs, B.row[k], 64);
            for (int n = 0; n < 16; n++) {
                uint32_t low = b_pairs[n] << 16, high = b_pairs[n] & 0xffff0000;
                float b_low, b_high;
                memcpy(&b_low, &low, 4), memcpy(&b_high, &high, 4);
                sum[n] += a_low[k] * b_low;
                sum[n] += a_high[k] * b_high;
            }
        }
        memcpy(C.row[m], sum, C.bytes);
    }
}

template <class... Arguments>
long amx_permission(Arguments...) { return 0; }

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_loadconfig(config)
#define _tile_zero(i) amx_zero(i)
#define _tile_loadd(i, p, stride) amx_load(i, p, stride)
#define _tile_stored(i, p, stride) amx_store(i, p, stride)
#define _tile_dpbf16ps(c, a, b) amx_multiply(c, a, b)
#define syscall(...) amx_permission(__VA_ARGS__)
#define __builtin_cpu_supports(feature) 1
#undef __cpuid_count
#define __cpuid_count(leaf, subleaf, a, b, c, d) a = b = c = d = ~0u
#ifndef __AMX_BF16__
#define __AMX_BF16__ 1
#endif
#ifndef __AVX512F__
#define __AVX512F__ 1
#endif

#endif
