#include "options.hpp"

#include "tests/guests/zeroing/abi.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <sstream>
#include <vector>

namespace cppvmm::boot {
namespace {

constexpr std::uint64_t mebi = std::uint64_t{1} << 20;
constexpr std::uint64_t minimum_memory = 4 * mebi;
// What lies above 4 GiB is one memory slot, and KVM takes fewer than 2^31 pages in one (Linux include/linux/kvm_host.h,
// KVM_MEM_MAX_NR_PAGES).
constexpr std::uint64_t maximum_memory = std::uint64_t{8} << 40;
// A little is kept of each boot.
constexpr std::uint32_t most_resets = 100'000;

const std::map<std::string, MemoryBacking> backings = {{"anonymous", MemoryBacking::anonymous},
                                                       {"memfd", MemoryBacking::memfd},
                                                       {"shared-anonymous", MemoryBacking::shared_anonymous},
                                                       {"hugetlb", MemoryBacking::hugetlb},
                                                       {"hugetlb-memfd", MemoryBacking::hugetlb_memfd},
                                                       {"private-file", MemoryBacking::private_file},
                                                       {"shared-file", MemoryBacking::shared_file}};
const std::map<std::string, HugePageUse> huge_page_uses = {{"system", HugePageUse::system},
                                                           {"never", HugePageUse::never},
                                                           {"always", HugePageUse::always},
                                                           {"after-answer", HugePageUse::after_answer}};
const std::map<std::string, Hypercalls> transports = {{"auto", Hypercalls::automatic},
                                                      {"kernel", Hypercalls::kernel},
                                                      {"split", Hypercalls::split},
                                                      {"user", Hypercalls::user},
                                                      {"off", Hypercalls::off}};

template <class T>
const char* word_for(const std::map<std::string, T>& words, T value) {
  for (const auto& [word, meaning] : words)
    if (meaning == value) return word.c_str();
  return "?";
}

template <class T>
CLI::Validator one_of(const std::map<std::string, T>& words) {
  std::string list;
  for (const auto& [word, meaning] : words)
    list += (list.empty() ? "" : ", ") + word;
  return CLI::Validator(
      [&words, list](const std::string& text) {
        return words.contains(text) ? std::string() : "\"" + text + "\" is none of " + list;
      },
      "");
}

std::string joined(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words)
    line += (line.empty() ? "" : ", ") + word;
  return line;
}

/// Empty, or what is wrong with the size.
std::string check_target(const std::string& text) {
  const auto bytes = parse_size(text);
  if (!bytes) return "\"" + text + "\" is not a size such as 64M or 1G";
  return *bytes % zeroing::page_bytes == 0 ? "" : "must be a multiple of 4 KiB";
}

/// Empty, or why no guest of these can have a balloon target.
std::string check_balloon(const Options& options) {
  if (!options.balloon_target) return {};
  if (*options.balloon_target > options.memory_bytes) return "must be at most what --memory is";
  if (options.hypercalls == Hypercalls::off || !has_enlightenment(options.enlightenments, "hv-memory-hint"))
    return "needs hv-memory-hint, by which the guest gives memory back";
  return {};
}

Enlightenments enlightenments_of(const std::string& text) {
  if (text == "full") return {};
  if (text == "minimal") return {.set = EnlightenmentSet::minimal};
  Enlightenments chosen{.set = EnlightenmentSet::listed};
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');)
    chosen.names.push_back(word);
  return chosen;
}

/// Empty, or what is wrong with the list.
std::string check_enlightenments(const std::string& text) {
  const auto names = enlightenment_names();
  for (const std::string& name : enlightenments_of(text).names)
    if (std::ranges::find(names, name) == names.end()) return "\"" + name + "\" is none of " + joined(names);
  return text.empty() ? "is empty" : std::string();
}

/// Empty, or what is wrong with the size.
std::string check_memory(const std::string& text) {
  const auto bytes = parse_size(text);
  if (!bytes) return "\"" + text + "\" is not a size such as 64M or 1G";
  if (*bytes % zeroing::page_bytes != 0) return "must be a multiple of 4 KiB";
  if (*bytes < minimum_memory) return "must be at least 4M";
  if (*bytes > maximum_memory) return "must be at most 8T";
  return {};
}

} // namespace

bool is_memory_size(std::uint64_t bytes) {
  return bytes % zeroing::page_bytes == 0 && bytes >= minimum_memory && bytes <= maximum_memory;
}

const char* to_string(MemoryBacking backing) { return word_for(backings, backing); }
const char* to_string(Hypercalls hypercalls) { return word_for(transports, hypercalls); }
const char* to_string(HugePageUse use) { return word_for(huge_page_uses, use); }

