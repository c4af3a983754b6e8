module;
#include <array>
#include <cstddef>
#include <optional>
export module cppvmm.hv_calls:overlay_page;
import cppvmm.guest_memory;

namespace cppvmm {

/// The bytes of a page.
export using HvPage = std::array<std::byte, page_size>;

/// A page of the hypervisor's that lies over one of the guest's (TLFS "GPA Overlay Pages"): what the guest's page holds
/// comes back when the overlay moves or goes. It is made by writing into the guest's page, as KVM does it. Not safe to
/// use from several threads at once.
class OverlayPage {
public:
  /// `content` outlives the object, and changes only while no page is laid, or right before `lay_again`.
  explicit OverlayPage(const HvPage& content) : content_(content) {}

  /// Lays it over `page`, and gives back what was covered until now. False when the page is not the guest's to write:
  /// nothing has changed then.
  [[nodiscard]] bool lay(const GuestMemory& memory, PageNumber page);
  /// The same for a page that has it already, or had another's when it was saved: `covered` is what comes back, if
  /// anything. What was covered until now does not.
  [[nodiscard]] bool lay_again(const GuestMemory& memory, PageNumber page, const std::optional<HvPage>& covered);
  /// Takes it away, and gives back what it covered; unless the page holds something else by now, as it does when it was
  /// discarded, or is another memory's.
  void lift(const GuestMemory& memory);
  /// Forgets it: guest memory stays as it is.
  void drop();

  [[nodiscard]] std::optional<PageNumber> page() const { return page_; }
  /// Nothing: there is no overlay, or it is not known what it covers.
  [[nodiscard]] const std::optional<HvPage>& covered() const { return covered_; }

private:
  const HvPage& content_;
  std::optional<PageNumber> page_;
  std::optional<HvPage> covered_;
};

} // namespace cppvmm
