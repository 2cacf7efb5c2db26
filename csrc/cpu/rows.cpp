// Rows of files in another order: reads them where they belong, then fills in what is absent.
#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "api.hpp"
#include "isa.hpp"

namespace tvfast {

namespace {

// The part of one new row that lies in the window.
struct Run {
  std::int64_t row, column, n, at;  // `at`: the position of its first element in the window
};

template <class Fn>
void for_each_row(const RowGather& gather, Fn&& fn) {
  const std::int64_t end = gather.start + gather.n;
  for (std::int64_t position = gather.start; position < end;) {
    const std::int64_t row = position / gather.row, column = position % gather.row;
    const std::int64_t n = std::min(gather.row - column, end - position);
    fn(Run{row, column, n, position - gather.start});
    position += n;
  }
}

std::byte* byte_at(void* p, std::int64_t i, std::size_t size) {
  return static_cast<std::byte*>(p) + i * static_cast<std::int64_t>(size);
}

// Consecutive bytes of a file that go to consecutive bytes of memory.
struct Request {
  std::int64_t offset = 0;
  std::byte* to = nullptr;
  std::int64_t n = 0;

  bool follows(std::int64_t next_offset, const std::byte* next_to) const {
    return n > 0 && offset + n == next_offset && to + n == next_to;
  }
};

// The number of the error, or -1; where it stopped is left in `request`.
int read_all(int descriptor, Request& request) {
  while (request.n > 0) {
    const ssize_t n =
        pread(descriptor, request.to, static_cast<std::size_t>(request.n), request.offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : 0;
    request.offset += n;
    request.to += n;
    request.n -= n;
  }
  return -1;
}

// Reads a source's rows in its own type behind everything that widening will write first.
RowFailure read_rows(const RowGather& gather, int index) {
  const RowSource& source = gather.sources[static_cast<std::size_t>(index)];
  const std::size_t size = size_of(source.stored);
  std::byte* const first =
      byte_at(source.out, gather.n, size_of(gather.dtype)) - gather.n * std::int64_t(size);
  Request request;
  RowFailure failure;
  const auto flush = [&] {
    if (failure.source >= 0 || request.n == 0) return;
    const int code = read_all(source.descriptor, request);
    if (code >= 0) failure = {index, code, request.offset};
  };
  for_each_row(gather, [&](const Run& run) {
    const std::int32_t row = source.rows[run.row];
    if (row < 0 || failure.source >= 0) return;
    const std::int64_t bytes = run.n * std::int64_t(size);
    const std::int64_t offset =
        source.offset + (row * gather.row + run.column) * std::int64_t(size);
    std::byte* const to = first + run.at * std::int64_t(size);
    if (!request.follows(offset, to)) {
      flush();
      request = {offset, to, 0};
    }
    request.n += bytes;
  });
  flush();
  return failure;
}

// Fills one row of every source that lacks it.
class Filler {
 public:
  explicit Filler(const RowGather& gather) : gather_(gather), size_(size_of(gather.dtype)) {
    present_.reserve(gather.sources.size());
  }

  void operator()(const Run& run) {
    present_.clear();
    for (const RowSource& source : gather_.sources)
      if (source.rows[run.row] >= 0)
        present_.push_back(static_cast<const float*>(source.out) + run.at);
    if (present_.size() == gather_.sources.size()) return;
    const std::int32_t fill = gather_.fill[run.row];
    const void* same = nullptr;
    for (const RowSource& source : gather_.sources) {
      if (source.rows[run.row] >= 0) continue;
      std::byte* const to = byte_at(source.out, run.at, size_);
      const std::size_t n_bytes = static_cast<std::size_t>(run.n) * size_;
      if (fill <= kConstant) {
        const std::int64_t element = (kConstant - fill) * gather_.row + run.column;
        std::memcpy(to, byte_at(const_cast<void*>(source.constants), element, size_), n_bytes);
      } else if (fill == kZeroRow) {
        std::memset(to, 0, n_bytes);
      } else if (fill >= 0) {
        const RowSource& donor = gather_.sources[static_cast<std::size_t>(fill)];
        std::memcpy(to, byte_at(donor.out, run.at, size_), n_bytes);
      } else if (same == nullptr) {
        kernels_for("").mean_run(present_.data(), static_cast<int>(present_.size()), run.n,
                                 reinterpret_cast<float*>(to));
        same = to;
      } else {
        std::memcpy(to, same, n_bytes);
      }
    }
  }

 private:
  const RowGather& gather_;
  const std::size_t size_;
  std::vector<const float*> present_;
};

}  // namespace

RowFailure gather_rows(const RowGather& gather) {
  for (int index = 0; index < static_cast<int>(gather.sources.size()); ++index) {
    const RowFailure failure = read_rows(gather, index);
    if (failure.source >= 0) return failure;
    const RowSource& source = gather.sources[static_cast<std::size_t>(index)];
    if (source.stored != gather.dtype) {
      const std::byte* const from = byte_at(source.out, gather.n, sizeof(float)) -
                                    gather.n * static_cast<std::int64_t>(size_of(source.stored));
      kernels_for("").widen_run(from, source.stored, gather.n, static_cast<float*>(source.out));
    }
  }
  for_each_row(gather, Filler(gather));
  return {};
}

void add_rows(const float* matrix, std::int64_t n_rows, std::int64_t row, double* sums) {
  kernels_for("").add_rows(matrix, n_rows, row, sums);
}

}  // namespace tvfast