std::optional<std::uint64_t> parse_size(std::string_view text) {
  std::uint64_t value = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return std::nullopt;
  std::string_view suffix(rest, static_cast<std::size_t>(text.data() + text.size() - rest));
  if (suffix.empty()) return value;
  const auto power = std::string_view("KMGT").find(suffix.front() >= 'a' ? static_cast<char>(suffix.front() - 'a' + 'A')
                                                                         : suffix.front());
  if (power == std::string_view::npos) return std::nullopt;
  suffix.remove_prefix(1);
  if (!suffix.empty() && suffix != "B" && suffix != "iB") return std::nullopt;
  const auto shift = static_cast<unsigned>(10 * (power + 1));
  if (value > std::numeric_limits<std::uint64_t>::max() >> shift) return std::nullopt;
  return value << shift;
}

std::expected<Options, EarlyExit> parse_options(int argc, const char* const* argv) {
  Options options;
  std::string memory = "128M";
  std::string backing = "anonymous";
  std::string hypercalls = "auto";
  std::string enlightenments = "full";
  std::string huge_pages = "system";
  std::string guest = "zeroing";
  std::string target;

  CLI::App app(
      "Boots a guest on KVM, and tells it which of its memory is zero already when it asks. The guest is one that "
      "wants its memory zeroed, or Linux with its console on this terminal, which runs until it resets the machine.",
      "cppvmm-boot");
  auto* const size = app.add_option("--memory", memory, "Guest RAM, e.g. 64M or 1G; above 3G the rest starts at 4G")
                         ->capture_default_str()
                         ->type_name("SIZE")
                         ->check(CLI::Validator(check_memory, ""));
  auto* const count = app.add_option("--cpus", options.cpus, "Virtual CPUs, 1 to " + std::to_string(zeroing::max_cpus))
                          ->capture_default_str()
                          ->type_name("N")
                          ->check(CLI::Range(std::size_t{1}, zeroing::max_cpus));
  app.add_option(
         "--backing", backing,
         "What holds guest RAM: anonymous, memfd, shared-anonymous, hugetlb, hugetlb-memfd (2 MiB pages), private-file "
         "or shared-file (sparse, in $TMPDIR or /var/tmp)")
      ->capture_default_str()
      ->type_name("KIND")
      ->check(one_of(backings));
  auto* const way =
      app.add_option(
             "--hypercalls", hypercalls,
             "Who takes Hyper-V hypercalls: kernel (KVM forwards them), split (KVM, but for extended ones, which trap "
             "by port I/O), user (this program, by MSR filter and port I/O), auto (the first of these that KVM "
             "can), off (no Hyper-V interface)")
          ->capture_default_str()
          ->type_name("WAY")
          ->check(one_of(transports));
  auto* const shown =
      app.add_option(
             "--enlightenments", enlightenments,
             "Which of Hyper-V's enlightenments the guest is shown beside the extended hypercalls: full (all that "
             "KVM has, and hv-memory-hint; with --hypercalls user, where KVM has none, time and hv-memory-hint), "
             "minimal, "
             "or a list: " +
                 joined(enlightenment_names()))
          ->capture_default_str()
          ->type_name("SET")
          ->check(CLI::Validator(check_enlightenments, ""));
  auto* const own_guest = app.add_option("--guest", guest,
                                         "The guest program: zeroing (zeroes all memory that it is not told to be "
                                         "zero), idle (the same, which is given "
                                         "no memory to zero)")
                              ->capture_default_str()
                              ->type_name("NAME")
                              ->check(CLI::IsMember({"zeroing", "idle"}));
  auto* const kernel = app.add_option("--kernel", options.kernel, "Boot this Linux kernel instead: a bzImage, x86-64")
                           ->type_name("BZIMAGE")
                           ->excludes(own_guest);
  auto* const balloon =
      app.add_option("--balloon-target", target,
                     "As a balloon would, the zeroing guest gives all its free memory but this much back to the host "
                     "once it is up (HvExtCallMemoryHeatHint, cold discard)")
          ->type_name("SIZE")
          ->check(CLI::Validator(check_target, ""))
          ->excludes(kernel);
  app.add_option("--initrd", options.initrd, "The kernel's initial file system")->type_name("FILE")->needs(kernel);
  app.add_option("--append", options.append, "The kernel's command line")
      ->capture_default_str()
      ->type_name("TEXT")
      ->needs(kernel);
  app.add_option(
         "--thp", huge_pages,
         "Transparent huge pages: system (as the host has it), never, always, after-answer (from a boot's first "
         "answer on)")
      ->capture_default_str()
      ->type_name("WHEN")
      ->check(one_of(huge_page_uses));
  app.add_flag("--populate", options.populate, "Have all RAM present before the guest starts");
  app.add_flag(
      "--write-watch", options.write_watch,
      "Until a boot's first answer, watch which pages are written (userfaultfd, Linux 6.7): exact for RAM that is "
      "present as a whole");
  app.add_flag("--dirty-log", options.dirty_log,
               "Until a boot's first answer, keep KVM's dirty log: it tells who wrote, and with one vCPU is exact like "
               "the watch");
  app.add_flag("--content-check", options.content_check,
               "Look for zeros in pages that are touched: they may be in use, as firmware's are");
  app.add_flag(
      "--audit", options.audit,
      "Re-read all RAM by another way right after each answer, and count pages that it got wrong: the run fails "
      "if a reported page holds data (what another vCPU writes meanwhile counts as if it had been there)");
  auto* const leftovers =
      app.add_option("--leftovers", options.leftovers,
                     "Put data into this many pages, spread over RAM, before the guest starts, as firmware leaves them")
          ->capture_default_str()
          ->type_name("PAGES");
  auto* const resets =
      app.add_option(
             "--resets", options.resets,
             "Start the guest anew in the same memory, which is discarded first, at as many of its resets of the "
             "machine (the zeroing guest's are its ends); all that is done before the guest starts is done again. "
             "The next one ends the run")
          ->capture_default_str()
          ->type_name("N")
          ->check(CLI::Range(0U, most_resets));
  app.add_option("--json", options.json, "Write the figures as JSON to this file (- for standard output)")
      ->type_name("FILE");
  app.add_option("--map", options.map,
                 "Draw guest memory as the last answer found it: as SVG to this file, and on standard output")
      ->type_name("FILE");
  auto* const save =
      app.add_option("--save", options.save,
                     "End the run when a Linux guest has said a text on its console, and write the machine to this "
                     "file: memory, but for pages that are known to be zero, vCPUs, devices and what the guest has set "
                     "up of Hyper-V")
          ->type_name("FILE");
  auto* const save_at =
      app.add_option("--save-at", options.save_at, "The text")
          ->type_name("TEXT")
          ->needs(save)
          ->check(
              CLI::Validator([](const std::string& text) { return std::string(text.empty() ? "is empty" : ""); }, ""));
  save->needs(save_at);
  auto* const restore =
      app.add_option("--restore", options.restore,
                     "Go on with a machine that was saved on this host by this program, whose memory may be of another "
                     "backing; not to be had from strangers, for KVM is given what it holds")
          ->type_name("FILE");
  for (CLI::Option* const other : {size, count, way, shown, leftovers, resets, own_guest, kernel, balloon})
    restore->excludes(other);
  app.add_option(
         "--trace", options.trace,
         "Write what the guest is shown of Hyper-V, what it asks and what it is told to this file, as a line of "
         "JSON each: the hypervisor's CPUID leaves, MSRs, hypercalls, ranges, nothing of guest memory. Of what KVM "
         "answers by "
         "itself there is what it holds at a vCPU's first extended hypercall, and in the end. At most 64 MiB; ./dev "
         "trace prints it")
      ->type_name("FILE");
  app.add_option("--host-memory-log", options.host_memory_log,
                 "Write how much host memory guest RAM takes to this file, five times a second and when an answer was "
                 "made: a line each of milliseconds and bytes, and \"answer\" for those")
      ->type_name("FILE");
  app.add_option("--kvm-device", options.kvm_device, "KVM's device")->capture_default_str()->type_name("FILE");

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    return std::unexpected(EarlyExit{0, app.help()});
  } catch (const CLI::ParseError& error) {
    return std::unexpected(EarlyExit{2, std::string("cppvmm-boot: ") + error.what() + " (--help lists the options)\n"});
  }

  options.memory_bytes = parse_size(memory).value_or(0);
  options.idle = guest == "idle";
  options.backing = backings.at(backing);
  options.hypercalls = transports.at(hypercalls);
  options.enlightenments = enlightenments_of(enlightenments);
  options.huge_pages = huge_page_uses.at(huge_pages);
  if (!target.empty()) options.balloon_target = parse_size(target);
  if (const std::string why = check_balloon(options); !why.empty())
    return std::unexpected(EarlyExit{2, "cppvmm-boot: --balloon-target: " + why + "\n"});
  if (!options.save.empty() && options.kernel.empty() && options.restore.empty())
    return std::unexpected(EarlyExit{2, "cppvmm-boot: --save: the zeroing guest says nothing (--kernel)\n"});
  const bool is_huge = options.backing == MemoryBacking::hugetlb || options.backing == MemoryBacking::hugetlb_memfd;
  if (is_huge && options.memory_bytes % (2 * mebi) != 0)
    return std::unexpected(EarlyExit{2, "cppvmm-boot: --memory: must be a multiple of 2 MiB for --backing hugetlb\n"});
  if (is_huge && options.huge_pages != HugePageUse::system)
    return std::unexpected(EarlyExit{2, "cppvmm-boot: --thp: hugetlb pages are not transparent\n"});
  return options;
}

} // namespace cppvmm::boot
