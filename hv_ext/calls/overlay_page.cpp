module;
#include <array>
#include <cstddef>
#include <optional>
#include <utility>
module cppvmm.hv_calls:overlay_page.impl;
import :overlay_page;
import cppvmm.guest_memory;

namespace cppvmm {

static GuestAddress start_of(PageNumber page) { return GuestAddress(page.value() << page_shift); }

bool OverlayPage::lay(const GuestMemory& memory, PageNumber page) {
  if (page_ == page) return memory.write(start_of(page), content_).has_value();
  HvPage covered;
  if (!memory.read(start_of(page), covered)) return false;
  if (!memory.write(start_of(page), content_)) {
    // Adopted memory may take part of it.
    static_cast<void>(memory.write(start_of(page), covered).has_value());
    return false;
  }
  lift(memory);
  page_ = page;
  covered_ = covered;
  return true;
}

bool OverlayPage::lay_again(const GuestMemory& memory, PageNumber page, const std::optional<HvPage>& covered) {
  if (!memory.write(start_of(page), content_)) return false;
  page_ = page;
  covered_ = covered;
  return true;
}

void OverlayPage::lift(const GuestMemory& memory) {
  HvPage now;
  if (page_ && covered_ && memory.read(start_of(*page_), now) && now == content_)
    static_cast<void>(memory.write(start_of(*page_), *covered_).has_value());
  drop();
}

void OverlayPage::drop() {
  page_.reset();
  covered_.reset();
}

} // namespace cppvmm
