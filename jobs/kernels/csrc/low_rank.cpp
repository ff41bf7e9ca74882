// y += (x * down) * up for chosen rows: the low-rank part of a layer with a LoRA adapter.
//
// down [I][R], up [R][O] and everything else in float32; R is a multiple of 16. Along I a sum has
// four parts, feature i in part i % 4, so that one row alone does not wait for every product; along
// R there is one. Both orders are fixed, so a row's result does not depend on the other rows.
#include "vector.h"

namespace rs {
namespace {

constexpr int64_t kParts = 4, kTileVectors = 4;
constexpr int64_t kTileRows = kRegisters > 16 ? 4 : 2;  // sums take half the registers
constexpr int64_t kMaxRank = 512;
// Below this many products a second thread starts later than one has finished.
constexpr int64_t kMinParallelProducts = 1 << 18;

struct Problem {
    const float* x;
    int64_t x_stride;
    float* y;
    int64_t y_stride;
    const int32_t* rows;
    const float* down;
    const float* up;
    int64_t in_features, rank, out_features;
};

template <int ROWS>
void project_down(const Problem& p, const int32_t* rows, float (*h)[kMaxRank]) {
    const float* x[ROWS];
    for (int n = 0; n < ROWS; ++n) x[n] = p.x + rows[n] * p.x_stride;
    for (int64_t r = 0; r < p.rank; r += kLanes) {
        Floats sums[ROWS][kParts];
        for (int n = 0; n < ROWS; ++n)
            for (int k = 0; k < kParts; ++k) sums[n][k] = zeros();
        const float* down = p.down + r;
        int64_t i = 0;
        for (; i + kParts <= p.in_features; i += kParts)
            for (int k = 0; k < kParts; ++k) {
                const Floats column = load(down + (i + k) * p.rank);
                for (int n = 0; n < ROWS; ++n)
                    sums[n][k] = multiply_add(all(x[n][i + k]), column, sums[n][k]);
            }
        for (int k = 0; i + k < p.in_features; ++k) {
            const Floats column = load(down + (i + k) * p.rank);
            for (int n = 0; n < ROWS; ++n)
                sums[n][k] = multiply_add(all(x[n][i + k]), column, sums[n][k]);
        }
        for (int n = 0; n < ROWS; ++n)
            store(h[n] + r, (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]));
    }
}

// Outputs [o, o + kTileVectors * kLanes), all of which there are where kIsWhole.
template <int ROWS, bool kIsWhole>
void project_up(const Problem& p, const int32_t* rows, const float (*h)[kMaxRank], int64_t o) {
    const auto left = [&](int v) { return kIsWhole ? kLanes : p.out_features - o - v * kLanes; };
    Floats sums[ROWS][kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
        for (int n = 0; n < ROWS; ++n) sums[n][v] = zeros();
    for (int64_t r = 0; r < p.rank; ++r)
        for (int v = 0; v < kTileVectors; ++v) {
            const float* up = p.up + r * p.out_features + o + v * kLanes;
            const Floats column = kIsWhole ? load(up) : load_some(up, left(v));
            for (int n = 0; n < ROWS; ++n)
                sums[n][v] = multiply_add(all(h[n][r]), column, sums[n][v]);
        }
    for (int n = 0; n < ROWS; ++n)
        for (int v = 0; v < kTileVectors; ++v) {
            float* y = p.y + rows[n] * p.y_stride + o + v * kLanes;
            store_some(y, load_some(y, left(v)) + sums[n][v], left(v));
        }
}

template <int ROWS>
void add_rows(const Problem& p, const int32_t* rows) {
    float h[ROWS][kMaxRank];
    project_down<ROWS>(p, rows, h);
    constexpr int64_t kTile = kTileVectors * kLanes;
    int64_t o = 0;
    for (; o + kTile <= p.out_features; o += kTile) project_up<ROWS, true>(p, rows, h, o);
    if (o < p.out_features) project_up<ROWS, false>(p, rows, h, o);
}

}  // namespace
}  // namespace rs

// Rows `rows[0 .. num_rows)` of y [.., out_features] gain those of x [.., in_features], projected.
RS_EXPORT void rs_add_low_rank(const float* x, int64_t x_stride, float* y, int64_t y_stride,
                               const int32_t* rows, int64_t num_rows, const float* down,
                               const float* up, int64_t in_features, int64_t rank,
                               int64_t out_features, int32_t num_threads) {
    using namespace rs;
    const Problem p{x, x_stride, y, y_stride, rows, down, up, in_features, rank, out_features};
    const int64_t num_products = num_rows * rank * (in_features + out_features);
    const int threads = num_products < kMinParallelProducts ? 1 : num_threads;
    parallel_tasks(ceil_div(num_rows, kTileRows), threads, [&](int64_t task) {
        const int64_t first = task * kTileRows;
        if (first + kTileRows <= num_rows) {
            add_rows<kTileRows>(p, rows + first);
        } else {
            for (int64_t n = first; n < num_rows; ++n) add_rows<1>(p, rows + n);
        }
    });
}
