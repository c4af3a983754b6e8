// cppvmm-boot's command line.
#pragma once

#include "enlightenments.hpp"

#include <cstdint>
#include <expected>
#include <optional>
#include <string>
#include <string_view>

namespace cppvmm::boot {

enum class MemoryBacking : std::uint8_t {
  anonymous,
  memfd,
  shared_anonymous,
  hugetlb,
  hugetlb_memfd,
  private_file,
  shared_file,
};
/// Transparent huge pages.
enum class HugePageUse : std::uint8_t { system, never, always, after_answer };
enum class Hypercalls : std::uint8_t { automatic, kernel, split, user, off };

struct Options {
  std::uint64_t memory_bytes = std::uint64_t{128} << 20;
  std::uint32_t cpus = 1;
  MemoryBacking backing = MemoryBacking::anonymous;
  Hypercalls hypercalls = Hypercalls::automatic;
  Enlightenments enlightenments{.set = EnlightenmentSet::full};
  HugePageUse huge_pages = HugePageUse::system;
  /// What the zeroing guest keeps of its free memory in the end, in bytes; nothing: all.
  std::optional<std::uint64_t> balloon_target{};
  bool idle = false;          ///< The zeroing guest is given no memory to zero.
  bool populate = false;      ///< RAM is present before the guest starts.
  bool write_watch = false;   ///< Until the first answer of a boot.
  bool dirty_log = false;     ///< Until the first answer of a boot.
  bool content_check = false; ///< In each survey.
  bool audit = false;
  std::uint32_t leftovers = 0;                   ///< Pages with data in them before the guest starts.
  std::uint32_t resets = 0;                      ///< How many of the guest's resets start it anew.
  std::string kernel;                            ///< A Linux kernel to boot; empty: the zeroing guest.
  std::string initrd;                            ///< Empty: none.
  std::string append = "console=ttyS0 panic=-1"; ///< The kernel's command line.
  std::string json;                              ///< Where the JSON goes; empty: nowhere, "-": standard output.
  std::string map;                               ///< Where the picture of guest memory goes, as SVG; empty: nowhere.
  std::string save;                              ///< Where the machine is saved; empty: it is not.
  std::string save_at;                           ///< What the guest says on its console then.
  std::string restore;                           ///< A machine that was saved, to go on with; empty: none.
  std::string trace;                             ///< Where the trace of Hyper-V's use goes; empty: nowhere.
  std::string host_memory_log;                   ///< Where host memory over time goes; empty: nowhere.
  std::string kvm_device = "/dev/kvm";
};

/// The words that the command line and the JSON use.
[[nodiscard]] const char* to_string(MemoryBacking backing);
[[nodiscard]] const char* to_string(Hypercalls hypercalls);
[[nodiscard]] const char* to_string(HugePageUse use);

/// What to do instead of running: print `text` and exit with `status`.
struct EarlyExit {
  int status = 0; ///< 0 after --help, 2 after a mistake, for which `text` is one line.
  std::string text;
};

[[nodiscard]] std::expected<Options, EarlyExit> parse_options(int argc, const char* const* argv);

/// Whether a guest can have so much memory.
[[nodiscard]] bool is_memory_size(std::uint64_t bytes);

/// "64M", "1GiB", "4096": bytes, with a binary suffix K, M, G or T ("B" or "iB" may follow); nothing if it is no size.
[[nodiscard]] std::optional<std::uint64_t> parse_size(std::string_view text);

} // namespace cppvmm::boot
