module;
#include <cstdint>
export module cppvmm.guest_memory:toucher;

namespace cppvmm {

/// Who wrote to a page, as far as it is known.
export enum class Toucher : std::uint8_t {
  host = 1 << 0,    ///< The VMM or a process that serves it.
  guest = 1 << 1,   ///< A vCPU.
  device = 1 << 2,  ///< A device, by DMA.
  unknown = 1 << 3, ///< There is evidence of a write, but not of the writer.
};

/// A set of Toucher.
export class Touchers {
public:
  constexpr Touchers() = default;
  constexpr Touchers(Toucher one) : bits_(static_cast<std::uint8_t>(one) & all) {}

  [[nodiscard]] constexpr bool has(Toucher one) const { return (bits_ & static_cast<std::uint8_t>(one)) != 0; }
  [[nodiscard]] constexpr bool empty() const { return bits_ == 0; }
  [[nodiscard]] constexpr std::uint8_t bits() const { return bits_; }
  /// Bits that name no Toucher are dropped.
  [[nodiscard]] static constexpr Touchers from_bits(std::uint8_t bits) {
    Touchers result;
    result.bits_ = bits & all;
    return result;
  }

  friend constexpr Touchers operator|(Touchers left, Touchers right) { return from_bits(left.bits_ | right.bits_); }
  friend constexpr bool operator==(Touchers, Touchers) = default;

private:
  static constexpr std::uint8_t all = 0xF;
  std::uint8_t bits_ = 0;
};

} // namespace cppvmm
