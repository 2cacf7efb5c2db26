// combine stays within its output for every length and alignment, and gives the scalar table's
// bytes.
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/philox.hpp"
#include "cpu/api.hpp"

namespace {

using namespace tvfast;

std::vector<std::uint16_t> noise(std::size_t n, std::mt19937_64& random) {
  std::vector<std::uint16_t> words(n);
  for (auto& word : words)
    word = static_cast<std::uint16_t>(0x3c00 + random() % 0x300 + (random() % 2 << 15));
  return words;
}

std::vector<std::uint16_t> merged(const Program& program, DType dtype, std::int64_t n, int shift,
                                  const std::string& isa, bool in_place) {
  std::mt19937_64 random(static_cast<std::uint64_t>(n) * 8 + static_cast<std::uint64_t>(shift));
  constexpr int kModels = 3, kGuard = 40;
  std::vector<std::vector<std::uint16_t>> inputs;
  for (int i = 0; i <= kModels; ++i) inputs.push_back(noise(n + kGuard + shift, random));
  std::vector<std::uint16_t> out(n + kGuard + shift, 0xabcd);
  Entry entry;
  entry.base = {inputs[kModels].data() + shift, dtype};
  for (int k = 0; k < kModels; ++k) entry.models.push_back({inputs[k].data() + shift, dtype});
  auto& target = in_place ? inputs[kModels] : out;
  const std::vector<std::uint16_t> before = target;
  entry.out = target.data() + shift;
  entry.out_dtype = dtype;
  entry.n = n;
  entry.row = 37;
  Table table{kModels, {entry}};
  ModelScalars model;
  model.weight = 0.75f;
  model.lo = 0.125f;
  model.lo_cut = std::uint64_t{1} << 31;
  model.limit = std::uint64_t{1} << 31;
  model.key = 99;
  combine(table, program, {{TensorScalars{}}, std::vector<ModelScalars>(kModels, model)},
          {isa, 2, 64});
  for (int i = 0; i < shift; ++i) CHECK(target[i] == before[i]);
  for (std::size_t i = n + shift; i < target.size(); ++i) CHECK(target[i] == before[i]);
  return {target.begin() + shift, target.begin() + shift + n};
}

}  // namespace

int main() {
  return run([] {
    CHECK((philox({0, 0, 0, 0}, 0, 0) ==
           std::array<std::uint32_t, 4>{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
    const Program linear{};
    const Program ties{.keep = Keep::BAND,
                       .tie = Tie::HASH,
                       .vote = Vote::MASS,
                       .ballot = Ballot::WEIGHTED,
                       .members = Members::STRICT,
                       .divisor = Divisor::WEIGHT};
    const Program ranked{
        .keep = Keep::RANDOM_BY_RANK, .vote = Vote::COUNT, .reduce = Reduce::MAX_ABS};
    const std::string isa = default_isa();
    for (const Program& program : {linear, ties, ranked})
      for (DType dtype : {DType::BF16, DType::F16})
        for (std::int64_t n : {0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 1025})
          for (int shift : {0, 1, 3}) {
            const auto expected = merged(program, dtype, n, shift, "scalar", false);
            CHECK(merged(program, dtype, n, shift, isa, false) == expected);
            CHECK(merged(program, dtype, n, shift, isa, true) == expected);
          }
  });
}
