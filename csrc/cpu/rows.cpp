// Rows of files in another order: puts them where they belong, then fills in what is absent.
#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
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

const std::byte* byte_at(const void* p, std::int64_t i, std::size_t size) {
  return static_cast<const std::byte*>(p) + i * static_cast<std::int64_t>(size);
}

std::byte* byte_at(void* p, std::int64_t i, std::size_t size) {
  return static_cast<std::byte*>(p) + i * static_cast<std::int64_t>(size);
}

// Part of a row that is wanted: where it lies in the file, and where it goes.
struct Wanted {
  std::int64_t offset, n;
  std::byte* to;
};

// Bytes between two wanted rows that are read and dropped rather than asked around: a call costs as
// much as copying some thousand bytes.
constexpr std::int64_t kGap = 4096;
constexpr std::size_t kParts = 512;  // of one call; systems take 1024 at most

// Reads wanted rows that lie behind each other in the file by one call.
class Requests {
 public:
  explicit Requests(int descriptor) : descriptor_(descriptor) { parts_.reserve(kParts); }

  // In ascending order of offsets. The number of the error, or -1.
  int add(const Wanted& wanted) {
    const std::int64_t gap = wanted.offset - end_;
    if (parts_.empty() || gap < 0 || gap > kGap || parts_.size() + 2 > kParts) {
      const int code = flush();
      if (code >= 0) return code;
      begin_ = end_ = wanted.offset;
    } else if (gap > 0) {
      append(dropped_.data(), gap);
    }
    append(wanted.to, wanted.n);
    return -1;
  }

  int flush() {
    std::size_t first = 0;
    while (first < parts_.size()) {
      ssize_t n = preadv(descriptor_, parts_.data() + first, int(parts_.size() - first), begin_);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return n < 0 ? errno : 0;
      begin_ += n;
      for (; first < parts_.size() && static_cast<std::size_t>(n) >= parts_[first].iov_len; ++first)
        n -= static_cast<ssize_t>(parts_[first].iov_len);
      if (n > 0) {
        parts_[first].iov_base = static_cast<std::byte*>(parts_[first].iov_base) + n;
        parts_[first].iov_len -= static_cast<std::size_t>(n);
      }
    }
    parts_.clear();
    return -1;
  }

  std::int64_t stopped_at() const { return begin_; }

 private:
  void append(std::byte* to, std::int64_t n) {
    end_ += n;
    if (!parts_.empty()) {
      iovec& last = parts_.back();
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == to && to != dropped_.data()) {
        last.iov_len += static_cast<std::size_t>(n);
        return;
      }
    }
    parts_.push_back({to, static_cast<std::size_t>(n)});
  }

  const int descriptor_;
  std::int64_t begin_ = 0, end_ = 0;  // in the file
  std::vector<iovec> parts_;
  std::array<std::byte, kGap> dropped_;
};

bool earlier(const Wanted& a, const Wanted& b) { return a.offset < b.offset; }

// Whether rows are out of order, and so close together that in order many are one request.
bool neighbours_are_near(const std::vector<Wanted>& rows) {
  if (std::is_sorted(rows.begin(), rows.end(), earlier)) return false;
  const auto [first, last] = std::minmax_element(rows.begin(), rows.end(), earlier);
  const std::int64_t each = (last->offset - first->offset) / std::int64_t(rows.size());
  return each <= first->n + kGap;
}

// Where a source's rows go in its own type: behind everything that widening will write first.
std::byte* narrow_rows(const RowGather& gather, const RowSource& source) {
  return byte_at(source.out, gather.n, size_of(gather.dtype)) -
         gather.n * static_cast<std::int64_t>(size_of(source.stored));
}

// Copies a source's rows from where it stands in memory.
void copy_rows(const RowGather& gather, const RowSource& source) {
  const std::size_t size = size_of(source.stored);
  std::byte* const first = narrow_rows(gather, source);
  for_each_row(gather, [&](const Run& run) {
    const std::int32_t row = source.rows[run.row];
    if (row < 0) return;
    std::memcpy(byte_at(first, run.at, size),
                byte_at(source.shown, row * gather.row + run.column, size),
                static_cast<std::size_t>(run.n) * size);
  });
}

// Reads a source's rows from its file.
RowFailure read_rows(const RowGather& gather, int index) {
  const RowSource& source = gather.sources[static_cast<std::size_t>(index)];
  const std::size_t size = size_of(source.stored);
  std::byte* const first = narrow_rows(gather, source);
  std::vector<Wanted> rows;
  rows.reserve(static_cast<std::size_t>(gather.n / gather.row + 2));
  for_each_row(gather, [&](const Run& run) {
    const std::int32_t row = source.rows[run.row];
    if (row < 0) return;
    const std::int64_t element = row * gather.row + run.column;
    rows.push_back({source.offset + element * std::int64_t(size), run.n * std::int64_t(size),
                    first + run.at * std::int64_t(size)});
  });
  if (neighbours_are_near(rows)) std::sort(rows.begin(), rows.end(), earlier);
  Requests requests(source.descriptor);
  for (const Wanted& wanted : rows) {
    const int code = requests.add(wanted);
    if (code >= 0) return {index, code, requests.stopped_at()};
  }
  const int code = requests.flush();
  if (code >= 0) return {index, code, requests.stopped_at()};
  return {};
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
        std::memcpy(to, byte_at(source.constants, element, size_), n_bytes);
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
    const RowSource& source = gather.sources[static_cast<std::size_t>(index)];
    if (source.shown != nullptr) {
      copy_rows(gather, source);
    } else {
      const RowFailure failure = read_rows(gather, index);
      if (failure.source >= 0) return failure;
    }
    if (source.stored != gather.dtype)
      kernels_for("").widen_run(narrow_rows(gather, source), source.stored, gather.n,
                                static_cast<float*>(source.out));
  }
  for_each_row(gather, Filler(gather));
  return {};
}

void add_rows(const float* matrix, std::int64_t n_rows, std::int64_t row, double* sums) {
  kernels_for("").add_rows(matrix, n_rows, row, sums);
}

}  // namespace tvfast
