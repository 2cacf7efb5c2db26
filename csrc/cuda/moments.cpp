// What the host makes of the bytes that `measure` left.
#include <cstring>

#include "api.hpp"
#include "measure_plan.hpp"

namespace tvfast::gpu {

std::size_t measure_workspace(std::int64_t n_entries, int n_models) {
  return GatheredLayout(n_entries, n_models).size();
}

std::vector<Moments> moments(const std::vector<unsigned char>& workspace, std::int64_t n_entries,
                             int n_models) {
  const GatheredLayout parts(n_entries, n_models);
  const auto at = parts.at(workspace.data());
  const auto n_sums = static_cast<std::size_t>(SumNumbers{n_models}.size());
  const auto n_counts = static_cast<std::size_t>(CountNumbers{n_models}.size());
  const SumNumbers numbers{n_models};
  const CountNumbers places{n_models};
  std::vector<Moments> result(static_cast<std::size_t>(n_entries));
  std::vector<unsigned long long> limbs(kWindows * kLimbs);
  std::vector<std::int64_t> counts(n_counts);
  for (std::size_t entry = 0; entry < result.size(); ++entry) {
    const auto sum = [&](int number) {
      const std::size_t slot = entry * n_sums + static_cast<std::size_t>(number);
      unsigned used;
      double nonfinite;
      std::memcpy(&used, at.used + slot * sizeof used, sizeof used);
      std::memcpy(&nonfinite, at.nonfinite + slot * sizeof nonfinite, sizeof nonfinite);
      const std::size_t n_bytes = limbs.size() * sizeof(unsigned long long);
      std::memcpy(limbs.data(), at.limbs + slot * n_bytes, n_bytes);
      return total(limbs.data(), used, nonfinite);
    };
    std::memcpy(counts.data(), at.counts + entry * n_counts * sizeof(std::int64_t),
                n_counts * sizeof(std::int64_t));
    const auto count = [&](int number) { return counts[static_cast<std::size_t>(number)]; };
    Moments& m = result[entry];
    for (int k = 0; k < n_models; ++k) {
      m.l1_before.push_back(sum(numbers.l1_before(k)));
      m.l1.push_back(sum(numbers.l1(k)));
      m.dots.push_back(sum(numbers.dot(k)));
      m.n_kept.push_back(count(places.kept(k)));
      m.n_nonzero.push_back(count(places.nonzero(k)));
      m.n_nonfinite.push_back(count(places.nonfinite(k)));
      m.n_alone.push_back(count(places.alone(k)));
    }
    for (int j = 0; j < n_models; ++j)
      for (int k = 0; k < n_models; ++k)
        m.gram.push_back(j <= k ? sum(numbers.product(j, k)) : BinnedSum{});
    m.n_base_nonfinite = count(places.base_nonfinite());
    m.elected = count(places.elected());
    m.n_conflict = count(places.conflicts());
  }
  return result;
}

}  // namespace tvfast::gpu
