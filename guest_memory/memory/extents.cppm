module;
#include <cstddef>
#include <cstdint>
#include <vector>
module cppvmm.guest_memory:extents;

namespace cppvmm {

/// Pages of a region or a file, counted from its start.
struct Extent {
  std::uint64_t first = 0;
  std::uint64_t count = 0;

  [[nodiscard]] constexpr std::uint64_t end() const { return first + count; }
};

/// Touched pages in ascending order, in bounded space: a guest decides how scattered they are. Past the limit, the
/// smallest gaps between extents are given up and count as touched; the `limit / 2` largest always stay, which is far
/// more than any answer can name.
class ExtentList {
public:
  static constexpr std::size_t default_limit = std::size_t{1} << 18;

  explicit ExtentList(std::size_t limit = default_limit) : limit_(limit) {}

  /// Extents come in ascending order; one that touches or overlaps the last is joined to it. (One that comes out of
  /// order is not lost: all from its start on become one extent.)
  void add(Extent extent);
  /// Counts from another start: all extents move by so many pages.
  void shift_up(std::uint64_t pages);
  void shift_down(std::uint64_t pages);

  [[nodiscard]] const std::vector<Extent>& extents() const { return extents_; }
  /// Pages added, each once, without those of gaps that were given up.
  [[nodiscard]] std::uint64_t page_count() const { return page_count_; }
  /// Pages in the gaps that were given up.
  [[nodiscard]] std::uint64_t given_up_pages() const { return given_up_; }

private:
  void give_up_small_gaps();

  std::size_t limit_;
  std::vector<Extent> extents_;
  std::uint64_t page_count_ = 0;
  std::uint64_t given_up_ = 0;
};

} // namespace cppvmm
