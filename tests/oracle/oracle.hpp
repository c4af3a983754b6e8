// The oracle: carries a case out, asks for the answer, and then reads every page. It knows nothing of how a survey
// works; what it knows is what was done, and so which zero pages may be missing from an answer, and why. Include it
// after all other headers: it imports cppvmm.guest_memory.
#pragma once

#include "case.hpp"
#include "guest.hpp"
#include "helper.hpp"
#include "live_region.hpp"

#include <array>
#include <cstdint>
#include <expected>
#include <functional>
#include <optional>
#include <string>
#include <vector>

import cppvmm.guest_memory;

namespace cppvmm::oracle {

/// Pages, counted in guest-physical space.
struct Span {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
};

/// What a surveyor says, beside the answer that it wrote to the output page.
struct Answered {
  std::uint64_t status = 0;            ///< The hypercall's result.
  std::vector<Span> zeroed;            ///< What the answer was chosen from.
  std::vector<Span> direct;            ///< What GuestMemory::survey called zeroed, without the output page left out.
  std::vector<std::string> problems{}; ///< Where the survey contradicts itself.
  std::vector<Span> by_host{};         ///< What GuestMemory::survey says the accessors wrote.
  std::vector<Span> by_guest{};        ///< And the guest.
  bool names_writers = false;          ///< Whether these two say all that is known.
};

/// Makes an answer in the place of the hypercall handler: writes it to the output address.
using Surveyor = std::function<Answered(const GuestMemory&, const SurveyOptions&, GuestAddress output)>;

/// The real one: GuestMemory::survey, then ExtendedHypercalls::handle.
[[nodiscard]] Answered real_surveyor(const GuestMemory& memory, const SurveyOptions& options, GuestAddress output);

/// Where a survey contradicts itself or the map; nothing when it does not.
[[nodiscard]] std::vector<std::string> contradictions(const Survey& survey, const GuestMemory& memory,
                                                      const SurveyOptions& options);

/// What of the mode is said to the survey itself.
[[nodiscard]] SurveyOptions options_of(SurveyMode mode, std::uint8_t mode_options = 0);

struct Figures {
  std::uint64_t cases = 0;
  std::uint64_t page_checks = 0; ///< Pages that were read and compared.
  std::uint64_t data_pages = 0;
  std::uint64_t reported_pages = 0;
  std::uint64_t unsound = 0;                            ///< Reported, and with data, the answer, a mark, or no RAM.
  std::uint64_t missed = 0;                             ///< Zero, RAM, and not reported.
  std::array<std::uint64_t, reason_kinds> missed_for{}; ///< The same by reason; Reason::none is a failure.
  std::uint64_t swapped_pages = 0;                      ///< That were in swap when the answer was made.
  std::uint64_t substituted_regions = 0;                ///< Of a kind that the host would not give: anonymous instead.
  std::array<std::uint64_t, writer_kinds> done{};       ///< Steps carried out, by writer.
  std::array<std::uint64_t, writer_kinds> refused{};    ///< Steps that the kernel refused, or that fit no page.

  [[nodiscard]] std::uint64_t unexplained() const { return missed_for[0]; }
  void add(const Figures& other);
};

struct Outcome {
  Figures figures;
  std::vector<std::string> problems; ///< Everything that is wrong, the first few of a kind; empty: the case holds.
  [[nodiscard]] bool holds() const { return problems.empty(); }
};

/// Carries cases out, one at a time.
class Oracle {
public:
  /// Starts the other process. Before any guest memory is made.
  [[nodiscard]] static std::expected<Oracle, std::string> start();
  /// A VM for the writers that are vCPUs; one line for a person where KVM cannot be used.
  [[nodiscard]] std::expected<void, std::string> add_vcpu();

  [[nodiscard]] Outcome run(const Case& what, const Surveyor& surveyor = real_surveyor);

private:
  friend class Run;
  explicit Oracle(Helper helper) : helper_(std::move(helper)) {}
  Helper helper_;
  std::optional<Guest> guest_;
};

} // namespace cppvmm::oracle
