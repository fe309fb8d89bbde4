// Orthogonal and gradient pursuit on threads: rows are handed out one at a time.
#include "driver.h"

namespace mpsae {

void orthogonal(const Orthogonal& q, int64_t threads, const Functions& f) {
  int64_t room = q.k < q.n ? q.k : q.n;  // no row has more atoms than this
  if (!q.gradient && q.d < room) room = q.d;  // see orthogonal_row
  const int64_t stride = round_up(room + 1, 8);
  const int64_t square = room * stride;
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    Buffer<float> correlation(q.n), maxima(q.n), weight(stride);
    Buffer<const float*> rows(stride);
    Buffer<double> span(q.gradient ? 0 : square), fit(q.nonnegative && !q.gradient ? square : 0),
        pairs(q.nonnegative || q.gradient ? square : 0), lists(7 * stride);
    Buffer<double> residual(q.d);
    Buffer<int64_t> members(stride);
    Buffer<bool> fitted(stride);
    double* list = lists.get();
    const auto take = [&] { return (list += stride) - stride; };
    const OrthogonalScratch w = {correlation.get(), maxima.get(), rows.get(), weight.get(),
                                 span.get(),        fit.get(),    pairs.get(), stride,
                                 take(),            take(),       take(),      take(),
                                 take(),            take(),       take(),      residual.get(),
                                 members.get(),     fitted.get()};
    for (int64_t b; (b = next.fetch_add(1)) < q.B;) f.orthogonal_row(q, b, w);
  });
}

}  // namespace mpsae
